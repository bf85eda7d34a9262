"""What rank_analysis.py says and draws: texts, report.json, report.png. Nothing is measured here."""

from minilora import lora

from . import console
from .colours import BLUE, GREEN, GREY, ORANGE

# Hu et al. 2021, arXiv 2106.09685, table 7: W_q of the 48th layer of GPT-3, adapted to WikiSQL; ||W_q||_F = 61.95.
PAPER = (  # r, ||D||_F, then ||U^T W V||_F with the directions of D, of W itself, and random ones
    (4, 6.91, 0.32, 21.67, 0.02),
    (64, 3.57, 1.90, 37.71, 0.33),
)
PAPER_WEIGHT = 61.95
PAPER_SAYS = ("The paper (section 7.2; GPT-3, r = 8 and 64): the top direction of both ranks is shared, with phi > 0.5 for one "
              "dimension, most of the others are not; and two seeds of r = 64 share more of W_q than of W_v.")
SIDES = ("A", "V")
SYMBOLS = {"query": "W_q", "value": "W_v"}


def title(report):
    c = report["config"]
    what = "three small adapters of a tiny random model" if c["quick"] else "three adapters of a real model"
    return f"Section 7 of the LoRA paper, on {what}"


def ranks(report):
    return report["adapters"]["small"]["r"], report["adapters"]["large"]["r"]


def adapters_table(report):
    rows = []
    for name, words in (("small", "small"), ("large", "large"), ("again", "large, another seed")):
        one = report["adapters"][name]
        rows += [((words, f"{one['s']:g}", SYMBOLS[weight]), mine) for weight in SYMBOLS
                 if (mine := [row for row in one["updates"] if row["weight"] == weight])]
    return f"means over the layers\n{lora.analysis_table('ranks', rows, ('adapter', 's', 'of'))}"


def similarity_table(report):
    r, R = ranks(report)
    pairs = [("small_large", f"r = {r} in r = {R}"), ("two_seeds", f"r = {R}, two seeds")]
    rows = []  # of both sides: the figures of either go under the name that the table reads
    for pair, words in pairs:
        for side in SIDES:
            for weight in SYMBOLS:
                mine = [{"similarity": {"V": one[pair][side]}} for one in report["similarities"] if one["weight"] == weight]
                rows += [((words, side_of(side), SYMBOLS[weight]), mine)] if mine else []
    lead = console.paragraph(f"phi: what share of the top i directions of one lies in all {R} of the other, or, of two seeds, "
                             "in its top i; means over the layers; in brackets: of random matrices")
    table = lora.analysis_table("similarity", rows, ("directions", "of", "in"))
    return f"{lead}\n{table}\n{console.paragraph(PAPER_SAYS)}"


def phi(grid, i, j):
    """phi(i, j), of as many directions as there are."""
    return grid[min(i, len(grid)) - 1][min(j, len(grid[0])) - 1]


def amplification_table(report):
    rows = [((f"{one['layer']}, {SYMBOLS[one['weight']]}",), [{"amplification": one[name]}])
            for one in report["amplification"] for name in ("small", "large")]
    for r, norm, own, weight, random in PAPER:
        figures = {"r": r, "update_norm": norm, "along_update": own, "along_weight": weight, "along_random": random}
        rows.append((("paper: 48, W_q",), [{"amplification": {**figures, "factor": norm / own}}]))
    small, large = ([one[name]["factor"] for one in report["amplification"]] for name in ("small", "large"))
    r, R = ranks(report)
    above, below = (middle([one["small"]["along_update"] / one["small"][key] for one in report["amplification"]])
                    for key in ("along_random", "along_weight"))
    lesson = ("of D, of W, random: ||U^T W V||_F with the directions of D, of W itself, and random ones; factor: ||D||_F over "
              f"the first. In the middle it is {middle(small):.1f} at r = {r} and {middle(large):.1f} at r = {R}. In the "
              f"directions of D, at r = {r}, W has {above:.1f} times what it has in random ones, and {below:.2f} times what it "
              "has in its own. Paper: Hu et al. 2021, arXiv 2106.09685, table 7, W_q of layer 48 of GPT-3, where ||W||_F = "
              f"{PAPER_WEIGHT}: another model, task and length of training; compare the pattern, not the figures.")
    return f"{lora.analysis_table('amplification', rows)}\n{console.paragraph(lesson)}"


def middle(values):
    return sorted(values)[len(values) // 2]


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(report):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    layer, (r, R) = report["config"]["layer"], ranks(report)
    here = {one["weight"]: one for one in report["similarities"] if one["layer"] == layer}
    panels, random = [], []
    for side in SIDES:
        for weight in SYMBOLS:
            one = here.get(weight) or next(iter(here.values()))
            panels.append(heat(one["small_large"][side]["grid"], f"{named(side, one)}: r = {r} against {R}", r, R))
        one = here.get("query") or next(iter(here.values()))
        panels.append(heat(one["two_seeds"][side]["grid"], f"{named(side, one)}: r = {R}, two seeds", R, R))
        random.append(heat(one["two_seeds"][side]["random"], f"{side_of(side)} of random matrices, r = {R}", R, R))
    panels += [*random, lambda axes: draw_factors(axes, report), lambda axes: draw_spectra(axes, report),
               lambda axes: draw_lines(axes, report, "small_large"), lambda axes: draw_lines(axes, report, "two_seeds")]
    return console.picture(report, f"{title(report)}\nphi(i, j) in layer {layer}: 0 (nothing shared) to 1 (contained)",
                           (11, 13.5), 4, 3, panels)


def side_of(side):
    return {"A": "A", "V": "D"}[side]


def named(side, one):
    return f"{side_of(side)} of {SYMBOLS[one['weight']]}"


def heat(grid, text, rows, columns):
    def panel(axes):
        axes.imshow(grid, cmap="viridis", vmin=0.0, vmax=1.0, origin="lower", aspect="auto", interpolation="nearest",
                    extent=(0.5, len(grid[0]) + 0.5, 0.5, len(grid) + 0.5))
        axes.set_xlabel("j", fontsize=11)
        axes.set_ylabel("i", fontsize=11)
        axes.set_title(text, fontsize=12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        most = max(map(max, grid))
        axes.text(0.97, 0.05, f"phi(1, 1) = {grid[0][0]:.2f}, largest {most:.2f}", transform=axes.transAxes, ha="right",
                  fontsize=10, color="black", bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"})
    return panel


def draw_factors(axes, report):
    r, R = ranks(report)
    records = report["amplification"]
    for name, colour, rank in (("small", ORANGE, r), ("large", BLUE, R)):
        for weight, marker in (("query", "o"), ("value", "s")):
            mine = [one for one in records if one["weight"] == weight]
            axes.plot([one["layer"] for one in mine], [one[name]["factor"] for one in mine], marker + "-", color=colour,
                      markerfacecolor=colour if weight == "query" else "white", label=f"{SYMBOLS[weight]}, r = {rank}")
    for rank, norm, own, _, _ in PAPER:
        axes.axhline(norm / own, color=GREY, linestyle="--", linewidth=1)
        axes.text(0.02, norm / own, f"paper, r = {rank}: {norm / own:.1f}", transform=axes.get_yaxis_transform(), va="bottom",
                  fontsize=9.5)
    axes.set_yscale("log")
    axes.margins(y=0.35)  # room for the legend
    axes.set_xticks(sorted({one["layer"] for one in records}))
    axes.set_xlabel("layer", fontsize=11)
    axes.set_title("Amplification: ||D|| / ||U^T W V||", fontsize=12)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9.5)


def draw_spectra(axes, report):
    r, R = ranks(report)
    for name, colour, rank in (("small", ORANGE, r), ("large", BLUE, R)):
        for weight, line in (("query", "-"), ("value", "--")):
            mine = [row for row in report["adapters"][name]["updates"]
                    if row["weight"] == weight and row["layer"] == report["config"]["layer"]]
            for row in mine:
                values = [value for value in row["singular_values"] if value > 0]
                axes.plot(range(1, len(values) + 1), values, line, color=colour, marker=".",
                          label=f"{SYMBOLS[weight]}, r = {rank}")
    axes.set(xscale="log", yscale="log", xlabel="j")
    axes.set_title(f"Singular values of D, layer {report['config']['layer']}", fontsize=12)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9.5)


def draw_lines(axes, report, pair):
    """phi of the top i in all, or in the top i, of the other: the mean over the layers, against chance."""
    r, R = ranks(report)
    for side, colour in (("A", GREEN), ("V", BLUE)):
        for weight, line in (("query", "-"), ("value", "--")):
            mine = [one[pair][side] for one in report["similarities"] if one["weight"] == weight]
            if not mine:
                continue
            count = min(len(one["grid"]) for one in mine)
            for key, width in (("grid", 2.0), ("random", 0.8)):
                values = [sum(phi(one[key], i, R if pair == "small_large" else i) for one in mine) / len(mine)
                          for i in range(1, count + 1)]
                axes.plot(range(1, count + 1), values, line, color=colour if key == "grid" else GREY, linewidth=width,
                          label=f"{side_of(side)} of {SYMBOLS[weight]}" if key == "grid" else None)
    axes.set_ylim(0.0, 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("top i directions", fontsize=11)
    axes.set_title(f"Share of them in all {R} of r = {R}" if pair == "small_large" else "Share in the top i of the other seed",
                   fontsize=12)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9.5, title="thin grey: random matrices")
