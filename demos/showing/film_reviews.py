"""What film_reviews.py says and draws: texts, report.png, nearest.png. Nothing is trained or measured here."""

import math

from . import console
from .colours import BLACK, BLUE, GREEN, GREY, ORANGE
from .console import percent

NAMES = {"frozen": "frozen, layer alone", "query_value": "LoRA, query + value", "all_linear": "LoRA, all linears",
         "full": "full fine-tuning"}
LABELS = ("negative", "positive")

COLOURS = {"frozen": GREY, "query_value": ORANGE, "all_linear": GREEN, "full": BLUE}


def title(report):
    c = report["config"]
    return (f"Film reviews: LoRA of rank {c['r']}, {c['epochs']:g} epochs of batches of {c['batch_size']}, "
            f"{report['dtype']} on {report['device']}, seed {c['seed']}")


def error_of(report, share):
    """The standard error of a share of the held-out sentences."""
    return math.sqrt(share * (1.0 - share) / report["data"]["parts"]["test"]["sentences"])


def size_of(count):
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def memory_of(record):
    return "-" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e6:,.0f} MB"


def data_text(report):
    data, notes = report["data"], report["base"]["notes"]
    rows = [(part, f"{one['sentences']:,}", f"{one['positive']:,}", f"{one['tokens'] / one['sentences']:.1f}",
             str(one["longest"])) for part, one in data["parts"].items()]
    return "\n".join([
        console.paragraph(f"{data['source']}: {report['base']['weights']:,} weights; {data['rated']:,} sentences, of which "
                          f"{data['clear']:,} have a clear rating"),
        console.table(("part", "sentences", "positive", "tokens each", "longest"), rows),
        *(console.paragraph(f"note: {note}", "  ") for note in notes)])


def sides_table(report):
    rows = []
    for record in report["sides"]:
        share = record["accuracy"]
        rows.append((NAMES[record["side"]], f"{100 * share:.1f} +- {100 * error_of(report, share):.1f}",
                     f"{record['trained']:,}", size_of(record["bytes"]), f"{record['seconds']:.0f}",
                     f"{record['cpu_seconds']:.0f}", memory_of(record)))
    header = ("trained", "% right", "numbers", "stored", "s", "CPU s", "peak")
    return f"{console.table(header, rows)}\n{sides_lesson(report)}"


def sides_lesson(report):
    test = report["data"]["parts"]["test"]["sentences"]
    text = (f"Right: of {test:,} held-out sentences, with the standard error of such a share. Stored: the adapter's file, else "
            "what was trained. Seconds with the evaluations of the training in them; peak: of the whole process.")
    checked = [record["reloaded"] for record in report["sides"] if "reloaded" in record]
    if checked:
        text += (f" Read from its file into a new model, an adapter gives the same logits up to "
                 f"{max(one['largest_difference'] for one in checked):.1e}, where the largest is "
                 f"{max(one['largest_logit'] for one in checked):.1f}.")
    return console.paragraph(text)


def compared(report):
    """The record whose mistakes are shown beside those of the frozen encoder: the one whose neighbours are."""
    return [record for record in report["sides"] if record["side"] in ("frozen", report.get("nearest", {}).get("side"))]


def mistakes_table(report):
    rows = []
    for record in report["sides"]:
        (tn, fp), (fn, tp) = record["confusion"]
        rows.append((NAMES[record["side"]], str(fp + fn), f"{fp} of {tn + fp}", f"{fn} of {fn + tp}"))
    return ("held-out sentences that are read wrong\n"
            + console.table(("trained", "mistakes", "negative as positive", "positive as negative"), rows))


def nearest_text(report):
    nearest = report["nearest"]
    lines = [console.paragraph(
        f"Of the {nearest['neighbours']} training sentences nearest to a held-out one, by the cosine of the tokens' means, "
        f"this share has its label: {percent(nearest['same_label_before'])} by the encoder as it came, "
        f"{percent(nearest['same_label_after'])} after training ({NAMES[nearest['side']]}; about 50 % is chance).")]
    for query in nearest["queries"]:
        lines.append("\n" + console.paragraph(f"{mark(query['label'])} {query['text']}", "  "))
        for when in ("before", "after"):
            lines += [console.paragraph(f"  {when:<6} {one['cosine']:.2f} {mark(one['label'])} {one['text']}", " " * 16)
                      for one in query[when]]
    return "\n".join(lines)


def mark(label):
    return "[+]" if label else "[-]"


# -- the pictures -----------------------------------------------------------------------------------------------------


def draw(report):
    """Write report.png and nearest.png; the lines to print at the end, also where matplotlib is missing."""
    first, last = report["sides"][0], (compared(report) or report["sides"])[-1]
    told = console.picture(report, title(report), (11, 8.6), 2, 2, [
        lambda axes: draw_accuracy(axes, report), lambda axes: draw_losses(axes, report),
        lambda axes: draw_confusion(axes, first), lambda axes: draw_confusion(axes, last)])
    more = console.picture(report, nearest_title(report), (11, 8), 1, 1, [lambda axes: draw_nearest(axes, report)],
                           "nearest.png")
    return told if "matplotlib" in told else told + more.rpartition("report.json")[2]


def plain(axes, text):
    axes.set_title(text, fontsize=13)
    axes.spines[["top", "right"]].set_visible(False)


def draw_accuracy(axes, report):
    sides = report["sides"]
    for i, record in enumerate(sides):
        share, error = 100 * record["accuracy"], 100 * error_of(report, record["accuracy"])
        axes.errorbar([share], [i], xerr=[error], fmt="o", color=COLOURS[record["side"]], markersize=9, capsize=5, linewidth=2)
        axes.annotate(f"{share:.1f} %   {record['trained']:,} numbers, {size_of(record['bytes'])}, {record['seconds']:.0f} s",
                      (share, i), xytext=(0, 12), textcoords="offset points", ha="center", fontsize=10.5)
    axes.set_yticks(range(len(sides)), [NAMES[record["side"]] for record in sides], fontsize=11)
    axes.set_ylim(len(sides) - 0.5, -0.7)
    shares = [100 * record["accuracy"] for record in sides]
    middle, width = (min(shares) + max(shares)) / 2, max(6.0, 1.4 * (max(shares) - min(shares)))
    axes.set_xlim(middle - width, middle + width)
    axes.set_xlabel("% of the held-out sentences read right\n(bars: the standard error)", fontsize=11)
    axes.set_xticks([tick for tick in axes.get_xticks() if middle - width <= tick <= min(100, middle + width)])
    axes.grid(True, axis="x", alpha=0.3)
    plain(axes, "What training a few numbers is worth")


def draw_losses(axes, report):
    for record in report["sides"]:
        steps, losses = zip(*record["losses"])
        colour, end = COLOURS[record["side"]], record["steps"]
        axes.plot([100 * step / end for step in steps], losses, color=colour, linewidth=1, alpha=0.55)
        if record["evaluations"]:
            axes.plot([100 * one[0] / end for one in record["evaluations"]], [one[1] for one in record["evaluations"]], "o-",
                      color=colour, markersize=6, linewidth=2, label=f"{NAMES[record['side']]}, validation")
    axes.set_xlabel("% of the training", fontsize=11)
    axes.set_ylabel("cross-entropy (log 2 = 0.69: guessing)", fontsize=11)
    axes.set_ylim(0.0, 0.85)
    axes.grid(True, alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, loc="lower left")
    plain(axes, "Losses: batches (thin) and validation (dots)")


def draw_confusion(axes, record):
    counts = record["confusion"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            axes.text(j, i, f"{count}\n{percent(shares[i][j])}", ha="center", va="center", fontsize=13,
                      color="white" if shares[i][j] > 0.6 else BLACK)
    axes.set_xticks((0, 1), LABELS, fontsize=11)
    axes.set_yticks((0, 1), LABELS, fontsize=11)
    axes.set_xlabel("read as", fontsize=11)
    axes.set_ylabel("rated", fontsize=11)
    axes.set_title(f"{NAMES[record['side']]}: {percent(record['accuracy'])} right", fontsize=13)


def nearest_title(report):
    nearest = report["nearest"]
    return (f"The training sentences nearest to held-out ones. Of {nearest['neighbours']}, with the same label: "
            f"{percent(nearest['same_label_before'])} before, {percent(nearest['same_label_after'])} after")


def draw_nearest(axes, report):
    """A table: for each sentence its nearest before at the left, after at the right, in the colour of their label."""
    axes.set_axis_off()
    queries = report["nearest"]["queries"]
    rows = max(1, sum(2 + max(len(query["before"]), len(query["after"])) for query in queries))
    axes.set(xlim=(0, 1), ylim=(rows + 0.6, -1.2))
    colour = {0: ORANGE, 1: BLUE}
    for x, words in ((0.0, "before"), (0.5, f"after ({NAMES[report['nearest']['side']]})")):
        axes.text(x, -0.7, words, fontsize=13, fontweight="bold")
    for x, label in ((0.75, 0), (0.87, 1)):
        axes.text(x, -0.7, f"{mark(label)} {LABELS[label]}", fontsize=11, color=colour[label])
    row = 0.4
    for query in queries:
        axes.text(0.0, row, f"{mark(query['label'])} {query['text']}", fontsize=12, fontweight="bold",
                  color=colour[query["label"]])
        for x, when in ((0.0, "before"), (0.5, "after")):
            for i, one in enumerate(query[when], 1):
                axes.text(x, row + i, f"{one['cosine']:.2f} {mark(one['label'])} {shortened(one['text'])}", fontsize=10,
                          color=colour[one["label"]])
        row += 2 + len(query["before"])


def shortened(text, most=60):
    return text if len(text) <= most else text[:most - 3].rstrip() + "..."
