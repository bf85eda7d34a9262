"""What characters.py says and draws: texts, report.json, report.png. Nothing is trained or measured here."""

import math
import shlex
import sys
import textwrap

from . import console
from .colours import BLUE, GREEN, ORANGE

COLOURS = (BLUE, ORANGE, GREEN)
INDENT = "    "
COLUMN = 37  # letters of a user's text in a line


def title(report):
    c = report["config"]
    return (f"Characters: {c['layers']} layers of width {c['width']}, {c['steps']} steps, then LoRA of rank {c['r']}, "
            f"{c['steps_lora']} steps for each text, {report['dtype']} on {report['device']}, seed {c['seed']}")


def bits(loss):
    """A loss in bits."""
    return loss / math.log(2.0)


class Stream:
    """Prints a text letter by letter, in lines of the console's width."""

    def __init__(self, begin, out=None):
        self.out, self.column, self.line = out or sys.stdout, 0, ""
        for character in begin:
            self.write(character)

    def write(self, character):
        if character == "\n" or self.column >= console.WIDTH - len(INDENT):
            self._put("\n")
            self.column = 0
        if character != "\n":
            self._put((INDENT if self.column == 0 else "") + character)
            self.column += 1

    def end(self):
        self._put("\n\n")

    def _put(self, text):
        self.out.write(text)
        self.out.flush()


def texts_table(report):
    rows = [(text["name"], end_of(text["where"]), f"{text['characters']:,}",
             f"{text['held_out']:,} of {text['rows'] + text['held_out']:,}") for text in report["texts"]]
    samples = "\n".join(console.paragraph(f"{text['name']}: \"... {text['sample'][:120]} ...\"", "  ")
                        for text in report["texts"])
    return (f"{console.table(('text', 'from', 'characters', 'rows held out'), rows)}\n"
            f"{report['alphabet']} different characters; rows of {report['config']['context']}\n{samples}")


def end_of(path, most=24):
    return path if len(path) <= most else "..." + path[3 - most:]


def base_text(report):
    base, first = report["base"], report["texts"][0]["name"]
    chance = math.log2(report["alphabet"])
    return console.paragraph(
        f"{base['weights']:,} weights, {base['training']['seconds']:.0f} s. It needs {report['bits']['base'][first]:.2f} bits "
        f"for a character of held-out {first}; who knew nothing would need {chance:.2f}.")


def bits_table(report):
    names = [text["name"] for text in report["texts"]]
    rows = [(model, *(f"{values[name]:.2f}" for name in names)) for model, values in report["bits"].items()]
    adapters = report["adapters"]
    trained = next(iter(adapters.values()))["trained"]
    seconds = " and ".join(f"{one['seconds']:.0f} s" for one in adapters.values())
    return ("bits for a character of held-out text (less: it is expected more):\n"
            + console.table(("model", *names), rows) + "\n"
            + console.paragraph(f"An adapter trains {trained:,} numbers, {trained / report['base']['weights']:.1%} of the "
                                f"base's; {'they' if len(adapters) > 1 else 'it'} took {seconds}."
                                + (" The mixture was never trained: half of each update." if len(adapters) > 1 else "")))


def merged_text(report):
    merged = report["merged"]
    same = "letter by letter that of the adapter beside the weights" if merged["same_text"] else \
        "not that of the adapter beside the weights: sums are rounded otherwise, and one other letter leads to more"
    return console.paragraph(f"The text of the merged weights is {same}. After lora.unmerge the base has its own bits again: "
                             f"{'yes' if merged['back'] else 'NO'}.")


def users_text(report):
    users, begin = report["users"], report["config"]["begin"]
    columns = [lines(begin + text) for text in users["texts"]]
    names = ["the base" if user == "__base__" else user for user in users["users"]]
    header = f"{names[0]:<{COLUMN}} | {names[1]}"
    body = [f"{left:<{COLUMN}} | {right}".rstrip() for left, right in zip_longest(*columns)]
    alike = ["the same" if same else "not the same: sums are rounded otherwise" for same in users["alike"]]
    return "\n".join([header, "-" * COLUMN + "-+-" + "-" * COLUMN, *body, "",
                      f"as if each were served alone? {names[0]}: {alike[0]}; {names[1]}: {alike[1]}"])


def zip_longest(left, right):
    for i in range(max(len(left), len(right))):
        yield (left[i] if i < len(left) else ""), (right[i] if i < len(right) else "")


def lines(text):
    return [part for line in text.split("\n") for part in (textwrap.wrap(line, COLUMN, drop_whitespace=False) or [""])]


def storage_text(report):
    sizes, base = report["bytes"], report["base"]
    rows = [(name, f"{size / 1000:,.0f} kB", f"{size / sizes['base']:.1%}") for name, size in
            (("base", sizes["base"]), *((name, size) for name, size in sizes.items() if name != "base"))]
    unchanged = base["fingerprint"] == base["fingerprint_after"]
    out = shlex.quote(report["config"]["out"])
    adapters = list(report["adapters"])
    mixture = " ".join(f"{name}={1 / len(adapters):g}" for name in adapters)
    return (console.table(("stored", "bytes", "of the base"), rows) + "\n"
            f"the base is unchanged to the last bit: {'yes' if unchanged else 'NO'}\n"
            "To go on writing (pip install 'minilora[models]'):\n"
            f"  cd {out}\n"
            f"  minilora generate base {mixture} \\\n"
            f"      --prompt {shlex.quote(report['config']['begin'])} --temp 0.5 --max-tokens {report['config']['length']}")


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(report):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    return console.picture(report, title(report), (11.5, 9.5), 2, 2, [
        lambda axes: draw_losses(axes, report), lambda axes: draw_bits(axes, report),
        lambda axes: draw_texts(axes, report, 0, 2), lambda axes: draw_texts(axes, report, 2, 4)])


def draw_losses(axes, report):
    runs = {report["texts"][0]["name"]: report["base"]["training"], **report["adapters"]}
    for colour, (name, training) in zip(COLOURS, runs.items()):
        steps, losses = zip(*training["losses"])
        axes.plot(steps, [bits(loss) for loss in losses], "o-", color=colour, markersize=4,
                  label=f"{name}: {training['trained']:,} numbers")
    axes.set(xlabel="step", ylabel="bits for a character, in training", ylim=(0, None))
    axes.legend(fontsize=10.5, frameon=False)
    axes.set_title("All weights learn one text, adapters the others", fontsize=12)


def draw_bits(axes, report):
    names = [text["name"] for text in report["texts"]]
    values = [[row[name] for name in names] for row in report["bits"].values()]
    most = max(map(max, values))
    axes.imshow(values, cmap="Blues", vmin=0.0, vmax=most, interpolation="nearest", aspect="auto")
    best = [min(row[j] for row in values) for j in range(len(names))]
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=13,
                      color="white" if value > 0.6 * most else "black", fontweight="bold" if value == best[j] else "normal")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(values)), report["bits"])
    axes.set_xlabel("held-out text", fontsize=11)
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)
    axes.set_title("Bits for a character: less is better, best in bold", fontsize=12)


def draw_texts(axes, report, low, high):
    """What the models wrote, in letters of one width."""
    axes.set_axis_off()
    place = 1.0
    for number, one in enumerate(report["written"][low:high]):
        axes.text(0.0, place, f"{one['name']}:", fontsize=12, va="top", color=(*COLOURS, "black")[(low + number) % 4],
                  fontweight="bold", transform=axes.transAxes)
        text = [part for line in (report["config"]["begin"] + one["text"]).split("\n")
                for part in (textwrap.wrap(line, 66, drop_whitespace=False) or [""])]
        axes.text(0.0, place - 0.06, "\n".join(text[:11]).replace("$", r"\$"), fontsize=9, va="top", family="monospace",
                  transform=axes.transAxes)
        place -= 0.5
