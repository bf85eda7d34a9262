"""GPU: NVIDIA's library of matrix products, found, loaded, and told the arguments of its functions."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

from . import light

__all__ = ["KINDS", "check", "load", "load_light"]

_i, _p, _n = ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong
KINDS: dict[str, list[Any]] = {
    "cublasSetStream_v2": [_p, _p],
    "cublasSetWorkspace_v2": [_p, _p, ctypes.c_size_t],
    "cublasGemmEx": [_p, _i, _i, _i, _i, _i, _p, _p, _i, _i, _p, _i, _i, _p, _p, _i, _i, _i, _i],
    "cublasGemmStridedBatchedEx": [_p, _i, _i, _i, _i, _i, _p, _p, _i, _i, _n, _p, _i, _i, _n, _p, _p, _i, _i, _n, _i, _i, _i],
}


def found(library: str) -> Any:
    """A library that CuPy uses on this machine: as CuPy finds it, or one of that name that the system knows."""
    names = [f"lib{library}.so.13", f"lib{library}.so.12"]
    with suppress(ImportError, OSError, RuntimeError):  # pathfinder's own error is a RuntimeError
        from cuda.pathfinder import load_nvidia_dynamic_lib

        names.insert(0, load_nvidia_dynamic_lib(library).abs_path)
    for name in filter(None, names):
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError(f"no {library}: neither CuPy's pathfinder nor the system finds {' or '.join(names)}")


def declared(library: Any, kinds: dict[str, list[Any]]) -> Any:
    for name, listed in kinds.items():
        getattr(library, name).argtypes = listed
    return library


def load() -> Any:
    """cuBLAS, told the arguments of its functions; OSError if there is none, AttributeError if it lacks a function."""
    return declared(found("cublas"), KINDS)


def load_light() -> Any:
    """cublasLt, likewise; None if there is none: then a bias is added by a launch of its own."""
    with suppress(OSError, AttributeError):
        return declared(found("cublasLt"), light.KINDS)
    return None


def check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"cuBLAS: {call} returned the status {status} (cublasStatus_t)")
