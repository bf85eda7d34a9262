"""``minilora gradcheck``: the hand-written gradients of low-rank updates against numerical ones, on this machine."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .options import add_device, add_json
from .output import say, show, table
from .terms import CHECK_FAILED, OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora gradcheck
  minilora gradcheck --in 64 --out 48 --rank 8 --only linear --dtype float32
exit code 3: a gradient is wrong"""

KINDS = ("linear", "dora", "embedding", "conv1d", "conv2d", "fused")
WITHIN = 64  # roundings: what a gradient in a lower precision may be off, as a whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--in", dest="n_in", metavar="N", type=int, default=7, help="inputs, or channels (default: 7)")
    add("--out", dest="n_out", metavar="N", type=int, default=6, help="outputs (default: 6)")
    add("--rank", metavar="N", type=int, default=2, help="of the update (default: 2)")
    add("--rows", metavar="N", type=int, default=5, help="of the batch (default: 5)")
    add("--alpha", metavar="X", type=float, default=3.0, help="s is alpha / r (default: 3)")
    add("--rslora", action="store_true", help="s is alpha / sqrt(r)")
    add("--only", metavar="KIND", choices=KINDS, action="append", help=f"{', '.join(KINDS)}; may be given again")
    add("--dora", action="store_true", help="the same as --only dora")
    add("--dtype", choices=("float32", "float16"), help="compare gradients in this precision with those in float64 too")
    add("--seed", metavar="N", type=int, default=0, help="of the point and the directions (default: 0)")
    add_device(parser)
    add_json(parser)


class Case(NamedTuple):
    """An operation at a point: a function of `inputs`, by their names."""

    f: Callable[..., Any]
    inputs: dict[str, Any]


def run(args: argparse.Namespace) -> int:
    import numpy

    from .. import use
    from ..lora import scaling

    if min(args.n_in, args.n_out, args.rank, args.rows) < 1:
        raise UsageError("--in, --out, --rank and --rows must be at least 1")
    s = scaling(args.alpha, args.rank, args.rslora)
    rows: list[dict[str, Any]] = []
    kinds = [*(args.only or []), *(["dora"] if args.dora else [])] or KINDS
    with use(args.device) as device:
        name = device.name
        for kind in dict.fromkeys(kinds):
            say(args, f"checking {kind} ...")
            rows += checked(kind, case_of(kind, args, s, numpy.random.default_rng(args.seed)), args)
    passed = all(row["passed"] for row in rows)
    report = {"passed": passed, "device": name, "s": s, "sizes": {"in": args.n_in, "out": args.n_out, "rank": args.rank,
              "rows": args.rows}, "checks": rows}
    show(args, report, text_of(report, args.dtype))
    return OK if passed else CHECK_FAILED


def case_of(kind: str, args: argparse.Namespace, s: float, rng: Any) -> Case:
    """An operation with random inputs: B too, for at B = 0 dA is 0 whatever the formula. The end is curved."""
    from .. import lora, ops
    from ..lora.gradients import convolution, dora, embedding, fused

    N, i, o, r, length = args.rows, args.n_in, args.n_out, args.rank, 5

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape)

    if kind == "linear":
        return Case(lambda x, W, b, A, B: ops.silu(lora.lora_linear(x, W, b, A, B, s)),
                    {"x": draw(N, i), "W": draw(o, i), "b": draw(o), "A": draw(r, i), "B": draw(o, r)})
    if kind == "dora":
        return Case(lambda W, A, B, m: ops.silu(dora.dora_scale(W, A, B, m, s, exact=True)),
                    {"W": draw(o, i), "A": draw(r, i), "B": draw(o, r), "m": draw(o) + 3.0})
    if kind == "embedding":
        ids = rng.integers(0, i, (N, 3))
        return Case(lambda W, A, B: ops.silu(embedding.lora_embedding(ids, W, A, B, s)),
                    {"W": draw(i, o), "A": draw(r, i), "B": draw(o, r)})
    if kind == "fused":
        return Case(lambda x, W, b, A, B: ops.silu(fused.lora_merged_linear(x, W, b, A, B, s, [True, False, True])),
                    {"x": draw(N, i), "W": draw(3 * o, i), "b": draw(3 * o), "A": draw(2 * r, i), "B": draw(2 * o, r)})
    axes = 1 if kind == "conv1d" else 2
    lora_conv = convolution.lora_conv1d if axes == 1 else convolution.lora_conv2d
    return Case(lambda x, W, b, A, B: ops.silu(lora_conv(x, W, b, A, B, s, padding=1)),
                {"x": draw(N, i, *[length] * axes), "W": draw(o, i, *[3] * axes), "b": draw(o), "A": draw(r, i, *[3] * axes),
                 "B": draw(o, r, *[1] * axes)})


def checked(kind: str, case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each gradient of a case."""
    import numpy

    from .. import testing

    inputs = list(case.inputs.values())
    found = testing.gradcheck(case.f, *inputs, rng=numpy.random.default_rng(args.seed + 1))
    ran = bool(found.rows)  # not where backward raised: then there are no numbers to compare
    taylor = testing.taylor_test(case.f, *inputs, rng=numpy.random.default_rng(args.seed + 2)) if ran else None
    slope = None if taylor is None else taylor.slope
    alone = taylor is not None and found.passed and not taylor.passed  # of all gradients: errors tell them apart
    lower = in_precision(case, args.dtype, args.seed + 3) if args.dtype and ran else {}
    rows = []
    for name, row in zip(case.inputs, found.rows):
        off = lower.get(name)
        near = off is None or off <= WITHIN * float(numpy.finfo(args.dtype).eps)
        rows.append({"kind": kind, "gradient": f"d{name}", "compared": row.compared, "error": row.error,
                     "tolerance": found.rtol, "slope": slope, "lower": off, "guess": row.guess,
                     "passed": row.passed and not alone and near})
    for check in found.checks:
        if not check.passed:
            rows.append({"kind": kind, "gradient": check.name, "compared": "", "error": None, "tolerance": found.rtol,
                         "slope": slope, "lower": None, "guess": check.detail, "passed": False})
    return rows


def in_precision(case: Case, dtype: str, seed: int) -> dict[str, float]:
    """|g - g64| / |g64| of each gradient, computed in a lower precision from the same rounded inputs."""
    import numpy

    from .. import Parameter, to_device, to_host

    low = {name: value.astype(dtype) for name, value in case.inputs.items()}
    gradients, cotangent = [], None
    for kind in (dtype, "float64"):
        leaves = {name: Parameter(to_device(value.astype(kind))) for name, value in low.items()}
        y = case.f(*leaves.values())
        if cotangent is None:
            cotangent = numpy.random.default_rng(seed).standard_normal(y.shape).astype(dtype)
        y.backward(to_device(cotangent.astype(kind)))
        gradients.append({name: to_host(leaf.grad).astype("float64") for name, leaf in leaves.items()})
    ours, right = gradients
    return {name: float(numpy.linalg.norm(ours[name] - right[name]) / (numpy.linalg.norm(right[name]) or 1.0)) for name in low}


def text_of(report: Mapping[str, Any], dtype: str | None) -> str:
    head: Sequence[str] = ("operation", "gradient", "compared", "error", "Taylor", *([f"in {dtype}"] if dtype else []), "")
    rows = []
    for row in report["checks"]:
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        lower = [] if not dtype else ["-" if row["lower"] is None else f"{row['lower']:.1e}"]
        slope = "-" if row["slope"] is None else f"{row['slope']:.3f}"
        rows.append((row["kind"], row["gradient"], row["compared"], error, slope, *lower,
                     "ok" if row["passed"] else "WRONG"))
    size = report["sizes"]
    lines = [f"in {size['in']}, out {size['out']}, rank {size['rank']}, {size['rows']} rows, s = {report['s']:.4g}, float64, "
             f"on the {report['device']}", "", table(head, rows, (0, 1, 2)), "",
             "error: of the worst element, or direction, beside a complex step; allowed: 1e-9",
             "Taylor: how fast the unexplained falls, for all gradients of an operation",
             "        together: slope 2 is right, and one wrong gradient gives 1"]
    wrong = [row for row in report["checks"] if not row["passed"]]
    for row in wrong:
        lines += textwrap.wrap(f"{row['kind']} {row['gradient']}: {row['guess']}", 79, break_on_hyphens=False,
                               subsequent_indent="    ") if row["guess"] else []
    return "\n".join([*lines, "all gradients are right" if report["passed"] else "A GRADIENT IS WRONG"])
