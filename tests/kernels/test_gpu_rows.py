"""Kernels that work by rows: rows of every kind of length, places and values, and the bounds that their comments state."""
import importlib.util
import math
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest
from conftest import fetch, place
from test_gpu_overrides import ROWS, compare, run

from minilora import Tensor, backend, ops
from minilora.kernels import launch

LENGTHS = [1, 2, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8193, 50257]
DTYPES = pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
SMOOTHED = [lambda x, k, e=e: ops.cross_entropy(x, k, label_smoothing=e) for e in (0.0, 0.1)]


def flat_from_one(a):
    """Rows that begin one number behind an address that wide loads could take."""
    return place(np.concatenate([np.zeros(1, a.dtype), a.reshape(-1)]))[1:].reshape(a.shape)


def benchmark():
    """tests/benchmarks/bench_gpu_rows.py, whose launches must be right before a card is asked for times."""
    path = Path(__file__).parents[1] / "benchmarks" / "bench_gpu_rows.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_benchmark_starts(card, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "path", [*sys.path])
    bench, started = benchmark(), set()
    for name, case in bench.cases(bench.SMALL, backend.current_device().xp).items():
        arrays = [place(host) for host in bench.host_arrays(case, bench.SMALL.classes)]
        case.start(*arrays)
        assert all(np.isfinite(fetch(a)).all() for a in arrays), name
        assert card is not None or bench.of_cupy(case, bench.SMALL.classes) > 0
        started.add(name)
    assert len(started) == 16 and (card is None or len(card.launches) == 13)


LAYOUTS = pytest.mark.parametrize("layout", [pytest.param(place, id="aligned"), pytest.param(flat_from_one, id="from one")])


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("D", LENGTHS)
def test_cross_entropy_of_rows_of_any_length(D, layout, dtype, card):  # noqa: F811
    rng = np.random.default_rng(D)
    x, labels = 3 * rng.standard_normal((3, D)).astype(dtype), np.array([D - 1, -100, D // 2])
    for call in SMOOTHED:
        compare(ops.CrossEntropy, lambda x: call(x, labels), [x], dtype, layout=layout)


BY_ROW = [
    pytest.param(ops.Softmax, ops.softmax, 0, id="softmax"), pytest.param(ops.LayerNorm, ops.layer_norm, 2, id="layer_norm"),
    pytest.param(ops.RMSNorm, ops.rms_norm, 1, id="rms_norm")]


@DTYPES
@LAYOUTS
@pytest.mark.parametrize(("reference", "call", "weights"), BY_ROW)
def test_rows_of_any_length_in_registers_or_not(reference, call, weights, layout, dtype, card):  # noqa: F811
    for D in LENGTHS if card is None else LENGTHS[:-1]:
        rng = np.random.default_rng(D)
        hosts = [rng.standard_normal(shape).astype(dtype) for shape in [(2, D)] + [(D,)] * weights]
        compare(reference, call, hosts, dtype, layout=layout)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("S", [1, 33, 511, 512, 513, 1025])
def test_attention_over_any_number_of_keys(S, masked, window, card):  # noqa: F811
    """Few queries at the end of S keys, or as many as see less than one key."""
    for T in {1, min(S, 3), S + 2 if S < 50 else 2}:
        rng = np.random.default_rng(S)
        q, k, v = (rng.standard_normal((2, n, 4)) for n in (T, S, S))
        mask = np.where(rng.random((T, S)) < 0.3, -np.inf, rng.standard_normal((T, S))) if masked else None
        compare(ops.Attention, lambda *x: ops.attention(*x, causal=True, window=window, mask=mask), [q, k, v], "float64")


@DTYPES
@LAYOUTS
@pytest.mark.parametrize(("reference", "call"), [
    pytest.param(ops.GELU, ops.gelu, id="gelu"), pytest.param(ops.ExactGELU, lambda x: ops.gelu(x, "none"), id="exact_gelu"),
    pytest.param(ops.SiLU, ops.silu, id="silu"), pytest.param(ops.Dropout, lambda x: ops.dropout(x, 0.3, 5), id="dropout")])
def test_four_numbers_a_thread(reference, call, layout, dtype, card):  # noqa: F811
    """Of any number of them, and at addresses that no load of four can take: of x, of dy, and of both."""
    for n in (1, 2, 3, 4, 5, 1023, 1024, 1025, 4099):
        x = np.random.default_rng(n).standard_normal(n).astype(dtype)
        compare(reference, call, [x], dtype, layout=layout, dys=(place, flat_from_one))


@pytest.mark.parametrize("n", [0, 1, 4, 5, 4096])
def test_threads_of_kernels_that_compute_four(n, monkeypatch):
    started = []
    with emulator.emulated_device():
        monkeypatch.setattr(launch, "kernel", lambda *name: lambda grid, block, arguments: started.append(grid[0] * block[0]))
        x = place(np.ones(n, "float32"))
        for call in (ops.gelu, ops.silu, lambda x: ops.dropout(x, 0.3, 5)):
            call(Tensor(x))
    assert started == [-(-n // 1024) * 256] * 3 * (n > 0)


@DTYPES
@pytest.mark.parametrize("special", range(len(ROWS)))
@pytest.mark.parametrize("D", [3, 50, pytest.param(9001, marks=pytest.mark.slow)])
def test_special_numbers_anywhere_in_a_row(D, special, dtype, card):  # noqa: F811
    """In the first, a middle and the last batch of different threads: NaN and infinity where the reference has them."""
    rng = np.random.default_rng(D)
    x, fill = rng.standard_normal((4, D)).astype(dtype), -np.inf if special % 2 else 0.0
    x[2:] = fill
    for row, places in zip(x, ([0, D // 2, D - 1], [D - 1, D // 3, 0], [D - 1, 0, D // 2], [1, 2, 0])):
        row[places] = ROWS[special]
    for call in SMOOTHED:
        for label in (0, D - 1):
            for row in x:
                fast, slow = (run(ops.CrossEntropy, o, lambda x: call(x, [label]), [place(row[None])],
                                  [place(np.array(0.75, dtype))], [True])[0] for o in (True, False))
                for one, other in zip(fast, slow):
                    for kind in (np.isnan, np.isposinf, np.isneginf):
                        np.testing.assert_array_equal(kind(one), kind(other))
                    finite, eps = np.isfinite(other), np.finfo(dtype).eps
                    np.testing.assert_allclose(one[finite], other[finite], rtol=256 * eps, atol=64 * eps)


def growing(D, rng):
    """Rows whose largest number grows in every batch, never, slowly, by leaps, at random, and not at all."""
    steps = np.arange(D) / max(1, D - 1)
    return np.stack([9 * steps, -9 * steps, 0.1 * steps, 80 * steps, rng.standard_normal(D), 20 * rng.standard_normal(D),
                     np.full(D, 3.25), np.where(steps < 1, -math.log(D), 0.0), 1e4 + 5 * steps])


@DTYPES
@pytest.mark.parametrize("D", LENGTHS)
def test_the_sum_of_one_pass_is_as_near_as_its_comment_says(D, dtype, card):  # noqa: F811
    z = growing(D, np.random.default_rng(D)).astype(dtype)
    R, threads, u = len(z), launch.threads_of(D), float(np.finfo(dtype).eps) / 2
    losses, largest, total = (place(np.zeros((R, 1), dtype)) for _ in range(3))
    launch.by_row("cross_entropy", R, D, np.dtype(dtype), place(z), place(np.zeros(R, "int64")), place(np.ones((R, 1), dtype)),
                  losses, largest, total, None, 0.0)
    np.testing.assert_array_equal(fetch(largest), z.max(axis=1, keepdims=True))
    wide = z.astype(np.longdouble)
    exact = np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)
    batches = math.ceil(D / (8 * threads))
    bound = u * (5 * (batches + 2) + math.log(D) + 8 * batches + 10)
    assert (abs(fetch(total) / exact - 1) <= 1.001 * bound).all()
