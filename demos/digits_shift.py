"""One network, five kinds of digits: an adapter for each kind, swapped while the network runs.

    python demos/digits_shift.py                  about 100,000 weights, in about a minute
    python demos/digits_shift.py --quick          a smaller network, in seconds
    python demos/digits_shift.py --device gpu     the same code on the GPU

The images are real: 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn (no network is needed). A
convolutional network learns to read them upright. Then it meets digits that are rotated, mirrored, negative and noisy, or
outlined, and fails. For each kind an adapter is trained beside the frozen weights, and for comparison a full copy of the
network: from the same weights, with as many steps, on the same batches. All are judged on the same images, held out of every
training. The learning rates of both, at full size, were chosen on a part of the training images, with another seed.

Writes report.json and report.png. Exit codes: 0 done, 2 wrong usage or scikit-learn is missing, 4 diverged, 130 interrupted.
"""

import hashlib
import statistics
import sys
import time

from showing import console, digits_shift as pages  # first: it says how to install minilora
from showing.progress import Progress
from showing.real_digits import load_images
from showing.told import Told

import minilora
import numpy
from minilora import lora, nn
from minilora.errors import DivergedError
from minilora.train import Settings, fit
from minilora.train.data import Arrays

SETTINGS = {  # name: (full size, --quick, meaning)
    "width": (24, 8, "channels of the first convolution; the others have 2 and 4 times as many"),
    "r": (4, 4, "rank of the updates"),
    "lora_alpha": (16.0, 16.0, "the updates are scaled by lora_alpha / r"),
    "steps": (300, 100, "steps of each training"),
    "batch_size": (64, 64, "images in a batch"),
    "lr": (0.002, 0.004, "learning rate of Adam where all weights are trained"),
    "lr_lora": (0.01, 0.01, "and where an adapter is"),
}
HELD_OUT = 0.3  # share of the rarest digit's images that is held out; as many of every digit
NOISE = 0.15  # standard deviation in negative images, where black is 1
GROUPS = 4  # of channels in a GroupNorm
EVERY = 100  # steps after which a training is heard of
SWAPS = 50


class DigitNet(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, 10)."""

    def __init__(self, width, rng):
        self.conv1, self.norm1 = nn.Conv2d(1, width, 3, padding=1, rng=rng), nn.GroupNorm(GROUPS, width)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 3, padding=1, rng=rng), nn.GroupNorm(GROUPS, 2 * width)
        self.conv3, self.norm3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, rng=rng), nn.GroupNorm(GROUPS, 4 * width)
        self.hidden, self.head = nn.Linear(16 * width, 128, rng=rng), nn.Linear(128, 10, rng=rng)
        self.act, self.pool, self.flatten = nn.GELU(), nn.MaxPool2d(2), nn.Flatten()

    def forward(self, x):
        x = self.pool(self.act(self.norm1(self.conv1(x))))
        x = self.act(self.norm2(self.conv2(x)))
        x = self.pool(self.act(self.norm3(self.conv3(x))))
        return self.head(self.act(self.hidden(self.flatten(x))))


ADAPTED = ["conv1", "conv2", "conv3", "hidden", "head"]


def outlined(images):
    """Hollow strokes: what thickening a stroke by a pixel on every side adds to it."""
    padded = numpy.pad(images, ((0, 0), (1, 1), (1, 1)))
    rows, columns = images.shape[1:]
    return numpy.max([padded[:, i:i + rows, j:j + columns] for i in range(3) for j in range(3)], axis=0) - images


class Digits:
    """Every image in five kinds, split once and for all: neither the split nor the noise depends on --seed.

    `x[kind][part]` are images (n, 1, 8, 8) and `y[part]` their digits, on the device; `digits` those of "test" on the host.
    """

    def __init__(self, images, digits):
        rng = numpy.random.default_rng(0)
        self.held_out = int(HELD_OUT * numpy.bincount(digits).min())
        test = numpy.concatenate([rng.permutation(numpy.flatnonzero(digits == d))[:self.held_out] for d in range(10)])
        rows = {"train": numpy.setdiff1d(numpy.arange(len(digits)), test), "test": test}
        kinds = {
            "upright": images,
            "rotated": numpy.rot90(images, axes=(1, 2)),  # by a quarter, since half a turn would make a 6 a 9
            "mirrored": images[:, :, ::-1],
            "negative": numpy.clip(1.0 - images + NOISE * rng.standard_normal(images.shape), 0.0, 1.0),
            "outlined": outlined(images),
        }
        self.examples = {kind: all_of[test[::self.held_out]] for kind, all_of in kinds.items()}
        self.x = {kind: {part: minilora.to_device(all_of[chosen, None].astype("float32")) for part, chosen in rows.items()}
                  for kind, all_of in kinds.items()}
        self.y = {part: minilora.to_device(digits[chosen]) for part, chosen in rows.items()}
        self.digits, self.kinds, self.sizes = digits[test], list(kinds), {part: len(rows[part]) for part in rows}

    def right(self, model, kind):
        """The share of held-out images of a kind that a model reads right."""
        return float((logits(model, self.x[kind]["test"]).argmax(axis=1) == self.digits).mean())

    def confusion(self, model, kind):
        """Counts (10, 10): rows are the digits, columns what they were read as."""
        pairs = 10 * self.digits + logits(model, self.x[kind]["test"]).argmax(axis=1)
        return numpy.bincount(pairs, minlength=100).reshape(10, 10).tolist()


@minilora.no_grad()
def logits(model, x):
    return minilora.to_host(model(x).data)


def train(model, data, kind, lr, config, progress, label):
    """Adam with a falling learning rate. The batches depend on --seed alone: all trainings see the same ones."""
    def loss_of(model, batch):
        return nn.CrossEntropyLoss()(model(minilora.tensor(batch["x"])), minilora.to_device(batch["y"]))

    rows = Arrays(x=minilora.to_host(data.x[kind]["train"]), y=minilora.to_host(data.y["train"]))
    settings = Settings(steps=config.steps, batch_size=config.batch_size, seed=config.seed, threads=1, learning_rate=lr,
                        warmup=0, max_grad_norm=None, steps_per_report=EVERY, steps_per_eval=config.steps)
    try:
        made = fit(model, rows, settings, loss=loss_of, optimizer=lambda named: minilora.optim.Adam(named, lr=lr),
                   beside=[Told(progress, f"{label:<16}")], quiet=True)
    except DivergedError as error:
        blamed = ("lr_lora", "lora_alpha") if label.endswith("LoRA") else ("lr",)
        advice, line = console.gentler(config, SETTINGS, *blamed)
        raise DivergedError(f"{label}: {str(error).removesuffix(error.advice)}{advice}. Try: {line}") from error
    return {"trained": minilora.summary(model).trained, "losses": [loss for _, loss in made.losses], "seconds": made.seconds}


def run(config, report, data):
    """The whole job. The report grows with every part."""
    console.heading("1. Data: 8 x 8 pixels, five kinds of digits")
    report["data"] = {**data.sizes, "held_out_of_each_digit": data.held_out, "kinds": data.kinds}
    print(pages.data_text(report))

    console.heading("2. Pre-training: all weights, upright digits only")
    base = DigitNet(config.width, numpy.random.default_rng(config.seed))
    with Progress("pre-training", config.steps, interval=0) as progress:
        training = train(base, data, "upright", config.lr, config, progress, "upright, all")
    start, first_logits = base.state_dict(), logits(base, data.x["upright"]["test"])
    report["base"] = {"weights": sum(p.size for p in base.parameters()), "fingerprint": fingerprint(base), "training": training,
                      "right": {kind: data.right(base, kind) for kind in data.kinds}}
    print(pages.base_text(report))

    console.heading("3. Adapting: LoRA beside the frozen weights, against full fine-tuning")
    adapt(base, start, data, config, report)
    print(pages.adapting_table(report))

    console.heading("4. Mistakes, before and after")
    print(pages.mistakes_table(report))

    console.heading("5. Swapping adapters at run time: lora.activate")
    report["swapping"] = swap(base, data)
    print(pages.swapping_table(report))

    console.heading("6. One batch, an adapter for each row: lora.mixed")
    report["mixed"] = mix(base, data, config)
    print(pages.mixed_text(report))

    console.heading("7. What is stored, and what has become of the base")
    lora.activate(base)
    same_logits = logits(base, data.x["upright"]["test"]).tobytes() == first_logits.tobytes()
    report["base"].update(fingerprint_after=fingerprint(base), logits_unchanged=same_logits)
    report["bytes"] = sizes(base, data.kinds[1:])
    print(pages.storage_text(report))


def adapt(base, start, data, config, report):
    """For each kind of digits an adapter in `base`, named after it, and a full copy that is judged and forgotten."""
    records = report["adapting"] = []
    before = {kind: data.confusion(base, kind) for kind in data.kinds}
    with Progress("adapting", 2 * (len(data.kinds) - 1) * config.steps, interval=0) as progress:
        for number, kind in enumerate(data.kinds[1:], 2):
            lora.inject(base, lora.Config(r=config.r, lora_alpha=config.lora_alpha, target_modules=ADAPTED), kind,
                        rng=numpy.random.default_rng((config.seed, number)))
            adapted = train(base, data, kind, config.lr_lora, config, progress, f"{kind}, LoRA")
            adapted["right"] = data.right(base, kind)
            copy = DigitNet(config.width, rng=0)
            copy.load_state_dict(start)
            full = train(copy, data, kind, config.lr, config, progress, f"{kind}, all")
            full.update(right=data.right(copy, kind), right_upright=data.right(copy, "upright"))
            records.append({"kind": kind, "base_right": report["base"]["right"][kind], "lora": adapted, "full": full,
                            "confusion": {"before": before[kind], "after": data.confusion(base, kind)}})


def swap(model, data):
    """What the base reads of each kind with each adapter, and how long it takes to exchange one for another."""
    names, rows, times = data.kinds[1:], [], []
    for active in ([], *([name] for name in names)):
        lora.activate(model, *active, trainable=False)
        rows.append([data.right(model, kind) for kind in data.kinds])
    for i in range(SWAPS):
        began = time.perf_counter()
        lora.activate(model, names[i % len(names)], trainable=False)
        times.append(time.perf_counter() - began)
    return {"active": ["none", *names], "right": rows, "milliseconds": 1e3 * statistics.median(times)}


def mix(model, data, config):
    """The held-out images once more, each in a kind drawn for it, in one batch; against a run for each kind."""
    drawn = numpy.random.default_rng((config.seed, 0)).integers(len(data.kinds), size=len(data.digits))
    x = numpy.stack([minilora.to_host(data.x[kind]["test"]) for kind in data.kinds])[drawn, numpy.arange(len(drawn))]
    with lora.mixed(model, adapter_names=[data.kinds[i] if i else "__base__" for i in drawn]):
        together = logits(model, minilora.to_device(x))
    apart = numpy.empty_like(together)
    for i in numpy.unique(drawn):
        lora.activate(model, *([data.kinds[i]] if i else []), trainable=False)
        apart[drawn == i] = logits(model, minilora.to_device(x[drawn == i]))
    return {"rows": {kind: int((drawn == i).sum()) for i, kind in enumerate(data.kinds)},
            "right": float((together.argmax(1) == data.digits).mean()), "largest_logit": float(abs(apart).max()),
            "largest_difference": float(abs(together - apart).max()),
            "read_alike": int((together.argmax(1) == apart.argmax(1)).sum())}


def fingerprint(model):
    """SHA-256 of the base's weights."""
    weights = [p.numpy().tobytes() for name, p in model.named_parameters() if ".adapters." not in name]
    return hashlib.sha256(b"".join(weights)).hexdigest()


def sizes(model, kinds):
    """Bytes of the base and of its adapters."""
    def size(part):
        return sum(p.size * p.dtype.itemsize for name, p in model.named_parameters() if part in name)
    adapters = {kind: size(f".adapters.{kind}.") for kind in kinds}
    base = size("") - sum(adapters.values())
    return {"base": base, "adapters": adapters, "base_and_adapters": size(""), "base_and_full_copies": base * (1 + len(kinds))}


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    parser, config = console.configuration("digits_shift", __doc__.split("\n")[0], SETTINGS, "of weights and batches")
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}"
                for name in ("width", "r", "steps", "batch_size") if getattr(config, name) < 1]
    if config.width >= 1 and config.width % GROUPS:
        problems.append(f"--width {config.width} must be a multiple of {GROUPS}, the groups of its GroupNorm")
    console.refuse(parser, config, problems, positive=("lora_alpha", "lr", "lr_lora"))
    return config


def main():
    config = parse()
    report = console.begun(config)
    data = Digits(*load_images())
    if config.batch_size > data.sizes["train"]:
        raise minilora.errors.ConfigError(f"--batch-size {config.batch_size} is more than the {data.sizes['train']} "
                                          "images of the training part")
    with console.reporting(report):
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            run(config, report, data)
    print("\n" + pages.draw(report, data.examples))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "digits_shift.py"))
