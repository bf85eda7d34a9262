"""What a GPU machine is, whether what was foreseen about it holds, and what one call costs.

    python tests/benchmarks/gpu_doctor.py                    ends with exit code 1 and a sentence if the GPU cannot be used
    python tests/benchmarks/gpu_doctor.py --device cpu       the same questions to NumPy: shows that the script runs

The answers explain failures of the tests (docs/gpu.md), the costs explain the times of a step: host is what Python and CuPy
take to queue a call, both is host and card together, each from an idle card.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minilora  # noqa: E402 (found by the line above)


def facts(xp):
    """Names and versions, each asked by itself: what one CuPy does not know is no reason to lose the others."""
    asked = {"NumPy": lambda: numpy.__version__, "Python": platform.python_version}
    if xp is not numpy:
        runtime = xp.cuda.runtime
        asked |= {"card": lambda: card(runtime.getDeviceProperties(0)), "driver": driver, "CuPy": lambda: xp.__version__,
                  "CUDA": lambda: f"driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}, "
                                  f"NVRTC {'.'.join(map(str, xp.cuda.nvrtc.getVersion()))}",
                  "accelerators": lambda: f"{xp._core.get_reduction_accelerators()} for reductions (1 is CUB)"}
    return {name: answer(ask) for name, ask in asked.items()}


def card(properties):
    name, memory = properties["name"].decode(), properties["totalGlobalMem"] / 2**30
    return (f"{name}, {memory:.0f} GiB, {properties['multiProcessorCount']} multiprocessors, "
            f"compute capability {properties['major']}.{properties['minor']}")


def driver():
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    return f"{said} (version, highest clock, power limit)"


def questions(xp):
    """name -> (what was foreseen, how to ask). Nothing was asked of a card before."""
    def zeros(*shape):
        return xp.zeros(shape, "float32")

    def gemm(n, k, m):
        return xp.cublas.gemm("N", "N", zeros(n, k), zeros(k, m), out=zeros(n, m), alpha=1.0, beta=1.0).shape

    def recorded_product():
        stream = xp.cuda.Stream(non_blocking=True)
        x = xp.ones((4, 4), "float32")
        with stream:
            x @ x
            stream.begin_capture()
            try:
                return (x @ x).shape
            finally:
                stream.end_capture()

    def own_products():
        from minilora.kernels.cublas import products
        return f"yes: {products.load()._name}" if hasattr(xp, "products") else f"no: {products.load()}"

    def bias_in_a_product():
        x, y = xp.ones((64, 64), "float32"), xp.empty((64, 64), "float32")
        xp.products.gemm(x, x, y, bias=x[0])
        taken = any(xp.products.fused_plans.values())
        return f"yes: {xp.products.light.library._name}" if taken else f"no: {xp.products.light}"

    return {
        "products by the own binding": ("yes", own_products),
        "a bias inside of a product": ("yes", bias_in_a_product),
        "cublas.gemm without rows": ("refuses: minilora does not ask", lambda: gemm(0, 2, 3)),
        "cublas.gemm with k = 0": ("refuses: minilora does not ask", lambda: gemm(3, 0, 2)),
        "dot without rows": ("works", lambda: xp.dot(zeros(0, 2), zeros(2, 3)).shape),
        "clip of complex numbers": ("TypeError", lambda: xp.clip(xp.ones(2, "complex128"), -1.0, 1.0)),
        "(-2 + 1e-20j)^3, imaginary part": ("not 1.2e-19", lambda: (xp.asarray([-2 + 1e-20j]) ** 3).imag.item()),
        "shares_memory of two 0-d arrays": ("wrongly True", lambda: xp.shares_memory(xp.asarray(1.0), xp.asarray(2.0))),
        "smallest float32 times 1": ("0: subnormals are flushed", lambda: (xp.asarray([1e-45], "float32") * 1.0).item()),
        "a product while a stream records": ("NotImplementedError", recorded_product),
    }


def answer(ask):
    try:
        return str(ask())
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def calls(xp, device):
    """Single calls of the main job's step: 128 x 1001 by 1001 x 1000, rank 1."""
    from minilora.optim.adam import adam_update
    rng = numpy.random.default_rng(0)
    x, W, y, A, B = (minilora.to_device(rng.standard_normal(shape, dtype="float32"))
                     for shape in ((128, 1001), (1000, 1001), (128, 1000), (1, 1001), (1000, 1)))
    flat = [minilora.to_device(rng.random(2001, dtype="float32")) for _ in range(4)]
    z, rows, one = xp.dot(x, A.T), numpy.arange(128), xp.ones((), "float32")
    on_device, adam = minilora.to_device(rows), device.resolve(adam_update)
    return {
        "y + y": lambda: y + y, "0-d array times a number": lambda: one * 0.5, "empty_like": lambda: xp.empty_like(y),
        "sum of all": lambda: y.sum(), "sum of rows": lambda: y.sum(axis=-1),
        "dot of 128,000": lambda: y.reshape(-1) @ y.reshape(-1),
        "x W^T": lambda: xp.dot(x, W.T), "x A^T, thin": lambda: xp.dot(x, A.T),
        "add_matmul of rank 1": lambda: minilora.backend.add_matmul(y, z, B.T, 0.5),
        "rows of x": lambda: x[on_device], "128 indices to the device": lambda: minilora.to_device(rows),
        "Adam on 2,001 numbers": lambda: adam(*flat, 0.9, 0.999, size=1e-3, eps=1e-8, keep=1.0),
    }


def cost(call, repeat, few=50):
    """Microseconds of one call: for the host alone, and for host and device. `few` calls do not fill the queue."""
    def spent(n):
        minilora.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            call()
        host = time.perf_counter() - start
        minilora.synchronize()
        return 1e6 * host / n, 1e6 * (time.perf_counter() - start) / n

    spent(few // 5)
    host = statistics.median(spent(few)[0] for _ in range(repeat))
    return round(host, 1), round(spent(few * repeat)[1], 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", metavar="FILE", help="also write all answers to FILE")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        device = minilora.use(options.device).__enter__()
    except minilora.errors.DeviceError as error:
        sys.exit(str(error))
    found = {"facts": facts(device.xp), "answers": {}, "microseconds": {}}
    found["facts"]["first use"] = f"{time.perf_counter() - started:.1f} s from the question to the first product"
    for name, value in found["facts"].items():
        print(f"{name + ':':<12}{value}")
    print(f"\nmicroseconds of one call{'':<14}host    both")
    for name, call in calls(device.xp, device).items():
        found["microseconds"][name] = cost(call, *((1, 5) if options.quick else (10,)))
        print("  {:<34}{:>8}{:>8}".format(name, *found["microseconds"][name]), flush=True)
    print("\nquestion, what was foreseen, the answer")
    for name, (foreseen, ask) in questions(device.xp).items():
        found["answers"][name] = {"foreseen": foreseen, "answer": answer(ask)}
        print(f"  {name:<34}{foreseen:<32}{found['answers'][name]['answer']}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
