"""What check_gradients.py says and draws: texts, report.json, report.png. Nothing is checked here."""

import math

from . import console
from .colours import BLUE, DARK, GREEN, ORANGE

LEGEND = """
The hand-written gradients are compared with four oracles.
Shown is the largest relative difference.
  complex step    Im L(p + ih) / h with h = 1e-30: the definition of the
                  derivative, exact to rounding
  plain ops       the same layer composed from products, transposes and sums:
                  the engine's chain rule
  merged weight   G = dL/d(W + s B A), then dA = s B^T G and dB = s G A^T
  NumPy sums      the sums of the derivation, index by index, without the engine"""

EPS = 2.0 ** -52
SMALLEST = 1e-17  # where an error of exactly 0 is drawn on a logarithmic axis


def taylor_record(taylor):
    return {"passed": taylor.passed, "slope": taylor.slope, "note": taylor.note, "h": list(taylor.h),
            "R": list(taylor.R), "slopes": list(taylor.slopes)}


def title(report):
    c = report["config"]
    dropout = f", dropout {c['lora_dropout']:g}" if c["lora_dropout"] else ""
    return (f"LoRA gradients: {c['n']} rows, {c['d_in']} inputs, {c['d_out']} outputs, rank {c['r']}, "
            f"s = {report['scaling']:g}{dropout}, {report['dtype']} on {report['device']}, seed {c['seed']}")


def error_table(record, leaves, tolerance):
    oracles = list(record["errors"]["dA"])
    rows = []
    for name in ("dA", "dB", "dx", "dW", "db"):
        errors = [record["errors"][name][oracle] for oracle in oracles]
        rows.append((name, str(leaves[name].shape), *(f"{e:.1e} {'ok' if e <= tolerance else 'NO'}" for e in errors)))
    return "\n\n".join([console.table(("gradient", "shape", *oracles), rows), *record["complaints"]])


def taylor_table(report):
    columns = {"random point": report["start"]["taylor"], "after Adam": report["trained"]["taylor"]}
    rows = []
    for i, h in enumerate(report["start"]["taylor"]["h"]):
        row = [f"2^{round(math.log2(h))}"]
        for taylor in columns.values():
            slope = taylor["slopes"][i - 1] if i else math.nan
            row += [f"{taylor['R'][i]:.2e}", "-" if math.isnan(slope) else f"{slope:.3f}"]
        rows.append(row)
    table = console.table(("h", "R, random point", "slope", "R, after Adam", "slope"), rows)
    verdicts = "; ".join(f"{name}: {'ok' if taylor['passed'] else 'NO'}, {taylor['note']}"
                         for name, taylor in columns.items())
    return ("R(h) = |L(p + h v) - L(p) - h <g, v>|; p: all of x, W, b, A, B; v: a random\n"
            "direction. If g is right, halving h divides R by 4: slope 2. If it is wrong,\n"
            f"a part of it remains and R is only halved: slope 1.\n{table}\n{console.paragraph(verdicts)}")


def planted_text(planted):
    lines = []
    for leaf, name in (("lora_A", "dA"), ("lora_B", "dB")):
        for where, guess in planted["guesses"][leaf].items():
            lines.append(f"  {name} with {where + ':':<10} {'noticed:' if guess else 'not noticed'}")
            lines += [console.paragraph(f"      {guess}", "      ")] if guess else []
    taylor = planted["taylor"]
    comment = ", too: too small an update to show here" if taylor["passed"] else " instead of 2"
    lines.append(f"  Taylor slope:      {taylor['slope']:.2f}{comment}")
    lines.append("At B = 0, where training starts, the right formula and the wrong one both give\n"
                 "dA = 0, so that a check there proves nothing about dA.")
    return "\n".join(lines)


def verdict(report):
    if not report["passed"]:
        return "FAILED: see the lines above."
    errors = [e for part in ("start", "trained") for row in report[part]["errors"].values() for e in row.values()]
    return (f"PASSED in {report['seconds']:.1f} s: {len(errors)} comparisons agree to {max(errors):.1e} (allowed "
            f"{report['tolerance']:g}),\nthe Taylor slopes are right, and the planted mistake was noticed.")


def draw(report):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    return console.picture(report, title(report), (11, 5.8), 1, 2, [
        lambda axes: draw_curves(axes, report["curves"]), lambda axes: draw_taylor(axes, report)])


def draw_curves(axes, curves):
    """The V of the differences: on its right the step is too large, on its left rounding takes over."""
    for name, label, colour, marker, size in (
            ("forward", "forward difference  (L(h) - L(0)) / h", ORANGE, "s", 4),
            ("complex", "complex step  Im L(ih) / h", GREEN, "^", 7),  # below the next one: to the right they coincide
            ("central", "central difference  (L(h) - L(-h)) / 2h", BLUE, "o", 4)):
        errors = [max(error, SMALLEST) for error in curves[name]]
        axes.plot(curves["h"], errors, marker + "-", color=colour, markersize=size, linewidth=1, label=label)
    for power, name, colour, side in ((1 / 2, "h = eps^(1/2) ", ORANGE, "right"),
                                      (1 / 3, " h = eps^(1/3)", BLUE, "left")):
        axes.axvline(EPS ** power, color=colour, linewidth=1, linestyle=":")
        axes.text(EPS ** power, SMALLEST / 60, name, color=colour, fontsize=10, ha=side)
    axes.text(1e-13, 1e-8, "rounding:\ngrows as eps / h", color=DARK, fontsize=11, ha="center")
    axes.text(1e-5, 3e-1, "grows as h", color=DARK, fontsize=11)
    axes.text(1e-3, 1e-11, "grows as\nh squared", color=DARK, fontsize=11)
    axes.text(1e-13, 1e-14, "nothing is subtracted:\nany small h will do", color=DARK, fontsize=11, ha="center")
    axes.set(xscale="log", yscale="log", ylim=(SMALLEST / 200, 1e8),
             xlabel="step h (errors of exactly 0 are drawn at 1e-17)", ylabel="relative error of the derivative")
    axes.set_title("Finite differences have a best step h,\nthe complex step needs none")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=10, loc="upper right", framealpha=1.0)


def draw_taylor(axes, report):
    """What the gradient leaves unexplained: falling as h squared if it is right, as h if not."""
    right, wrong = report["trained"]["taylor"], report["planted"]["taylor"]
    h = right["h"]
    for taylor, power, colour, marker, label in ((wrong, 1, ORANGE, "s", "dA and dB doubled on purpose"),
                                                 (right, 2, BLUE, "o", "the hand-written gradient")):
        axes.plot(h, [max(R, SMALLEST) for R in taylor["R"]], marker, color=colour, markersize=7, label=label)
        line = [taylor["R"][-1] * (step / h[-1]) ** power for step in h]
        axes.plot(h, [max(R, SMALLEST) for R in line], "-", color=colour, linewidth=1, label=f"slope {power}")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="step h", ylabel="R(h) = |L(p + h v) - L(p) - h <g, v>|")
    axes.set_title("Taylor test: R falls as h squared\nonly if the gradient is right")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=10, loc="upper left")
