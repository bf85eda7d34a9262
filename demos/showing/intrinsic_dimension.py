"""What intrinsic_dimension.py says and draws: texts, report.json, report.png. Nothing is trained or measured here."""

import statistics

from . import console
from .colours import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY
from .console import percent

COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
SURE = 2.0  # standard errors


def title(report):
    c = report["config"]
    return (f"Intrinsic dimension of reading shifted digits ({c['data']}), {c['method'].upper()}, Fastfood, "
            f"{c['steps']} steps, {c['seeds']} seeds, {report['dtype']} on {report['device']}, seed {c['seed']}")


def data_text(report):
    data = report["data"]
    rows = [(f"{data['pixels']} - {n['width']} - {n['width']} - 10", f"{n['weights']:,}") for n in report["networks"]]
    return (f"{data['train']:,} images to train on, {data['test']:,} held out\n"
            + console.table(("layers of the network", "weights"), rows))


def spread(values):
    """The mean, and the standard deviation where there are several."""
    text = f"{100.0 * statistics.mean(values):.1f}"
    return text if len(values) < 2 else f"{text} ± {100.0 * statistics.stdev(values):.1f}"


def scores_table(report):
    ds = sorted({d for record in report["records"] for d in record["d"]})
    shown = ds if len(ds) <= 5 else sorted({ds[0], ds[-1], *(ds[round(i * (len(ds) - 1) / 4)] for i in (1, 2, 3))})
    rows = []
    for record in report["records"]:
        known = dict(zip(record["d"], record["scores"]))
        rows.append((record["start"], f"{record['weights']:,}", f"{100 * statistics.mean(record['before']):.0f}",
                     *(f"{100 * statistics.mean(known[d]):.0f}" if d in known else "-" for d in shown), spread(record["full"])))
    header = ("start", "weights", "before", *(f"d={d}" for d in shown), "all weights")
    seconds = [statistics.mean(taken) for record in report["records"] if (taken := record["seconds"].get("subspace"))]
    took = f" A training in a subspace took {min(seconds):.1f} to {max(seconds):.1f} s." if seconds else ""
    return console.table(header, rows) + "\n" + console.paragraph(
        f"% of held-out digits read right, mean over {report['config']['seeds']} seeds (± standard deviation).{took}")


def d90_text(record):
    """The smallest d with 90 % of the score, for each seed."""
    if None in record["d90"]:
        return f"more than {record['d'][-1]}" if record["d"] else "-"
    low, high = min(record["d90"]), max(record["d90"])
    return f"{statistics.geometric_mean(record['d90']):.0f} ({low:.0f} to {high:.0f})"


def d90_table(report):
    rows = [(record["start"], f"{record['weights']:,}", d90_text(record),
             "-" if None in record["d90"] else percent(statistics.geometric_mean(record["d90"]) / record["weights"]))
            for record in report["records"]]
    lines = [console.table(("start", "weights", "d90 (over the seeds)", "of the weights"), rows)]
    return "\n".join([*lines, *(console.paragraph(lesson(report, start)) for start in report["summary"])])


def lesson(report, start):
    """Whether the larger network needs fewer, as far as these runs can tell."""
    found, words = report["summary"][start], f"From {start} weights: "
    if found is None:
        return words + "not to be said: there is one network only, or one did not come to 90 % with these d."
    change = (f"d90 is {found['smallest']:.0f} for the smallest network and {found['largest']:.0f} for the largest, "
              f"{found['doublings']:+.2f} doublings")
    if found["standard_error"] == float("inf"):
        return f"{words}{change}; with one seed nobody knows the spread."
    change += f" (standard error {found['standard_error']:.2f} over the seeds). "
    if abs(found["doublings"]) <= SURE * found["standard_error"]:
        return words + change + "The spread is too large to say that the larger one needs fewer, or more."
    fewer = found["doublings"] < 0
    return words + change + ("The larger network needs fewer numbers." if fewer else "The larger network needs MORE numbers.")


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(report):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    starts = list(report["summary"])
    return console.picture(report, title(report), (11, 4.6), 1, len(starts) + 1,
                           [*(curves(report, start) for start in starts), lambda axes: draw_d90(axes, report)])


def mine(report, start):
    return [record for record in report["records"] if record["start"] == start and record["d"]]


def curves(report, start):
    def panel(axes):
        for colour, record in zip(COLOURS, mine(report, start)):
            means = [100 * statistics.mean(scores) for scores in record["scores"]]
            axes.plot(record["d"], means, "o-", color=colour, markersize=4, label=f"{record['weights']:,} weights")
            axes.fill_between(record["d"], [100 * min(scores) for scores in record["scores"]],
                              [100 * max(scores) for scores in record["scores"]], color=colour, alpha=0.15, linewidth=0)
            axes.axhline(90 * statistics.mean(record["full"]), color=colour, linestyle=":", linewidth=1)
            if None not in record["d90"]:
                d90 = statistics.geometric_mean(record["d90"])
                axes.plot([d90], [90 * statistics.mean(record["full"])], "*", color=colour, markersize=15,
                          markeredgecolor="black", markeredgewidth=0.6)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylim(0, 102)
        axes.set_xlabel("d, numbers trained", fontsize=11)
        axes.set_ylabel("% of held-out digits read right", fontsize=11)
        axes.set_title(f"{start.capitalize()} weights; star: d90,\ndotted: 90 % of full training", fontsize=11)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=9, loc="lower right", title="shaded: over the seeds", title_fontsize=9)
    return panel


def draw_d90(axes, report):
    for colour, start in zip((GREY, BLUE), report["summary"]):
        records = [record for record in mine(report, start) if None not in record["d90"]]
        if not records:
            continue
        weights = [record["weights"] for record in records]
        axes.plot(weights, [statistics.geometric_mean(record["d90"]) for record in records], "*-", color=colour, markersize=13,
                  label=f"{start} weights")
        for record in records:
            axes.plot([record["weights"]] * len(record["d90"]), record["d90"], "o", color=colour, markersize=4, alpha=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    tops = [d90 for record in report["records"] for d90 in record["d90"] if d90 is not None]
    axes.set_ylim(1, 2 * max(tops, default=1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks([n["weights"] for n in report["networks"]], [f"{n['weights']:,}" for n in report["networks"]])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("weights of the network", fontsize=11)
    axes.set_ylabel("d90", fontsize=11)
    axes.set_title("Does the larger network\nneed fewer? Dots: seeds", fontsize=11)
    axes.grid(True, alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10)
