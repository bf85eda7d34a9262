"""The thin products of a LoRA layer on one GPU: the kernels of low_rank.cu, and the chain of cuBLAS products they replace.

    python tests/benchmarks/bench_gpu_low_rank.py --json figures.json

The letters are those of lora/gradient.py. `device` is the time of one call within a CUDA graph of 50, `host` what Python takes
to queue one; both in microseconds, the median of some turns. What both sides share, x W^T and dy W, is in neither.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minilora  # noqa: E402
from minilora.backend import add_matmul  # noqa: E402
from minilora.kernels.gpu import low_rank as gpu_low_rank  # noqa: E402
from minilora.kernels.launch import by_element  # noqa: E402
from minilora.lora.gradient import LoRAUpdate, scaled  # noqa: E402

SHAPES = [(128, 1001, 1000), (512, 768, 2304), (4096, 768, 2304), (4096, 4096, 4096)]  # N, in, out
QUICK = [(128, 11, 10), (600, 12, 36)]
RANKS = 1, 8, 16
S = 2.0
REPEATS, TURNS = 50, 7


def drawn(N, n_in, n_out, r):
    rng = numpy.random.default_rng(0)
    shapes = dict(x=(N, n_in), b=(n_out,), A=(r, n_in), B=(n_out, r), y=(N, n_out), dy=(N, n_out), dx=(N, n_in))
    return {name: minilora.to_device(rng.standard_normal(shape).astype("float32")) for name, shape in shapes.items()}


def chain(xp, x, b, A, B, y, dy, dx):
    """Each part as the reference has it."""
    z, u = xp.dot(x, A.T), xp.dot(dy, B)

    def forward():
        z = xp.dot(x, A.T)
        y.__iadd__(b)
        add_matmul(y, z, B.T, S)

    def outer():
        xp.dot(dy.T, scaled(z, S))
        xp.dot(dy, B)

    def inner():
        xp.dot(scaled(u, S).T, x)
        add_matmul(dx, u, A, S)

    return {"z, y += b + s z B^T": forward, "u, dB": outer, "dA, dx += s u A": inner}


def kernels(xp, x, b, A, B, y, dy, dx):
    """The same parts by launches of our own; the sums over chunks belong to the last one."""
    (N, n_in), (n_out, r) = x.shape, B.shape
    slots = gpu_low_rank.Slots(1, 1, n_out)
    z, u, chunks = xp.dot(x, A.T), xp.dot(dy, B), -(-N // gpu_low_rank.chunk_of(N))
    dA, dB = xp.empty((r, n_in), "float32"), xp.empty((n_out, r), "float32")
    parts = [d if chunks == 1 else xp.empty((chunks, *d.shape), "float32") for d in (dA, dB)]

    def outer():
        gpu_low_rank.by_unit("low_rank_u_dB", dy, gpu_low_rank.factor(xp, B, 1), z, u, parts[1], S, r, N, n_out, slots=slots)

    def inner():
        gpu_low_rank.by_unit("low_rank_dA_dx", u, gpu_low_rank.factor(xp, A, 0), x, dx, parts[0], S, r, N, n_in, 1)
        if chunks > 1:
            by_element(gpu_low_rank.text_for(r), "low_rank_sums", dA.size + dB.size, dA.dtype, *parts, dA, dB, chunks, dA.size,
                       dB.size)

    return {"z, y += b + s z B^T": lambda: gpu_low_rank.updated(xp, x, A, B, b, S, y, True, slots), "u, dB": outer,
            "dA, dx += s u A": inner}


def update(version, xp, x, b, A, B, y, dy, dx):
    """The update alone, as beside a cached frozen output or behind dropout: one operation, forward and backward."""
    def call():
        op = version()
        op.xp, op.needs, op.s = xp, [True] * 3, S
        op.forward(x, A, B)
        op.backward(dy)

    return {"LoRAUpdate, both ways": call}


def device_time(xp, call):
    """Microseconds of one call in a graph of REPEATS."""
    if not hasattr(xp.cuda, "get_elapsed_time"):
        return float("nan")  # the stand-in
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        call(), call()
        stream.synchronize()
        stream.begin_capture()
        for _ in range(REPEATS):
            call()
        graph = stream.end_capture()
        graph.launch(stream)
        times = []
        for _ in range(TURNS):
            start, end = xp.cuda.Event(), xp.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(1000.0 * xp.cuda.get_elapsed_time(start, end) / REPEATS)
    return statistics.median(times)


def host_time(xp, call):
    """Microseconds until a call comes back, with a queue that is never full."""
    times = []
    call()
    for _ in range(TURNS):
        minilora.synchronize()
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        times.append(1e6 * (time.perf_counter() - start) / REPEATS)
    minilora.synchronize()
    return statistics.median(times)


def measured(xp, shape, r):
    arrays, rows = drawn(*shape, r), []
    own, replaced = kernels(xp, **arrays), chain(xp, **arrays)
    ours = minilora.current_device().versions[LoRAUpdate]
    own |= update(ours, xp, **arrays)
    replaced |= update(LoRAUpdate, xp, **arrays)
    for name in own:
        figures = {f"{what}, {side}": time(xp, call) for what, time in (("device", device_time), ("host", host_time))
                   for side, call in (("ours", own[name]), ("chain", replaced[name]))}
        rows.append({"shape": shape, "r": r, "part": name, **figures})
        arrays["y"].fill(0.0), arrays["dx"].fill(0.0)  # what is added to them stays finite
    return rows


def table(rows):
    yield f"{'N x in x out':<18}{'r':>3}  {'part':<24}{'device':>16}{'host':>16}"
    yield f"{'':<18}{'':>3}  {'':<24}{'ours / chain us':>16}{'ours / chain us':>16}"
    for row in rows:
        sizes = " x ".join(map(str, row["shape"]))
        pairs = (f"{row[what + ', ours']:.1f} / {row[what + ', chain']:.1f}" for what in ("device", "host"))
        yield f"{sizes:<18}{row['r']:>3}  {row['part']:<24}" + "".join(f"{pair:>16}" for pair in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    minilora.use("gpu")
    rows = []
    for shape in QUICK if options.quick else SHAPES:
        for r in RANKS:
            rows += measured(minilora.current_device().xp, shape, r)
    print(*table(rows), sep="\n")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
