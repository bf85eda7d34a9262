"""``minilora doctor``: what is here, what works, and what to install where it does not."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from .options import add_json
from .output import bytes_text, say, show, table
from .terms import CHECK_FAILED, OK

__all__ = ["EPILOG", "EXTRAS", "add_arguments", "run"]

EPILOG = """example:
  minilora doctor
  minilora doctor --device cpu --disk --json"""

# extra: (the packages that it brings, what for). Either of the packages in one text will do.
EXTRAS = {
    "models": ("ml_dtypes safetensors tokenizers", "bfloat16 numbers, tokenizers"),
    "gguf": ("gguf", "adapters for llama.cpp"),
    "demos": ("matplotlib scikit-learn", "pictures, and data of the demos"),
    "mpi": ("mpi4py mpich", "training in several processes"),
    "gpu13": ("cupy-cuda13x|cupy-cuda12x", "the GPU (gpu12: CUDA 12)"),
}
ALONE = {"jinja2": "chat templates", "tqdm": "progress bars"}  # used where they are there, in no extra
WRITTEN = 64 << 20  # bytes of --disk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu", "auto"), default="auto",
                        help="gpu: its failing is an error; cpu: do not probe a GPU, which may take seconds (default: auto)")
    parser.add_argument("--disk", action="store_true", help="write 64 MB into the current folder, and take the time")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import backend

    gpu = [] if args.device == "cpu" else gpu_steps()
    works = bool(gpu) and gpu[-1]["problem"] is None
    device = "gpu" if works else "cpu"
    say(args, f"checking a gradient on the {device} ...")
    gradient = self_test(device)
    report = {"versions": versions(), "blas": blas(), "kernels": backend.kernels(), "gpu": {"usable": works, "steps": gpu},
              "tf32": backend.tf32(), "extras": extras(), "disk": disk(args.disk), "gradient": gradient}
    show(args, report, text_of(report))
    return OK if gradient["passed"] and (works or args.device != "gpu") else CHECK_FAILED


def versions() -> dict[str, str]:
    import numpy

    from ..release import __version__

    return {"minilora": __version__, "Python": platform.python_version(), "NumPy": numpy.__version__,
            "system": platform.platform(), "processor": processor()}


def processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def blas() -> dict[str, Any]:
    import numpy

    from ..blas import threads

    built = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": built.get("name", "?"), "version": built.get("version", "?"), "threads": threads(), "cores": cores}


def gpu_steps() -> list[dict[str, Any]]:
    from ..probe import gpu_steps as probed

    return [{"step": name, "problem": problem} for name, problem in probed()]


def extras() -> dict[str, dict[str, str | None]]:
    """The version of every optional package, or None. Nothing is imported."""
    found = {extra: {name: _version(name) for name in packages.split()} for extra, (packages, _) in EXTRAS.items()}
    return {**found, "": {name: _version(name) for name in ALONE}}


def _version(names: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for name in names.split("|"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def disk(measure: bool) -> dict[str, Any]:
    """Room in the current folder; and, if asked for, how fast it takes 64 MB to the disk."""
    folder = Path.cwd()
    speed = None
    if measure:
        block = os.urandom(1 << 20)  # not zeros, which some disks do not write
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".minilora-doctor-") as file:
            start = time.perf_counter()
            for _ in range(WRITTEN >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - start)
    return {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free, "bytes_per_second": speed}


def self_test(device: str) -> dict[str, Any]:
    """The gradient of a low-rank update beside its numerical one."""
    import numpy

    from .. import lora, ops, testing, use

    rng = numpy.random.default_rng(0)
    x, W, b, A, B = (rng.standard_normal(shape) for shape in ((4, 6), (5, 6), (5,), (2, 6), (5, 2)))
    with use(device):
        found = testing.gradcheck(lambda x, W, b, A, B: ops.silu(lora.lora_linear(x, W, b, A, B, 0.5)), x, W, b, A, B)
    return {"device": device, "passed": found.passed, "error": found.error, "tolerance": found.rtol, "text": str(found)}


def text_of(report: dict[str, Any]) -> str:
    b, d, g = report["blas"], report["disk"], report["gradient"]
    threads = "threads unknown" if b["threads"] is None else f"{b['threads']} threads"
    speed = "" if d["bytes_per_second"] is None else f", writes {bytes_text(d['bytes_per_second'])} a second"
    kernels_text = ("on: they stand in for some operations (MINILORA_KERNELS=off switches them off)" if report["kernels"]
                    else "off: only the reference operations run (MINILORA_KERNELS=on switches kernels on)")
    products_text = ("in TF32 on a GPU: 10 bits of a factor count (MINILORA_TF32=off: true float32)"
                     if report["tf32"] else "in true float32 (MINILORA_TF32=on: in TF32 on a GPU)")
    rows = [*report["versions"].items(), ("BLAS", f"{b['name']} {b['version']}, {threads} on {b['cores']} cores"),
            ("kernels", kernels_text), ("products", products_text),
            ("disk", f"{bytes_text(d['free_bytes'])} free in {d['folder']}{speed}"),
            ("gradient", f"{'right' if g['passed'] else 'WRONG'} on the {g['device']}: error {g['error']:.1e}, allowed "
                         f"{g['tolerance']:.0e}")]
    wide = max(len(name) for name, _ in rows)
    lines = [f"{name:<{wide}}  {value}" for name, value in rows]
    if not g["passed"]:
        lines += [g["text"]]
    if report["gpu"]["steps"]:
        lines += ["", table(["GPU", ""], [(s["step"], "works" if s["problem"] is None else "fails")
                                          for s in report["gpu"]["steps"]], (0, 1))]
        lines += [s["problem"].replace("GPU asked for, but", "no GPU:") for s in report["gpu"]["steps"] if s["problem"]]
    return "\n".join([*lines, "", *extras_lines(report["extras"])])


def extras_lines(found: dict[str, dict[str, str | None]]) -> list[str]:
    rows = []
    for extra, packages in found.items():
        for name, version in packages.items():
            install, purpose = (f"'minilora[{extra}]'", EXTRAS[extra][1]) if extra else (name, ALONE[name])
            rows.append((name.partition("|")[0], version or "-", "" if version else f"pip install {install}  for {purpose}"))
    return table(["package", "version", ""], rows, (0, 1, 2)).split("\n")
