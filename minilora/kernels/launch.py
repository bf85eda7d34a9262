"""CUDA: the texts of the kernels, and how one is started.

CuPy is imported when a kernel is first started, so that the texts can be listed and compiled on a machine without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from ..ops import erf

__all__ = ["NULL", "OPTIONS", "by_block", "by_element", "by_kept_row", "by_row", "contiguous", "has_kernel", "sources"]

Array = Any

TYPES = {"f": "float", "d": "double"}  # dtype.char -> the T of the texts; other dtypes take the reference
RANKS = 1, 2, 4, 8, 16  # a text that names RANK is compiled for each: low_rank_8 and so on
NULL = numpy.uint64(0)  # a pointer to nothing; None would do, since CuPy 14.2
THREADS = 256
MOST_THREADS = 1024  # of one block: CUDA's limit, and MAX_THREADS of block.cuh
KEPT, MOST_KEEPING = 64, 256  # of block.cuh: the bytes that a thread keeps of a row, and the most threads where it does
# Without the second, NVRTC joins a product and a sum into one operation that rounds once: g - mean(g) with g = dy w, one number
# a row, was then what the rounding of dy w had lost, in the place of 0 (seen on an H100; LayerNorm over one column). All
# kernels wait for memory, not for arithmetic.
OPTIONS = ("--std=c++17", "--fmad=false")
BLOCKS = 4096  # enough to fill any card; the kernels stride over what is left


def sources() -> dict[str, str]:
    """The CUDA C text of every module, by name: what the compile tests hand to NVRTC."""
    texts, here = {}, Path(__file__).parent / "cuda"
    shared = (here / "block.cuh").read_text(encoding="utf-8")
    for path in sorted(here.glob("*.cu")):
        text = path.read_text(encoding="utf-8").replace('#include "block.cuh"\n', shared)
        kinds = {f"{path.stem}_{rank}": f"#define RANK {rank}\n" for rank in RANKS} if "RANK" in text else {path.stem: ""}
        for name, rank in kinds.items():
            for T in TYPES.values():
                texts[f"{name}_{T}"] = f"#define T {T}\n{rank}{_constants(T)}" + text.replace("_T(", f"_{T}(")
    return texts


def _constants(T: str) -> str:
    """The table of ops/erf.py, as the macros PHI_P(t), PHI_Q(t) and PHI_END; and LOWEST, the least finite number."""
    lines = [f"#define LOWEST {float(numpy.finfo(T.replace('float', 'single')).min)!r}\n"]
    for name, coefficients in zip("PQ", erf.SINGLE if T == "float" else erf.DOUBLE):
        horner = f"T({coefficients[-1]!r})"
        for c in coefficients[-2::-1]:
            horner = f"(T({c!r}) + (t) * {horner})"
        lines.append(f"#define PHI_{name}(t) {horner}\n")
    return "".join(lines) + f"#define PHI_END {erf.END!r}\n"


@functools.cache
def kernel(text: str, name: str, T: str) -> Any:
    """The function `name` of a .cu text, for one type. Compiled when first asked for."""
    import cupy

    return cupy.RawModule(code=sources()[f"{text}_{T}"], options=OPTIONS).get_function(f"{name}_{T}")


def _start(text: str, name: str, dtype: Any, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
    if not blocks:
        return
    number = dtype.type
    typed = tuple([number(a) if isinstance(a, float) else NULL if a is None else a for a in arguments])
    kernel(text, name, TYPES[dtype.char])((min(BLOCKS, blocks),), (threads,), typed)


def by_element(text: str, name: str, n: int, dtype: Any, *arguments: Any) -> None:
    """Start a kernel of which every thread computes elements by itself.

    Parameters
    ----------
    text, name : str
        The .cu file, and the kernel's name without its type.
    n : int
        Elements; nothing is started for 0.
    dtype : numpy.dtype
        float32 or float64.
    *arguments
        In the order of the text. Arrays must be C-contiguous. Python floats are passed as `dtype`, ints as 64-bit (so CuPy
        takes them), None as a null pointer, NumPy's scalars as what they are.
    """
    _start(text, name, dtype, -(-n // THREADS), THREADS, arguments)


def by_block(text: str, name: str, blocks: int, threads: int, dtype: Any, *arguments: Any) -> None:
    """Start a kernel whose blocks, of so many threads, stride over units of their own; else as `by_element`."""
    _start(text, name, dtype, blocks, threads, arguments)


def threads_of(D: int, numbers: int = 4, most: int = MOST_THREADS) -> int:
    """The threads of a block that computes a row of D numbers, up to so many of them a thread while there are threads.

    They depend on nothing else, so that the order of a sum, and with it every bit, is the same on every card.
    """
    threads = 32
    while threads < most and numbers * threads < D:
        threads *= 2
    return threads


def by_row(name: str, R: int, D: int, dtype: Any, *arguments: Any, text: str = "rows") -> None:
    """Start a kernel of rows.cu on R rows of D numbers: R and D follow the arguments. A block computes one row at a time."""
    _start(text, name, dtype, R, threads_of(D), (*arguments, R, D))


def by_kept_row(text: str, name: str, R: int, D: int, dtype: Any, *arguments: Any) -> None:
    """`by_row` for a kernel of any text that keeps the numbers of a row in registers, the Row of block.cuh."""
    _start(text, name, dtype, R, threads_of(D, KEPT // dtype.itemsize, MOST_KEEPING), (*arguments, R, D))


def has_kernel(x: Array, *others: Array) -> bool:
    """Whether kernels are made for x: float32 or float64, like the others, and not empty (there the reference is as fast)."""
    if x.dtype.char not in TYPES or not x.size:
        return False
    for a in others:
        if a.dtype != x.dtype:
            return False
    return True


def contiguous(xp: Any, *arrays: Array | None) -> list[Any]:
    """Each array itself where its memory is in C order, else a copy; None for None."""
    return [a if a is None or a.flags.c_contiguous else xp.ascontiguousarray(a) for a in arrays]
