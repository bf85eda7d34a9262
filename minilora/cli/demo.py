"""``minilora demo``: a small training that shows what a low-rank update can do, in seconds; and where the larger ones are.

The task is y = W x, and W has changed by a matrix D of rank 4. The old weight is frozen, and updates of several ranks learn the
change from examples. No matrix of rank r is nearer to D than the first r terms of its SVD (Eckart and Young), so the rest,
the sum of the squares of the other singular values over the number of outputs, is the least loss that rank r can reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .options import add_device, add_json
from .output import progress, show, table
from .terms import OK, UsageError, nearest

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora demo
  minilora demo shift --steps 100"""

IN, OUT, RANK = 40, 30, 4  # of the change
RANKS = (1, 2, 4, 8)
BATCH = 64
RATE = 0.02
# Scripts of the source repository, which an installed package does not bring: they need matplotlib, and draw reports.
SCRIPTS = {
    "synthetic_shift": "a linear model, its task shifted, repaired by an update of rank 1",
    "check_gradients": "every gradient against four oracles, and a planted mistake",
    "digits_shift": "a classifier of handwritten digits, adapted to turned ones",
    "rank_sweep": "which rank a change needs",
    "attention_lora": "LoRA in a small attention model",
    "rank_analysis": "what adapters of several ranks and seeds have in common",
    "film_reviews": "a real sentence encoder on rated film reviews",
    "qlora": "the same fine-tuning on bases of 32, 16, 8 and 4 bits",
    "intrinsic_dimension": "how few numbers are enough, on images of digits",
    "image_styles": "a diffusion model of digits, and styles as adapters that are mixed",
    "characters": "a character model adapted to another text, and its generations",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="shift; without a name: what there is")
    parser.add_argument("--steps", metavar="N", type=int, default=300, help="of each training (default: 300)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of everything random (default: 0)")
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    scripts = {name: line for name, line in SCRIPTS.items() if script(name).is_file() or not folder().is_dir()}
    if args.name is None:
        listed = [{"name": "shift", "about": "updates of four ranks learn a change of rank 4, in seconds", "here": True}]
        listed += [{"name": name, "about": about, "here": script(name).is_file()} for name, about in scripts.items()]
        show(args, {"demos": listed}, list_text(listed))
        return OK
    if args.name in scripts:
        where = "" if script(args.name).is_file() else " of the source repository, which an installed package does not bring"
        raise UsageError(f"{args.name} is a script{where}. Run it: python {shown(script(args.name))}")
    if args.name != "shift":
        raise UsageError(f"there is no demo {args.name!r}{nearest(args.name, ['shift', *scripts])}. minilora demo lists them")
    if args.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {args.steps}")
    report = shift(args)
    show(args, report, shift_text(report))
    return OK


def folder() -> Path:
    """Where the scripts are, beside the package, if this is a copy of the source."""
    return Path(__file__).resolve().parents[2] / "demos"


def script(name: str) -> Path:
    return folder() / f"{name}.py"


def shown(path: Path) -> str:
    """A path as it is typed from here; of a script that is not there, as in the repository."""
    if not path.is_file():
        return f"demos/{path.name}"
    return relative(path)


def relative(path: Path) -> str:
    """A path as seen from the current folder, if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def list_text(listed: list[dict[str, Any]]) -> str:
    rows = [(demo["name"], demo["about"]) for demo in listed]
    here = any(demo["here"] for demo in listed[1:])
    where = f"the others are scripts: python {relative(script('NAME'))}" if here else \
        "the others are scripts of the source repository: python demos/NAME.py"
    return f"{table(('demo', 'about'), rows, (0, 1))}\n\nminilora demo shift runs the first; {where}"


def shift(args: argparse.Namespace) -> dict[str, Any]:
    """Learn the change of a weight by updates of several ranks."""
    import numpy

    from .. import nn, to_host, use
    from ..lora import adapt, delta

    rng = numpy.random.default_rng(args.seed)
    W = rng.standard_normal((OUT, IN)).astype("float32")
    u, v = (numpy.linalg.qr(rng.standard_normal((n, RANK)))[0] for n in (OUT, IN))
    sigma = numpy.array([8.0 / 2 ** j for j in range(RANK)])
    D = ((u * sigma) @ v.T).astype("float32")
    rows = []
    with use(args.device), progress(args, "steps", args.steps * len(RANKS)) as bar:
        for r in RANKS:
            layer = nn.Linear(IN, OUT, bias=False, rng=rng)
            layer.load_state_dict({"weight": W})
            adapted = adapt(layer, r=r, lora_alpha=r, rng=rng)
            learn(adapted, W + D, args.steps, rng, bar)
            found = to_host(delta(adapted.lora_A.data, adapted.lora_B.data, adapted.scaling))
            reached = float(((found - D) ** 2).sum() / OUT)
            rows.append({"r": r, "trained": r * (IN + OUT), "loss": reached, "least": float((sigma[r:] ** 2).sum() / OUT)})
    return {"change_rank": RANK, "sizes": {"in": IN, "out": OUT}, "steps": args.steps, "all_numbers": IN * OUT,
            "before": float((sigma ** 2).sum() / OUT), "ranks": rows}


def learn(layer: Any, target: Any, steps: int, rng: Any, bar: Any) -> None:
    """Fit the layer to y = target x on fresh examples."""
    from .. import ops, optim, tensor

    optimizer = optim.Adam([p for p in layer.parameters() if p.trainable], lr=RATE)
    for step in range(steps):
        x = rng.standard_normal((BATCH, IN)).astype("float32")
        optimizer.zero_grad()
        ops.mse(layer(tensor(x)), tensor(x @ target.T)).backward()
        optimizer.groups[0].settings["lr"] = RATE * (1.0 - step / steps)
        optimizer.step()
        bar.advance()


def shift_text(report: Mapping[str, Any]) -> str:
    rows = [(row["r"], f"{row['trained']:,}", f"{row['loss']:.5f}", f"{row['least']:.5f}") for row in report["ranks"]]
    size = report["sizes"]
    return "\n".join([
        f"A weight of {size['out']} x {size['in']} = {report['all_numbers']:,} numbers has changed by a matrix of rank "
        f"{report['change_rank']}.",
        f"The old weight is frozen; an update B A of rank r learns the change, {report['steps']} steps.",
        f"Loss before: {report['before']:.5f}", "",
        table(("rank r", "trained", "loss after", "least possible"), rows, ()), "",
        "Up to the rank of the change each rank helps as much as the SVD says it can; beyond it none does."])
