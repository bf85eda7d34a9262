"""Why the GPU cannot be used: four probes, cheapest first, and one sentence for each failure."""

from __future__ import annotations

import os
import warnings

__all__ = ["gpu_problem", "gpu_steps"]


def gpu_problem() -> str | None:
    """Why the GPU cannot be used, in one sentence with the cure; None if it can.

    The last of the steps that `gpu_steps` tells.
    """
    return gpu_steps()[-1][1]


def gpu_steps() -> list[tuple[str, str | None]]:
    """Four probes, cheapest first, up to the first that fails: the name of each, and None or one sentence with the cure.

    The package, the driver, the CUDA libraries, one real kernel and product. Only the last creates a CUDA context, which takes
    seconds and some hundred MB of device memory. A warning is shown and is no failure, not even under ``-W error``.
    """
    steps: list[tuple[str, str | None]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for name, probe in PROBES:
            steps.append((name, probe()))
            if steps[-1][1] is not None:
                break
    return steps


def _package() -> str | None:
    try:
        import cupy  # noqa: F401
    except Exception as error:  # not only ImportError: a CuPy built for another NumPy fails in other ways
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return ("GPU asked for, but CuPy is not installed: python -m pip install 'minilora[gpu13]' "
                    "(or gpu12 for a driver of CUDA 12)")
        return f"GPU asked for, but CuPy is installed and does not import: {_one_line(error)}. Install it afresh"
    return None


def _driver() -> str | None:
    import cupy

    try:
        if not cupy.cuda.is_available():
            return ("GPU asked for, but no NVIDIA driver or no GPU is visible: nvidia-smi should list one "
                    "(CUDA_VISIBLE_DEVICES=" + os.environ.get("CUDA_VISIBLE_DEVICES", "unset") + ")")
    except Exception as error:  # CuPy before 14 raises where it now answers False
        return f"GPU asked for, but the driver cannot be asked: {_one_line(error)}"
    return None


def _libraries() -> str | None:
    import cupy

    try:
        import cupy.cublas
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # ImportError, or CuPy's own DynamicLibNotFoundError
        return ("GPU asked for, but CUDA libraries are missing: python -m pip install 'minilora[gpu13]' "
                f"brings them ({_one_line(error)})")
    return None


def _kernel() -> str | None:
    import cupy

    try:
        two = cupy.ones((2, 2), dtype="float32") + 1.0
        if cupy.asnumpy(two @ two).tolist() != [[8.0, 8.0], [8.0, 8.0]]:
            return "GPU asked for, but it computed 2 x 2 ones wrongly: do not trust this device or its driver"
    except Exception as error:  # any failure of the real kernel means that this GPU cannot be used
        return f"GPU present but not usable: {_one_line(error)}"
    return None


PROBES = (("the package CuPy", _package), ("driver and card", _driver), ("CUDA libraries", _libraries),
          ("one kernel and product", _kernel))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
