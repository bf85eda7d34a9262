"""What rank_sweep.py says and draws: texts, report.json, report.png. Nothing is trained or measured here."""

from . import console
from .colours import BLUE, DARK, GREEN, ORANGE, PINK

RULES = ("alpha / r", "alpha / sqrt(r)")


def title(report):
    c = report["config"]
    return (f"Rank sweep: {c['n']:,} rows, {c['d_in']} inputs, {c['d_out']} outputs, true rank {c['k']}, "
            f"noise {c['noise']:g}, {report['dtype']} on {report['device']}, seed {c['seed']}")


def count(steps):
    return "never" if steps is None else str(steps)


def task_text(report):
    task, k = report["task"], report["config"]["k"]
    values = [f"{value:.3g}" for value in task["singular_values"][:k]]
    if len(values) > 8:
        values[4:-2] = ["..."]
    return (f"singular values of D*:         {'  '.join(values)}, then 0: its rank is {k}\n"
            f"floor of the loss, noise^2:    {task['floor']:.6g}, which nothing beats on fresh data\n"
            f"loss of the frozen W alone:    {task['frozen']['fresh_loss']:.6g}")


def rank_table(report):
    c, task = report["config"], report["task"]
    frozen = {"best_" + kind: loss for kind, loss in task["frozen"].items()}
    whole = {"best_training_loss": task["least_squares"]["training_loss"], "best_fresh_loss": task["floor"]}
    records = [{"r": 0, "trained": 0, **task["frozen"], **frozen}, *report["ranks"],
               {"r": "all", "trained": task["weights"], **task["least_squares"], **whole}]
    rows = []
    for record in records:
        row = [str(record["r"]), f"{record['trained']:,}", f"{record['scaling']:.3g}" if "scaling" in record else "-"]
        for kind in ("training_loss", "fresh_loss"):
            loss, best = record[kind], record["best_" + kind]
            row += [f"{loss:.6f}", f"{best:.6f}", f"{loss / best:.4f}"]
        rows.append(row)
    header = ("r", "trained", "s", "training", "best", "ratio", "fresh", "best", "ratio")
    return (f"{c['steps']} steps of Adam each, s = {c['lora_alpha']:g} / r. The loss on the training data and on\n"
            "fresh data; best: by the SVD, of all updates of rank r; ratio: loss / best.\n"
            "r = 0: W as it is. all: every weight trained, by least squares.\n"
            f"{console.table(header, rows)}\n{rank_lesson(report)}")


def rank_lesson(report):
    k, records = report["config"]["k"], {record["r"]: record for record in report["ranks"]}
    true, most = records[k], records[max(records)]
    text = f"At the true rank, r = {k}, LoRA is {above(true, 'fresh_loss'):.1%} above the floor on fresh data."
    if most is not true:
        times = most["trained"] / true["trained"]
        text += (f" Past it, only noise is left to fit: r = {most['r']} trains {times:.1f} times as many numbers "
                 f"and is {above(most, 'fresh_loss'):.1%} above the floor.")
    text = console.paragraph(text)
    late = [str(record["r"]) for record in records.values() if not arrived(report, record)]
    if late:
        text += "\n" + console.paragraph(f"r = {', '.join(late)} did not come within {report['close'] - 1.0:.0%} of the best "
                                         "training loss: try more --steps, or a smaller --lr.")
    return text


def above(record, kind):
    """How much a loss is above the best of its rank, relative to it."""
    return record[kind] / record["best_" + kind] - 1.0


def arrived(report, record):
    return above(record, "training_loss") <= report["close"] - 1.0


def alpha_table(report):
    rows = [(f"{record['lora_alpha']:g}", f"{record['scaling']:g}", count(record["steps_to_halfway"]),
             count(record["steps_to_best"]), f"{max(record['curve']):.3f}",
             f"{record['training_loss'] / record['best_training_loss']:.4f}") for record in report["alphas"]]
    header = ("alpha", "s = alpha / r", "halfway", within(report), "highest loss", "last / best")
    c, twin = report["config"], report["twin"]
    lesson = ("Adam moves every entry of A and B by about lr a step, whatever s is. So D = s B A grows like s (lr t)^2 "
              "in t steps, once A has outgrown its start: 4 times alpha is worth twice the learning rate. Exactly so, "
              f"but for Adam's eps, if A starts smaller, too: alpha {twin['lora_alpha']:g} with lr and the first A halved has "
              f"the curve of alpha {c['lora_alpha']:g}, with a relative difference of {twin['difference']:.1e} at most.")
    return f"{steps_text(report)}\n{console.table(header, rows)}\n{console.paragraph(lesson)}"


def steps_text(report):
    return (f"halfway: steps from the loss of W alone halfway to the best possible;\n"
            f"{within(report)}: steps to within {report['close'] - 1.0:.0%} of the best")


def within(report):
    return f"within {report['close'] - 1.0:.0%}"


def close(report):
    return f"to within {report['close'] - 1.0:.0%} of the best"


def rule_table(report):
    by_rank = {}
    for record in report["rules"]:
        by_rank.setdefault(record["r"], []).extend(
            [f"{record['scaling']:.3g}", count(record["steps_to_halfway"]), count(record["steps_to_best"])])
    header = ["r"]
    for rule in RULES:
        header += [rule, "halfway", within(report)]
    return (f"alpha = {report['config']['lora_alpha']:g}; s by either rule, and steps, "
            f"the median of {report['repeats']} draws of A\n"
            + console.table(header, [(str(r), *cells) for r, cells in by_rank.items()]) + "\n"
            "Under Adam the r terms of B A add up, so that alpha / r gives every rank the\n"
            "same speed at first, and alpha / sqrt(r) makes a large one faster. To finish is\n"
            "another matter: see the columns on the right.")


def init_table(report):
    rows = []
    for record in report["inits"]:
        first, last = ([curve[i] for curve in record["curves"]] for i in (0, -1))
        rows.append((record["init"], spread(first, ".3f"), count(record["steps_to_halfway"]),
                     counts(record["all_steps_to_best"]), spread(last, ".6f")))
    header = ("start", "first loss", "halfway", within(report), "last loss")
    return (f"{report['repeats']} draws of A and B; halfway: the median\n{console.table(header, rows)}\n"
            "One of the two should be 0, or the layer does not start as W. But not both:\n"
            "dB = s dy^T (x A^T) is 0 where A is 0, and dA = s (dy B)^T x is 0 where B is 0,\n"
            "so that neither would ever move.")


def counts(steps):
    """Those of several draws; once, where they are the same."""
    texts = list(map(count, steps))
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def spread(values, form):
    ends = [format(min(values), form), format(max(values), form)]
    return "..".join(ends) if ends[0] != ends[1] else ends[0]


def draw(report):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    panels = [lambda axes, panel=panel: panel(axes, report) for panel in (draw_ranks, draw_alphas, draw_rules, draw_inits)]
    return console.picture(report, title(report), (11, 9), 2, 2, panels)


def draw_ranks(axes, report):
    k, floor, records = report["config"]["k"], report["task"]["floor"], report["ranks"]
    ranks = [record["r"] for record in records]
    axes.axvspan(k, 2 * max(ranks), color=DARK, alpha=0.1, linewidth=0)
    axes.axhline(floor, color=DARK, linewidth=1, linestyle="--", label=f"the floor: noise^2 = {floor:g}")
    axes.plot(ranks, [record["best_fresh_loss"] for record in records], "-", color="black", linewidth=1.5,
              label="the best that rank r can do, by the SVD")
    axes.plot(ranks, [record["fresh_loss"] for record in records], "s", color=ORANGE, markersize=8,
              label="LoRA, fresh data")
    axes.set(xscale="log", yscale="log", xlabel=f"rank r (grey: past the true rank {k})", ylabel="mean squared error")
    axes.set_xticks(ranks, map(str, ranks))
    axes.minorticks_off()
    axes.set_xlim(min(ranks) / 1.15, max(ranks) * 1.15)
    axes.set_ylim(floor / 12, 2 * report["task"]["frozen"]["fresh_loss"])  # room for the legend below
    all_arrived = all(arrived(report, record) for record in records)
    axes.set_title(f"{'LoRA reaches the best loss of its rank:' if all_arrived else 'The loss of every rank:'}\n"
                   f"nothing is gained past {k}")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="lower left", fontsize=10)
    past = [record for record in records if record["r"] >= k]
    if len(past) > 1:
        draw_past(axes.inset_axes((0.59, 0.42, 0.39, 0.46)), past, floor)
        axes.text(0.76, 0.9, f"{'it learns noise:' if all_arrived else ''}\n% above the floor",
                  transform=axes.transAxes, fontsize=10, ha="center")


def draw_past(axes, past, floor):
    """What the logarithmic axis hides: past the true rank, one loss falls because the other rises."""
    ranks = [record["r"] for record in past]
    for kind, colour, marker, name, height in (("fresh_loss", ORANGE, "s", "fresh data", 0.87),
                                               ("training_loss", BLUE, "o", "training data", 0.05)):
        axes.plot(ranks, [100.0 * (record[kind] / floor - 1.0) for record in past], marker + "-", color=colour,
                  markersize=5, linewidth=1)
        axes.text(0.05, height, name, color=colour, fontsize=10, transform=axes.transAxes)
    axes.axhline(0.0, color="black", linewidth=1)
    axes.set_xticks(ranks, map(str, ranks))
    axes.tick_params(labelsize=9)
    axes.margins(y=0.3)  # room for the names


def draw_alphas(axes, report):
    from matplotlib import colormaps
    records = report["alphas"]
    for i, record in enumerate(records):
        axes.plot(record["curve"], color=colormaps["viridis"](0.9 - 0.9 * i / len(records)), linewidth=1.8,
                  label=f"{record['lora_alpha']:g}")
    twin = report["twin"]
    axes.plot(range(0, len(twin["curve"]), 10), twin["curve"][::10], "o", markerfacecolor="none",
              markeredgecolor="black", markersize=5, label=f"{twin['lora_alpha']:g}, but lr and\nthe first A halved")
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    shown = max((record["steps_to_best"] or len(record["curve"]) for record in records))
    axes.set_xlim(-0.02 * shown, min(1.1 * shown, len(twin["curve"])))
    axes.set_title(f"alpha is a kind of learning rate (r = {records[0]['r']})")
    axes.grid(True, alpha=0.3)
    axes.legend(title="alpha", fontsize=10, loc="upper right")


def draw_rules(axes, report):
    ranks = sorted({record["r"] for record in report["rules"]})
    for rule, colour, marker in ((RULES[0], BLUE, "o"), (RULES[1], ORANGE, "s")):
        for key, line, name in (("steps_to_best", "-", close(report)), ("steps_to_halfway", "--", "to halfway")):
            steps = [record[key] for record in report["rules"] if record["rule"] == rule]
            axes.plot(ranks, [float("nan") if step is None else step for step in steps], marker + line, color=colour,
                      markersize=7, markerfacecolor=colour if line == "-" else "none", label=f"s = {rule}, {name}")
    axes.set(xscale="log", xlabel="rank r", ylabel=f"steps, the median of {report['repeats']} draws of A")
    axes.set_xticks(ranks, map(str, ranks))
    axes.minorticks_off()
    top = max((record["steps_to_best"] or 0 for record in report["rules"]))
    axes.set_ylim(0, 1.5 * max(top, 1))  # room for the legend
    axes.set_title(rule_title(report))
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=10, loc="upper left")


def rule_title(report):
    """What the rules do to the steps from the smallest to the largest rank, if both have arrived there."""
    ends = [[record["steps_to_best"] for record in report["rules"] if record["rule"] == rule] for rule in RULES]
    if not all(steps[0] and steps[-1] for steps in ends):
        return "Steps that a rank needs, by the rule for s"
    slow, fast = (steps[-1] / steps[0] for steps in ends)
    most, least = (f(record["r"] for record in report["rules"]) for f in (max, min))
    return (f"From r = {least} to {most} the steps grow {slow:.1f} times\n"
            f"with alpha / r, {fast:.1f} times with alpha / sqrt(r)")


def draw_inits(axes, report):
    for record, colour in zip(report["inits"], (BLUE, GREEN, ORANGE, PINK, "black")):
        for i, curve in enumerate(record["curves"]):
            axes.plot(curve, color=colour, linewidth=1.3, label=record["init"] if i == 0 else None)
    arrived = [step for record in report["inits"] for step in record["all_steps_to_best"] if step is not None]
    axes.set_xlim(-0.02 * max(arrived, default=1), 1.3 * max(arrived, default=len(curve)))
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    axes.set_title("A and B both 0 never train;\none of them random is enough")
    axes.grid(True, alpha=0.3)
    axes.legend(title=f"start ({report['repeats']} draws each)", fontsize=10, loc="center right")
