"""The kernels that wait for memory, alone on the card: microseconds, and the share of the memory's speed that they reach.

    python tests/benchmarks/bench_gpu_rows.py

Shapes of one layer of GPT-2 small, 8 texts of 512 tokens. A kernel is recorded 50 times into a CUDA graph, so that no launch
waits for Python, over as many copies of its arrays as the cache cannot hold; the median of five replays counts. MB are the
bytes that must be read and written once; the memory's speed is its clock times the width of its bus, twice. Beside it stands
what PyTorch takes for the same, where it is installed; its outputs are new arrays. What CuPy starts itself, sums of two arrays
and copies, stands below.
"""

import argparse
import functools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]  # the checkout, installed or not

import minilora  # noqa: E402
from minilora.kernels.launch import by_element, by_kept_row, by_row  # noqa: E402

FLOAT = numpy.dtype("float32")
CACHE = 1 << 27  # bytes: more than the cache of an H100, 50 MB, or of a B200, 126 MB
REPEATS, REPLAYS = 50, 5


class Sizes(NamedTuple):
    texts: int = 8
    tokens: int = 512
    heads: int = 12
    width: int = 768
    classes: int = 50257
    chunk: int = 1024  # rows of logits


SMALL = Sizes(1, 16, 2, 24, 101, 3)


class Case(NamedTuple):
    """`start(*arrays)` works on arrays of `shapes`; `numbers` are read and written in all. `torch(torch, *tensors)` does it."""

    shapes: list
    numbers: int
    start: Any
    torch: Any = None


def attention_cases(size):
    """The last half of the queries, which see half of the keys or more."""
    T, half = size.tokens, size.tokens // 2
    matrices = size.texts * size.heads
    R, z = matrices * half, (matrices * half, T)
    seen = matrices * sum(range(T - half + 1, T + 1))
    places = (T - half, half, T, 0, -2 * T, size.heads, 0, 0, 0, 0)
    lowest = float(numpy.finfo(FLOAT).min)
    numbers = [(matrices, T)] * 2
    softmaxed = functools.partial(by_kept_row, "softmax")
    return {
        "masked_softmax": Case([z, *numbers], seen + R * T, lambda z, m, n: softmaxed(
            "masked_softmax", R, T, FLOAT, z, None, m, n, lowest, *places)),
        "masked_exp": Case([z, *numbers], seen + R * T, lambda z, m, n: softmaxed(
            "masked_exp", R, T, FLOAT, z, None, m, n, *places)),
        "softmax_backward": Case([z] * 3, 3 * R * T, lambda y, dy, dx: softmaxed("softmax_backward", R, T, FLOAT, y, dy, dx),
                                 lambda torch, y, dy, _: torch.ops.aten._softmax_backward_data(dy, y, -1, torch.float32)),
        "softmax": Case([z] * 2, 2 * R * T, lambda x, y: softmaxed("softmax", R, T, FLOAT, x, y),
                        lambda torch, x, _: torch.softmax(x, -1)),
    }


def norm_cases(size):
    R, D = size.texts * size.tokens, size.width
    x, q = (R, D), (R, 1)
    return {
        "norm (LayerNorm)": Case(
            [x, (D,), (D,), x, q, q], 2 * R * D, lambda x, w, b, y, m, q: by_kept_row(
                "norm", "norm", R, D, FLOAT, x, w, b, y, m, q, 1e-5),
            lambda torch, x, w, b, *_: torch.nn.functional.layer_norm(x, (D,), w, b)),
        "norm_backward": Case(
            [x, x, (D,), q, q, x], 3 * R * D, lambda dy, x, w, m, q, dx: by_kept_row(
                "norm", "norm_backward", R, D, FLOAT, dy, x, w, m, q, dx),
            lambda torch, dy, x, w, m, q, _: torch.ops.aten.native_layer_norm_backward(
                dy, x, (D,), m, q, w, w, [True, False, False])),
        "norm (RMSNorm of Llama's 4,096)": Case(
            [(R, 4096), (4096,), (R, 4096), q], 2 * R * 4096, lambda x, w, y, q: by_kept_row(
                "norm", "norm", R, 4096, FLOAT, x, w, None, y, None, q, 1e-5)),
    }


def element_cases(size):
    n = size.texts * size.tokens * 4 * size.width
    x, threads = (n,), -(-n // 4)
    started = functools.partial(by_element, "elementwise")
    seed = numpy.uint64(5), numpy.uint64(0), numpy.uint32(1 << 21), 1.1, None
    return {
        "gelu": Case([x] * 2, 2 * n, lambda x, y: started("gelu", threads, FLOAT, x, y, n),
                     lambda torch, x, _: torch.nn.functional.gelu(x, approximate="tanh")),
        "gelu_backward": Case([x] * 3, 3 * n, lambda x, dy, dx: started("gelu_backward", threads, FLOAT, x, dy, dx, n),
                              lambda torch, x, dy, _: torch.ops.aten.gelu_backward(dy, x, approximate="tanh")),
        "silu": Case([x] * 2, 2 * n, lambda x, y: started("silu", threads, FLOAT, x, y, n),
                     lambda torch, x, _: torch.nn.functional.silu(x)),
        "dropout_mask": Case([x], n, lambda mask: started("dropout_mask", threads, FLOAT, mask, n, *seed)),
    }


def loss_cases(size):
    R, D = size.chunk, size.classes
    z, row = (R, D), (R, 1)

    def torch_both_ways(torch, z, labels, *_):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(z, labels.view(-1)), z)

    def start(gradient, z, labels, weights, losses):
        by_row("cross_entropy", R, D, FLOAT, z, labels, weights, losses, None, None, z if gradient else None, 0.0)

    arrays = [z, ("labels", R), row, row]
    return {
        "cross_entropy, loss and gradient": Case(arrays, 2 * R * D, functools.partial(start, True), torch_both_ways),
        "cross_entropy, loss alone": Case(arrays, R * D, functools.partial(start, False), lambda torch, z, labels, *_:
                                          torch.nn.functional.cross_entropy(z, labels.view(-1))),
    }


def own_cases(size, xp):
    """What CuPy starts."""
    R, D = size.texts * size.tokens, size.width
    y, x = (R, 3 * D), (R, D)
    return {
        "CuPy: y += b": Case([y, (3 * D,)], 6 * R * D, lambda y, b: xp.add(y, b, out=y), lambda torch, y, b: y.add_(b)),
        "CuPy: x + y": Case([x] * 3, 3 * R * D, lambda x, y, out: xp.add(x, y, out=out), lambda torch, x, y, _: x + y),
        "CuPy: copy": Case([y] * 2, 6 * R * D, lambda y, out: xp.copyto(out, y), lambda torch, y, _: y.clone()),
    }


def cases(size, xp):
    return {**loss_cases(size), **attention_cases(size), **norm_cases(size), **element_cases(size), **own_cases(size, xp)}


def host_arrays(case, classes):
    """Numbers near 1: what is infinite or subnormal would take the long way through a division."""
    rng = numpy.random.default_rng(0)
    for shape in case.shapes:
        yield rng.integers(0, classes, shape[1]) if shape[0] == "labels" else rng.random(shape, "float32") + numpy.float32(0.5)


def sets(case, classes, place):
    """So many copies of the arrays that no cache holds them until they are used again."""
    hosts = list(host_arrays(case, classes))
    n = min(REPEATS, math.ceil(CACHE / sum(host.nbytes for host in hosts)))
    return [[place(host) for host in hosts] for _ in range(n)]


# -- on the card ---------------------------------------------------------------------------------------------------------------


def of_cupy(case, classes):
    """Microseconds of one start."""
    import cupy
    arrays = sets(case, classes, minilora.to_device)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        case.start(*arrays[0])
        stream.synchronize()
        stream.begin_capture()
        for i in range(REPEATS):
            case.start(*arrays[i % len(arrays)])
        graph = stream.end_capture()

        def replayed():
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            return cupy.cuda.get_elapsed_time(begin, end)

        replayed()
        return 1000 * statistics.median(replayed() for _ in range(REPLAYS)) / REPEATS


def of_torch(torch, case, classes):
    tensors = sets(case, classes, lambda host: torch.from_numpy(host).cuda())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case.torch(torch, *tensors[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(REPEATS):
            case.torch(torch, *tensors[i % len(tensors)])

    def replayed():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    replayed()
    return 1000 * statistics.median(replayed() for _ in range(REPLAYS)) / REPEATS


def speed():
    """Bytes a microsecond that the card's memory could move."""
    import cupy
    kilohertz, bits = (cupy.cuda.runtime.deviceGetAttribute(which, 0) for which in (36, 37))  # memory's clock, and bus width
    return 2 * kilohertz * 1e3 * bits / 8 / 1e6


def import_torch():
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def measured(options):
    """The report, whose lines are printed one by one."""
    import cupy
    size, torch = SMALL if options.quick else Sizes(), import_torch()
    report = {"card": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), "bytes a us": speed(), "kernels": {}}
    print(f"{report['card']}, memory {report['bytes a us'] / 1e6:.2f} TB/s\n")
    print(f"{'':<33}{'MB':>7}{'floor us':>10}{'us':>8}{'share':>7}{'torch':>8}{'ratio':>7}")
    for name, case in cases(size, cupy).items():
        if options.only not in name:
            continue
        one = report["kernels"][name] = {"bytes": 4 * case.numbers, "us": of_cupy(case, size.classes)}
        if torch and case.torch:
            cupy.get_default_memory_pool().free_all_blocks()
            try:
                one["torch us"] = of_torch(torch, case, size.classes)
            except RuntimeError as error:  # its own limits end nobody else's times
                one["torch stopped"] = str(error)
                print(f"{name}: torch stopped: {error}", file=sys.stderr)
            torch.cuda.empty_cache()
        us, floor = one["us"], one["bytes"] / report["bytes a us"]
        beside = f"{one['torch us']:>8.1f}{us / one['torch us']:>7.2f}" if "torch us" in one else ""
        print(f"{name:<33}{one['bytes'] / 1e6:>7.1f}{floor:>10.1f}{us:>8.1f}{floor / us:>7.0%}{beside}", flush=True)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything starts")
    parser.add_argument("--only", metavar="TEXT", default="", help="only kernels with TEXT in their name")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args()
    if problem := minilora.backend.gpu_problem():
        sys.exit(problem)
    minilora.use("gpu")
    report = measured(options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
