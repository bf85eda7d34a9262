"""Matrix products on a GPU: cuBLAS by plans, cublasLt with the bias inside, and CuPy's own, by the time of host and device.

Every side asks for a product 50 times while the card is busy with something longer, so that the host never waits and the card
never does: the host's time is that of the calls, the device's that between two events around them. Sides take turns, and the
medians of the rounds count. Of a product with a bias, the first side and CuPy add it by a launch of their own.

With --device cpu the stand-in takes the card's place: it shows that the script runs, and measures nothing.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy
from alternate import ROOT, arguments, show, table, write_json

sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parents[1])]

SIDES = "GemmEx", "Lt", "CuPy"
REPEATS = 50
SHAPES = [  # name, n, k, m, how the right one lies, beta, bias
    ("z = x A^T, r 1", 128, 1001, 1, "columns", 0.0, False),
    ("y += z B^T, r 1", 128, 1, 1000, "columns", 1.0, False),
    ("x W^T", 128, 1001, 1000, "columns", 0.0, False),
    ("z = x A^T, r 8", 4096, 768, 8, "columns", 0.0, False),
    ("y += z B^T, r 8", 4096, 8, 2304, "columns", 1.0, False),
    ("x W^T", 4096, 768, 2304, "columns", 0.0, False),
    ("x W^T + b", 4096, 768, 2304, "columns", 0.0, True),
    ("x W^T + b", 4096, 768, 768, "columns", 0.0, True),
    ("x W^T + b", 4096, 768, 3072, "columns", 0.0, True),
    ("x W^T + b", 4096, 3072, 768, "columns", 0.0, True),
    ("dx = dy W", 4096, 2304, 768, "rows", 0.0, False),
    ("x W^T + b, 1 x 128", 128, 768, 2304, "columns", 0.0, True),
]


def own_products(xp, cupy):
    """minilora's products, without cublasLt and through cublasLt wherever that can be."""
    from minilora.kernels.cublas.products import Products

    lower = xp.products.light.library if xp.products.light else None
    plain, through = Products(cupy, xp.products.library), Products(cupy, xp.products.library, lower)
    through.everything = True
    return plain, through


def calls(plain, through, cupy, n, k, m, lies, beta, biased):
    """One function for each side, that asks for the product once."""
    rng = numpy.random.default_rng(0)
    a, b, out, bias = (cupy.asarray(rng.standard_normal(shape).astype("float32") / 30)
                       for shape in ((n, k), (m, k) if lies == "columns" else (k, m), (n, m), (m,)))
    b, bias = b.T if lies == "columns" else b, bias if biased else None

    def by_cupy():
        if beta:
            cupy.add(out, cupy.matmul(a, b), out=out)
        else:
            cupy.matmul(a, b, out=out)
        if bias is not None:
            cupy.add(out, bias, out=out)

    found = {"GemmEx": lambda: plain.gemm(a, b, out, 1.0, beta, bias), "Lt": lambda: through.gemm(a, b, out, 1.0, beta, bias),
             "CuPy": by_cupy}
    through.fused_plans.clear()
    for call in found.values():
        call()
    if not any(through.fused_plans.values()):
        del found["Lt"]  # cublasLt has not taken it
    return found


def measured(call, cupy, busy):
    """Microseconds of the host, and of the device if there is one, for one product."""
    busy()
    start, stop = (cupy.cuda.Event() for _ in range(2))
    start.record()
    began = time.perf_counter()
    for _ in range(REPEATS):
        call()
    host = 1e6 * (time.perf_counter() - began) / REPEATS
    stop.record()
    stop.synchronize()
    on_card = hasattr(cupy.cuda, "get_elapsed_time")
    return host, 1e3 * cupy.cuda.get_elapsed_time(start, stop) / REPEATS if on_card else None


def occupied(cupy, quick):
    """A function that keeps the card busy for some milliseconds."""
    if quick:
        return lambda: None
    x = cupy.ones((4096, 4096), dtype="float32")
    y = cupy.empty_like(x)
    return lambda: [cupy.matmul(x, x, out=y) for _ in range(3)]


def compared(device, cupy, rounds, quick):
    """For each product the medians of all sides: {name: {side: (host, device)}}."""
    results, busy, own = {}, occupied(cupy, quick), own_products(device.xp, cupy)
    for name, n, k, m, *how in SHAPES:
        sizes = [min(size, 12) if quick else size for size in (n, k, m)]
        found, turns = calls(*own, cupy, *sizes, *how), {}
        for i in range(rounds):
            for side in list(found)[::-1 if i % 2 else 1]:
                turns.setdefault(side, []).append(measured(found[side], cupy, busy))
        results[f"{name}, {n} x {k} x {m}"] = {
            side: [None if None in column else statistics.median(column) for column in zip(*figures)]
            for side, figures in turns.items()}
    return results


def report(results):
    def cell(figures, which):
        return "" if figures is None or figures[which] is None else f"{figures[which]:.1f}"

    for which, title in enumerate(("host, us a product", "device, us a product")):
        rows = [[name, *(cell(sides.get(side), which) for side in SIDES)] for name, sides in results.items()]
        print("\n" + table([title, *SIDES], rows))


def card(cupy):
    runtime = cupy.cuda.runtime
    facts = runtime.getDeviceProperties(0)
    return {"GPU": facts["name"].decode(), "CuPy": f"{cupy.__version__}, CUDA runtime {runtime.runtimeGetVersion()}, driver "
                                                   f"{runtime.driverGetVersion()}",
            "TF32": f"CuPy {os.environ.get('CUPY_TF32', '0')}"}


def main():
    options = arguments(__doc__, rounds=7, devices=("gpu", "cpu")).parse_args()
    options.quick = options.quick or options.device == "cpu"
    rounds = 1 if options.quick else options.rounds
    import minilora

    if options.device == "cpu":
        import standin
        with standin.card() as device:
            facts, results = {"GPU": "none: the stand-in"}, compared(device, standin.xp, rounds, True)
    else:
        if problem := minilora.backend.gpu_problem():
            sys.exit(problem)
        import cupy
        with minilora.use("gpu") as device:
            if not hasattr(device.xp, "products"):
                sys.exit("minilora's own binding to cuBLAS is not in use: see python tests/benchmarks/gpu_doctor.py")
            facts, results = card(cupy), compared(device, cupy, rounds, options.quick)
    print(f"{__doc__.splitlines()[0]}\n\n{show(facts)}\n{rounds} rounds of {REPEATS} calls, medians")
    report(results)
    write_json(options, facts, {"products": results})


if __name__ == "__main__":
    main()
