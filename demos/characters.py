"""A language model of characters: trained on one text, adapted to two others, and what each of them writes.

    python demos/characters.py                    about 0.8 million weights, in some minutes
    python demos/characters.py --quick            a smaller model, in seconds: it does not learn to spell
    python demos/characters.py --text novel.txt --style laws.txt --style letters.txt     texts of yours

A model of Llama's shape reads Python's documentation (the help texts that come with every Python) letter by letter, and
learns to predict the next letter. Then, beside its frozen weights, an adapter learns to write like licences (Python's and
NumPy's), and another like source code (modules of the standard library). The same beginning is continued by the base, by
each adapter, by a mixture of both, and by merged weights; and two users get an adapter each in one batch.

Writes report.json and report.png, the model and its adapters; `minilora generate` goes on with them. Exit codes: 0 done,
2 wrong usage, 4 diverged, 130 interrupted.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import sysconfig
import time
from collections import Counter

from showing import console, characters as pages  # first: it says how to install minilora
from showing.divergence import Diverged
from showing.progress import Progress
from showing.told import Told

import minilora
import numpy
from minilora import formats, lora, models, train
from minilora.train.data import Tokens

SETTINGS = {  # name: (full size, --quick, meaning)
    "width": (128, 32, "numbers of a hidden state"),
    "layers": (4, 2, "layers"),
    "context": (256, 64, "characters of a row; no text is longer than what it was trained on"),
    "most": (400_000, 60_000, "characters of a text that are read"),
    "steps": (500, 60, "steps of the training on the first text"),
    "steps_lora": (120, 30, "steps of each adapter"),
    "batch_size": (8, 8, "rows in a batch"),
    "lr": (0.004, 0.01, "learning rate where all weights are trained"),
    "lr_lora": (0.006, 0.02, "and where an adapter is"),
    "r": (8, 4, "rank of the updates"),
    "lora_alpha": (16.0, 8.0, "the updates are scaled by lora_alpha / r"),
    "length": (250, 50, "characters that are written"),
    "temperature": (0.5, 0.5, "below 1: more probable characters are drawn more often"),
}
MORE = {
    "--text": {"metavar": "FILE", "help": "the first text, in place of Python's documentation"},
    "--style": {"metavar": "FILE", "action": "append", "default": [],
                "help": "a text to adapt to, in place of licences and source code; give it once or twice"},
    "--begin": {"metavar": "TEXT", "default": "The ", "help": "what is continued (default %(default)r)"},
}
HELD_OUT = 20  # one row in so many is held out
MODULES = "argparse textwrap heapq queue fractions statistics shlex configparser csv calendar copy bisect".split()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADS = 4
RARE = 10  # a character that is there less often gets no place in the alphabet
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


# -- the texts --------------------------------------------------------------------------------------------------------


def documentation():
    """The help texts of Python: those of `help("if")`, or, where an installation lacks them, of modules."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        known = [vars(module).get("__doc__") for _, module in sorted(sys.modules.items()) if hasattr(module, "__dict__")]
        return "\n".join(text for text in known if isinstance(text, str))
    return "\n".join(topics[name] for name in sorted(topics))


def licences():
    """The licence of Python, and those in NumPy's package."""
    folders = [sysconfig.get_paths()["stdlib"], sys.base_prefix]
    files = [os.path.join(folder, name) for folder in folders for name in ("LICENSE.txt", "LICENSE_PYTHON.txt", "LICENSE")]
    found = [path for path in files if os.path.isfile(path)][:1]
    packed = importlib.metadata.files("numpy") or []
    found += sorted(str(file.locate()) for file in packed if "LICEN" in file.name.upper() and file.suffix != ".py")
    return "\n".join(content(path) for path in found if os.path.isfile(path))


def source():
    """Modules of the standard library."""
    specs = [importlib.util.find_spec(name) for name in MODULES]
    return "\n".join(spec.loader.get_source(spec.name) or "" for spec in specs if hasattr(spec.loader, "get_source"))


def content(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise minilora.errors.FileError(f"{path}: cannot be read: {error.strerror}") from error


def texts_of(config):
    """name: (where from, the text), the first text first."""
    found = {"documentation": ("the help texts of Python", documentation()), "licences": ("of Python and NumPy", licences()),
             "source-code": ("modules of Python", source())}
    if config.style:
        found = {"documentation": found["documentation"], **{name_of(path): (path, content(path)) for path in config.style}}
    if config.text:
        found = {name_of(config.text): (config.text, content(config.text)),
                 **{name: text for name, text in found.items() if name != "documentation"}}
    if len(found) != 1 + (len(config.style) or 2) or "base" in found:
        raise minilora.errors.ConfigError("the name of a file is that of its adapter: no two may have the same, and none may "
                                          "be called base")
    return {name: (where, tidy(text[:2 * config.most])[:config.most]) for name, (where, text) in found.items()}


def name_of(path):
    """The name of a text, and of its adapter, after its file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.splitext(os.path.basename(path))[0])[:40].strip(".-") or "text"


def tidy(text):
    """A text without tabs, control characters, runs of empty lines and deep indents."""
    text = re.sub(" {9,}", " " * 8, text.replace("\r\n", "\n").expandtabs(4))
    return re.sub(r"\n{3,}", "\n\n", "".join(c for c in text if c == "\n" or c.isprintable())).strip() + "\n"


class Alphabet:
    """Characters as token ids: the position in `characters`. Id 0 is any other character."""

    def __init__(self, texts):
        counts = Counter("".join(texts))
        self.characters = [UNKNOWN, *sorted(c for c, count in counts.items() if count >= RARE and c != UNKNOWN)]
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text):
        return [self.ids.get(character, 0) for character in text]

    def decode(self, ids):
        return "".join(self.characters[i] for i in ids)

    def tokenizer(self):
        """The fields of a tokenizer.json that does the same: BPE that merges nothing."""
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"},
                "model": {"type": "BPE", "vocab": self.ids, "merges": [], "unk_token": UNKNOWN}}


class Texts:
    """The texts in rows of `context` characters and the one behind them: data[name] to learn, held_out[name] to judge by."""

    def __init__(self, texts, context):
        self.alphabet = Alphabet(text for _, text in texts.values())
        self.names, self.where = list(texts), {name: where for name, (where, _) in texts.items()}
        self.sizes, self.data, self.held_out, self.samples = {}, {}, {}, {}
        for name, (where, text) in texts.items():
            ids = self.alphabet.encode(text)
            rows = [ids[low:low + context + 1] for low in range(0, len(ids) - context, context)]
            if len(rows) < 2 * HELD_OUT:
                raise minilora.errors.ConfigError(
                    f"{name} ({where}): {len(text):,} characters are too few to learn from: {2 * HELD_OUT * context:,} at "
                    "least, or a smaller --context. Another text: --text FILE, --style FILE")
            self.sizes[name], self.samples[name] = len(text), " ".join(text[len(text) // 3:][:200].split())
            self.data[name] = Tokens([row for i, row in enumerate(rows) if i % HELD_OUT])
            self.held_out[name] = Tokens(rows[::HELD_OUT])


# -- training ---------------------------------------------------------------------------------------------------------


def fitted(model, data, steps, lr, config, progress, label, flag):
    """Train what is trainable; a record of it."""
    settings = train.Settings(steps=steps, batch_size=config.batch_size, learning_rate=lr, warmup=0.04, weight_decay=0.01,
                              seed=config.seed, steps_per_report=max(1, steps // 10))
    began = time.perf_counter()
    try:
        told = Told(progress, f"{label:<14}", lambda loss: f"{pages.bits(loss):.2f} bits")
        done = train.fit(model, data, settings, quiet=True, beside=[told])
    except minilora.errors.DivergedError as error:
        advice, line = console.gentler(config, SETTINGS, flag)
        found = str(error).partition(". Try a smaller")[0]
        raise Diverged(f"{label}: {found}: {advice}. Try: {line}", float("nan"), 0, None) from error
    return {"trained": minilora.summary(model).trained, "losses": done.losses, "seconds": time.perf_counter() - began}


@minilora.no_grad()
def loss_on(model, data):
    """The mean loss over the characters of held-out rows."""
    total = count = 0
    for rows in data.in_order(32):
        batch = data.batch(rows)
        total, count = total + batch.targets * model(**batch.inputs).item(), count + batch.targets
    return total / count


# -- writing ----------------------------------------------------------------------------------------------------------


class Writing:
    """Continues the beginning, with one seed for all: what differs is the model's."""

    def __init__(self, model, alphabet, config):
        self.model, self.alphabet, self.config = model, alphabet, config
        self.begin = alphabet.encode(config.begin)

    def made(self, count=1, stream=None):
        config = self.config
        return models.generate(self.model, [self.begin] * count, config.length, temperature=config.temperature,
                               seed=config.seed, stream=stream)

    def shown(self, name):
        """One text, printed as it comes."""
        print(f"{name}:")
        show = pages.Stream(self.config.begin)
        began = time.perf_counter()
        made = self.made(stream=lambda ids: show.write(self.alphabet.decode(ids)))
        seconds = time.perf_counter() - began
        show.end()
        return {"name": name, "text": self.alphabet.decode(made.ids[0]), "seconds": seconds}


def write_all(model, writing, report, styles):
    """The beginning continued by the base, each adapter, their mixture, and merged weights."""
    written = report["written"] = []
    for name, active, weights in mixtures(styles):
        lora.activate(model, *active, weights=weights, trainable=False)
        written.append(writing.shown(name))
    lora.activate(model, styles[0], trainable=False)
    before = fingerprint(model)
    lora.merge(model)
    written.append(writing.shown(f"{styles[0]}, merged into the weights"))
    report["merged"] = {"same_text": written[1]["text"] == written[-1]["text"], "moved": fingerprint(model) != before}
    lora.unmerge(model)
    report["merged"]["back"] = fingerprint(model) == before


def mixtures(styles):
    """(name, adapters, weights) of the base, every adapter, and half of each."""
    half = [("half of each", styles, [1.0 / len(styles)] * len(styles))] if len(styles) > 1 else []
    return [("base", [], None), *((style, [style], None) for style in styles), *half]


def two_users(model, writing, styles):
    """One batch in which each row has an adapter of its own, against each user alone."""
    users = [styles[0], styles[1] if len(styles) > 1 else "__base__"]
    began = time.perf_counter()
    with lora.mixed(model, adapter_names=users):
        together = writing.made(2)
    seconds, alike = time.perf_counter() - began, []
    texts = [writing.alphabet.decode(row) for row in together.ids]
    for i, user in enumerate(users):
        lora.activate(model, *([user] if user != "__base__" else []), trainable=False)
        alike.append(writing.alphabet.decode(writing.made(2).ids[i]) == texts[i])
    return {"users": users, "texts": texts, "alike": alike, "seconds": seconds}


def save(model, alphabet, styles, folder):
    """The base as transformers reads it, a tokenizer beside it, and every adapter as a folder of PEFT."""
    lora.activate(model)
    sizes = {}
    for style in styles:
        formats.save_adapter(model, os.path.join(folder, style), style)
        sizes[style] = os.path.getsize(os.path.join(folder, style, "adapter_model.safetensors"))
        lora.remove(model, style)
    models.save(model, os.path.join(folder, "base"))
    sizes["base"] = os.path.getsize(os.path.join(folder, "base", "model.safetensors"))
    with open(os.path.join(folder, "base", "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(alphabet.tokenizer(), file)
    return sizes


def fingerprint(model):
    """SHA-256 of the base's weights."""
    weights = [p.numpy().tobytes() for name, p in model.named_parameters() if ".adapters." not in name]
    return hashlib.sha256(b"".join(weights)).hexdigest()


# -- the whole job ----------------------------------------------------------------------------------------------------


def run(config, report, texts):
    """The report grows with every part."""
    first, *styles = texts.names
    console.heading("1. Texts, read letter by letter")
    report["texts"] = [{"name": name, "where": texts.where[name], "characters": texts.sizes[name],
                        "rows": len(texts.data[name]), "held_out": len(texts.held_out[name]), "sample": texts.samples[name]}
                       for name in texts.names]
    report["alphabet"] = len(texts.alphabet.characters)
    print(pages.texts_table(report))

    console.heading(f"2. Pre-training: all weights, on {first}")
    wide = config.width * 8 // 3 // 8 * 8
    model = models.Llama(models.LlamaConfig(
        vocab_size=report["alphabet"], hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=wide, max_position_embeddings=4096, tie_word_embeddings=True,
        initializer_range=config.width ** -0.5,  # so narrow a model learns nothing for long from transformers' 0.02
    ), rng=config.seed)
    with Progress("pre-training", config.steps, interval=5) as progress:
        training = fitted(model, texts.data[first], config.steps, config.lr, config, progress, first, "lr")
    report["base"] = {"weights": sum(p.size for p in model.parameters()), "fingerprint": fingerprint(model),
                      "training": training}
    report["bits"] = {"base": {name: pages.bits(loss_on(model, texts.held_out[name])) for name in texts.names}}
    print(pages.base_text(report))

    console.heading("3. Adapting: LoRA beside the frozen weights")
    report["adapters"] = {}
    with Progress("adapting", len(styles) * config.steps_lora, interval=5) as progress:
        for number, style in enumerate(styles, 1):
            lora.inject(model, lora.Config(r=config.r, lora_alpha=config.lora_alpha, target_modules=TARGETS), style,
                        rng=numpy.random.default_rng((config.seed, number)))
            report["adapters"][style] = fitted(model, texts.data[style], config.steps_lora, config.lr_lora, config, progress,
                                               style, "lr_lora")
    for name, active, weights in mixtures(styles)[1:]:
        lora.activate(model, *active, weights=weights, trainable=False)
        report["bits"][name] = {text: pages.bits(loss_on(model, texts.held_out[text])) for text in texts.names}
    print(pages.bits_table(report))

    writing = Writing(model, texts.alphabet, config)
    console.heading(f"4. {config.begin!r} continued, as it comes")
    write_all(model, writing, report, styles)
    print(pages.merged_text(report))

    console.heading("5. Two users, one batch: lora.mixed")
    report["users"] = two_users(model, writing, styles)
    print(pages.users_text(report))

    console.heading("6. What is stored")
    report["bytes"] = save(model, texts.alphabet, styles, config.out)
    report["base"]["fingerprint_after"] = fingerprint(model)
    print(pages.storage_text(report))


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    parser, config = console.configuration("characters", __doc__.split("\n")[0], SETTINGS, more=MORE)
    whole = ("width", "layers", "context", "most", "steps", "steps_lora", "batch_size", "r", "length")
    problems = [f"{console.flag(name)} must be at least 1, got {getattr(config, name)}" for name in whole
                if getattr(config, name) < 1]
    if config.width % (2 * HEADS):
        problems.append(f"--width {config.width} must be a multiple of {2 * HEADS}: {HEADS} heads, of pairs of numbers")
    if len(config.style) > 2:
        problems.append(f"--style is there {len(config.style)} times, and one batch has two users: give it once or twice")
    if not config.begin:
        problems.append("--begin is empty, and something must be continued")
    if len(config.begin) + config.length > config.context + 1 and not problems:
        problems.append(f"--length {config.length} and --begin are longer than --context {config.context}: of such places the "
                        f"model has learned nothing. Give --length {max(1, config.context + 1 - len(config.begin))} or less")
    console.refuse(parser, config, problems, positive=("lora_alpha", "lr", "lr_lora", "temperature"))
    return config


def main():
    config = parse()
    report = console.begun(config)
    texts = Texts(texts_of(config), config.context)
    fewest = min(len(data) for data in texts.data.values())
    if config.batch_size > fewest:
        raise minilora.errors.ConfigError(f"--batch-size {config.batch_size} is more than the {fewest} rows of the shortest "
                                          "text")
    with console.reporting(report):
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            run(config, report, texts)
    print("\n" + pages.draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "characters.py"))
