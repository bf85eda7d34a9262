"""What qlora.py says and draws: texts, report.png. Nothing is trained or measured here."""

from . import console
from .colours import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, YELLOW
from .film_reviews import data_text, error_of, memory_of, plain, size_of

__all__ = ["NAMES", "data_text", "draw", "memory_table", "sides_table", "title"]

NAMES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8, a scale a row", "nf4": "NF4, double scales",
         "loftq": "NF4, LoftQ"}

COLOURS = {"float32": BLACK, "bfloat16": BLUE, "int8": SKY, "nf4": ORANGE, "loftq": GREEN}


def title(report):
    c = report["config"]
    return (f"QLoRA: adapters of rank {c['r']} beside frozen weights of few bits, {c['epochs']:g} epochs of batches of "
            f"{c['batch_size']}, on {report['device']}, seed {c['seed']}")


def bits(record):
    return 8 * record["weight_bytes"] / record["weights"]


def sides_table(report):
    first = report["sides"][0]["step_seconds"]
    rows = []
    for record in report["sides"]:
        share = record["accuracy"]
        rows.append((NAMES[record["side"]], f"{100 * share:.1f} +- {100 * error_of(report, share):.1f}",
                     f"{record['loss']:.4f}", f"{1000 * record['step_seconds']:.1f} ms",
                     f"{record['step_seconds'] / first:.2f}", memory_of(record)))
    header = ("weights held as", "% right", "loss", "a step", "ratio", "peak")
    test = report["data"]["parts"]["test"]["sentences"]
    return console.table(header, rows) + "\n" + console.paragraph(
        f"Right, and the cross-entropy, of {test:,} held-out sentences; behind +- the standard error of such a share. A step: "
        f"the median, and its ratio to the first line's. Peak: of the whole process.")


def memory_table(report):
    rows = [(NAMES[record["side"]], f"{bits(record):.3f}", size_of(record["weight_bytes"]), size_of(record["other_bytes"]),
             size_of(record["trained_bytes"]), f"{100 * record['error']:.2f} %", f"{100 * record['start_distance']:.2f} %")
            for record in report["sides"]]
    header = ("weights held as", "bits each", "linear", "other", "trained", "off", "logits off")
    count = report["sides"][0]["weights"]
    return console.table(header, rows) + "\n" + console.paragraph(
        f"Linear: the {count:,} frozen weights of the linear layers. Other: embeddings, norms and biases, in float32. Off: "
        "||Q + s B A - W|| / ||W|| before the training, a mean over the layers, and the same of the logits of some sentences.")


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(report):
    """Write report.png; the lines to print at the end, also where matplotlib is missing."""
    return console.picture(report, title(report), (11, 8.8), 2, 2, [
        lambda axes: draw_accuracy(axes, report), lambda axes: draw_memory(axes, report),
        lambda axes: draw_losses(axes, report), lambda axes: draw_start(axes, report)])


def sides_axis(axes, report):
    sides = report["sides"]
    axes.set_yticks(range(len(sides)), [NAMES[record["side"]] for record in sides], fontsize=11)
    axes.set_ylim(len(sides) - 0.4, -0.8)


def draw_accuracy(axes, report):
    shares = [100 * record["accuracy"] for record in report["sides"]]
    errors = [100 * error_of(report, record["accuracy"]) for record in report["sides"]]
    for i, (record, share, error) in enumerate(zip(report["sides"], shares, errors)):
        axes.errorbar([share], [i], xerr=[error], fmt="o", color=COLOURS[record["side"]], markersize=9, capsize=5, linewidth=2)
        axes.annotate(f"{share:.1f} %   loss {record['loss']:.3f}   {1000 * record['step_seconds']:.0f} ms a step", (share, i),
                      xytext=(0, 12), textcoords="offset points", ha="center", fontsize=10.5)
    sides_axis(axes, report)
    middle, width = (min(shares) + max(shares)) / 2, max(4.0 * max(errors), 1.4 * (max(shares) - min(shares)), 2.0)
    axes.set_xlim(middle - width, middle + width)
    axes.set_xlabel("% of the held-out sentences read right\n(bars: the standard error)", fontsize=11)
    axes.set_xticks([tick for tick in axes.get_xticks() if middle - width <= tick <= min(100, middle + width)])
    axes.grid(True, axis="x", alpha=0.3)
    plain(axes, "The same training")


def draw_memory(axes, report):
    for i, record in enumerate(report["sides"]):
        left = 0.0
        for key, colour in (("weight_bytes", COLOURS[record["side"]]), ("other_bytes", GREY), ("trained_bytes", YELLOW)):
            axes.barh([i], [record[key] / 1e6], left=left, color=colour, height=0.55)
            left += record[key] / 1e6
        axes.annotate(f"{bits(record):.2f} bits a linear weight", (left, i), xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=10.5)
    sides_axis(axes, report)
    most = max(record["weight_bytes"] + record["other_bytes"] + record["trained_bytes"] for record in report["sides"]) / 1e6
    axes.set_xlim(0.0, 2.0 * most)
    axes.set_xlabel("MB: linear weights; embeddings and norms (grey);\ntrained (yellow)", fontsize=11)
    plain(axes, "What the model takes")


def draw_losses(axes, report):
    for record in report["sides"]:
        steps, losses, _ = zip(*record["evaluations"])
        axes.plot(steps, losses, "o-", color=COLOURS[record["side"]], markersize=6, linewidth=2, alpha=0.85,
                  label=NAMES[record["side"]])
    axes.set_xlabel("steps", fontsize=11)
    axes.set_ylabel("cross-entropy on the validation part", fontsize=11)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=10)
    plain(axes, "Losses")


def draw_start(axes, report):
    for i, record in enumerate(report["sides"]):
        axes.barh([i - 0.16, i + 0.16], [100 * record["error"], 100 * record["start_distance"]], height=0.3,
                  color=[COLOURS[record["side"]], GREY])
        axes.annotate(f"weights {100 * record['error']:.2f} %, logits {100 * record['start_distance']:.2f} %",
                      (100 * max(record["error"], record["start_distance"]), i), xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=10.5)
    sides_axis(axes, report)
    most = max(max(record["error"], record["start_distance"]) for record in report["sides"])
    axes.set_xlim(0.0, max(1e-9, 250 * most))
    axes.set_xlabel("% off before training: weights with adapters;\nlogits (grey)", fontsize=11)
    plain(axes, "What quantising takes")
