"""What digits_shift.py says and draws: texts, report.json, report.png. Nothing is trained or measured here."""

import math

from . import console
from .colours import BLUE, GREY, ORANGE
from .console import percent

SHOWN = "mirrored"  # the kind whose mistakes are drawn
DRAWN = (2, 3, 4, 5, 6, 7)  # the digits that are drawn: enough to see the kinds


def title(report):
    c = report["config"]
    return (f"Digits: convolutions of {c['width']}, {2 * c['width']} and {4 * c['width']} channels, LoRA of rank {c['r']}, "
            f"{c['steps']} steps each, {report['dtype']} on {report['device']}, seed {c['seed']}")


def kilobytes(size):
    return f"{size / 1000:,.1f} kB"


def data_text(report):
    data = report["data"]
    return (f"{data['train']:,} images to train on, {data['test']:,} held out, {data['held_out_of_each_digit']} of each digit\n"
            f"kinds: {', '.join(data['kinds'])}\nEach image is there in every kind.")


def base_text(report):
    base = report["base"]
    rows = [[percent(base["right"][kind]) for kind in report["data"]["kinds"]]]
    return (f"{base['weights']:,} weights, {base['training']['seconds']:.1f} s\n"
            "read right by the base, of the held-out images (by chance: 10 %):\n"
            + console.table(report["data"]["kinds"], rows))


def adapting_table(report):
    records = report["adapting"]
    rows = [(record["kind"], *map(percent, (record["base_right"], record["lora"]["right"], record["full"]["right"],
                                            record["full"]["right_upright"]))) for record in records]
    header = ("held-out digits", "base alone", "with LoRA", "full copy", "full copy, upright")
    return f"{console.table(header, rows)}\n{adapting_lesson(report)}"


def adapting_lesson(report):
    records, n = report["adapting"], report["data"]["test"]
    lora, full = (sum(record[way]["right"] for record in records) / len(records) for way in ("lora", "full"))
    trained, weights = records[0]["lora"]["trained"], records[0]["full"]["trained"]
    error = 100.0 * math.sqrt(lora * (1.0 - lora) / n)
    steps = [1000.0 * sum(record[way]["seconds"] for record in records) / len(records) / report["config"]["steps"]
             for way in ("lora", "full")]
    return console.paragraph(
        "On the right: what the full copy still reads of the upright digits. "
        f"An adapter trains {trained:,} numbers ({trained / weights:.1%}), a full copy {weights:,}. On average LoRA reads "
        f"{percent(lora)} and full fine-tuning {percent(full)}; the standard error of such a share of {n} images is "
        f"{error:.1f} points. A step took {steps[0]:.1f} ms with LoRA and {steps[1]:.1f} ms with all weights.")


def mistake(counts):
    """The most frequent one, in words."""
    most, digit, taken = max((count, digit, taken) for digit, row in enumerate(counts)
                             for taken, count in enumerate(row) if digit != taken)
    return f"{digit} read as {taken}: {most} of {sum(counts[digit])}" if most else "none"


def mistakes_table(report):
    rows = []
    for record in report["adapting"]:
        row = [record["kind"]]
        for when in ("before", "after"):
            counts = record["confusion"][when]
            row += [str(sum(map(sum, counts)) - sum(counts[d][d] for d in range(10))), mistake(counts)]
        rows.append(row)
    header = ("digits", "base", "most frequent", "adapter", "most frequent")
    return ("mistakes of the base alone, and of the base with the adapter for these digits:\n"
            + console.table(header, rows))


def swapping_table(report):
    swapping, kinds = report["swapping"], report["data"]["kinds"]
    rows = [(active, *map(percent, right)) for active, right in zip(swapping["active"], swapping["right"])]
    return (f"read right, by the active adapter:\n{console.table(('active', *kinds), rows)}\n"
            f"A swap takes {swapping['milliseconds']:.2f} ms: it exchanges references,\nno weight is copied or computed.")


def mixed_text(report):
    mixed = report["mixed"]
    rows = ", ".join(f"{count} {kind}" for kind, count in mixed["rows"].items())
    total = sum(mixed["rows"].values())
    alike = (f"read as in a run for each kind: {mixed['read_alike']} of {total} rows; the logits, up to "
             f"{mixed['largest_logit']:.1f} in size, differ by {mixed['largest_difference']:.1e} at most ({report['dtype']})")
    return "\n".join([console.paragraph(f"one batch of {total} rows: {rows}", "  "),
                      f"read right: {percent(mixed['right'])}", console.paragraph(alike, "  ")])


def storage_text(report):
    sizes, base = report["bytes"], report["base"]
    adapter = max(sizes["adapters"].values())
    rows = [(name, kilobytes(size), f"{size / sizes['base']:.3f}") for name, size in (
        ("the base", sizes["base"]), ("one adapter", adapter),
        (f"base and {len(sizes['adapters'])} adapters", sizes["base_and_adapters"]),
        (f"base and {len(sizes['adapters'])} full copies", sizes["base_and_full_copies"]))]
    unchanged = base["fingerprint"] == base["fingerprint_after"]
    return (console.table(("stored", "bytes", "times the base"), rows) + "\n"
            f"SHA-256 of the base after pre-training: {base['fingerprint'][:16]}...\n"
            f"SHA-256 of the base now:                {base['fingerprint_after'][:16]}...\n"
            f"unchanged to the last bit: {'yes' if unchanged else 'NO'}\n"
            f"with all adapters switched off its logits are those of before, bit for bit: "
            f"{'yes' if base['logits_unchanged'] else 'NO'}")


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(report, examples):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    record = next(record for record in report["adapting"] if record["kind"] == SHOWN)
    return console.picture(report, title(report), (11, 13), 3, 2, [
        lambda axes: draw_examples(axes, examples), lambda axes: draw_swapping(axes, report),
        lambda axes: draw_confusion(axes, record, "before", "without an adapter"),
        lambda axes: draw_confusion(axes, record, "after", "with its adapter"),
        lambda axes: draw_shares(axes, report), lambda axes: draw_bytes(axes, report)])


def draw_examples(axes, examples):
    """Some of the held-out images in every kind, on a grid with gaps of a pixel."""
    for i, images in enumerate(examples.values()):
        for j, digit in enumerate(DRAWN):
            axes.imshow(images[digit], extent=(9 * j, 9 * j + 8, 9 * i + 8, 9 * i), cmap="gray_r", vmin=0.0, vmax=1.0,
                        interpolation="nearest")
    axes.set(xlim=(0, 9 * len(DRAWN) - 1), ylim=(9 * len(examples) - 1, 0))
    axes.set_xticks([9 * j + 4 for j in range(len(DRAWN))], map(str, DRAWN))
    axes.set_yticks([9 * i + 4 for i in range(len(examples))], examples)
    plain(axes, "The same held-out digits in five kinds")


def plain(axes, text):
    """A title, and neither frame nor ticks."""
    axes.set_title(text, fontsize=13)
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)


def draw_swapping(axes, report):
    swapping, kinds = report["swapping"], report["data"]["kinds"]
    cells(axes, swapping["right"], 1.0, lambda share: f"{100 * share:.0f}", 12)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(swapping["active"])), swapping["active"])
    axes.set_xlabel("held-out digits", fontsize=11)
    axes.set_ylabel("active adapter", fontsize=11)
    plain(axes, "One network, one adapter at a time:\n% read right")


def cells(axes, values, most, text, fontsize):
    axes.imshow(values, cmap="Blues", vmin=0.0, vmax=most, interpolation="nearest", aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, text(value), ha="center", va="center", fontsize=fontsize,
                      color="white" if value > 0.6 * most else "black")


def draw_confusion(axes, record, when, words):
    counts = record["confusion"][when]
    right, total = sum(counts[d][d] for d in range(10)), sum(map(sum, counts))
    cells(axes, counts, max(map(sum, counts)), lambda count: str(count) if count else "", 10)
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.set_xlabel("read as", fontsize=11)
    axes.set_ylabel(f"{record['kind']} digit", fontsize=11)
    plain(axes, f"{record['kind'].capitalize()} digits {words}:\n{percent(right / total)} right")


def draw_shares(axes, report):
    records = report["adapting"]
    for offset, colour, name, shares in (
            (-0.27, GREY, "the base alone", [record["base_right"] for record in records]),
            (0.0, ORANGE, f"LoRA, {records[0]['lora']['trained']:,} numbers trained", [r["lora"]["right"] for r in records]),
            (0.27, BLUE, f"full copy, {records[0]['full']['trained']:,} trained", [r["full"]["right"] for r in records])):
        shares = [100.0 * share for share in shares]
        bars = axes.bar([i + offset for i in range(len(records))], shares, 0.25, color=colour, label=name)
        axes.bar_label(bars, [f"{value:.0f}" for value in shares], fontsize=10, padding=1)
    axes.set_xticks(range(len(records)), [record["kind"] for record in records])
    axes.set_ylim(0, 135)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("% read right", fontsize=11)
    axes.legend(fontsize=10.5, loc="upper center", frameon=False)
    plain(axes, f"LoRA against full fine-tuning, {report['config']['steps']} steps each")


def draw_bytes(axes, report):
    sizes = report["bytes"]
    count = len(sizes["adapters"])
    bars = [("one adapter", max(sizes["adapters"].values()), ORANGE), ("the base", sizes["base"], GREY),
            (f"base and\n{count} adapters", sizes["base_and_adapters"], ORANGE),
            (f"base and\n{count} full copies", sizes["base_and_full_copies"], BLUE)]
    names, values, colours = zip(*bars)
    drawn = axes.barh(names, [value / 1000 for value in values], 0.6, color=colours)
    axes.bar_label(drawn, [" " + kilobytes(value) for value in values], fontsize=11)
    axes.set_xlim(0, 1.35 * max(values) / 1000)
    axes.invert_yaxis()
    axes.set_xlabel("kB", fontsize=11)
    plain(axes, f"What is stored to read {count + 1} kinds of digits")
