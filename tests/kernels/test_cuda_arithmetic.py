"""The CUDA kernels by themselves: their text, compiled as C++ and run by the threads that emulator.py pretends."""
import emulator
import numpy as np
import pytest

import minilora
from minilora.kernels import launch
from minilora.optim.adam import adam_update
from minilora.optim.sgd import sgd_update


@pytest.fixture(params=["float", "double"])
def kernels(request):
    machine, dtype = emulator.emulator(), np.dtype({"float": "float32", "double": "float64"}[request.param])

    def start(name, *arguments):
        typed = [dtype.type(a) if isinstance(a, float) else np.int64(a) if isinstance(a, int) else a for a in arguments]
        machine.kernel("elementwise", name, request.param)((3,), (32,), typed)
    machine.grid = machine.threads = None
    return start, dtype


@pytest.mark.parametrize("keep", [1.0, 0.99])
def test_adam_equals_the_reference(kernels, keep):
    start, dtype = kernels
    rng = np.random.default_rng(0)
    mine = [rng.standard_normal(1001).astype(dtype) for _ in range(3)] + [rng.random(1001).astype(dtype)]
    reference = [a.copy() for a in mine]
    settings = (0.9, 0.999, 1e-3, 1e-8, keep)
    for _ in range(5):
        start("adam", *mine, 1001, *settings, *[launch.NULL] * 3)
        adam_update(*reference, *settings)
    for ours, theirs in zip(mine, reference):
        np.testing.assert_allclose(ours, theirs, rtol=16 * np.finfo(dtype).eps, atol=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("from_memory", [False, True])
def test_sgd_has_the_bits_of_the_reference(kernels, momentum, decay, from_memory):
    start, dtype = kernels
    rng = np.random.default_rng(0)
    mine = [rng.standard_normal(1001).astype(dtype) for _ in range(2)]
    v = rng.standard_normal(1001).astype(dtype) if momentum else None
    reference = [*(a.copy() for a in mine), None if v is None else v.copy()]
    lr = np.full((), 1e-2, dtype)
    for _ in range(5):
        start("sgd", *mine, launch.NULL if v is None else v, 1001, 0.0 if from_memory else 1e-2, momentum, decay,
              lr if from_memory else launch.NULL)
        sgd_update(*reference, 1e-2, momentum, decay)
    for ours, theirs in zip([*mine, v], reference):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "reference"), [
    ("gelu", minilora.ops.gelu), ("exact_gelu", lambda x: minilora.ops.gelu(x, "none")), ("silu", minilora.ops.silu)])
def test_activation_equals_the_reference(kernels, name, reference):
    start, dtype = kernels
    x = np.linspace(-6, 6, 777).astype(dtype)
    dy = np.random.default_rng(1).standard_normal(777).astype(dtype)
    y, dx = np.empty_like(x), np.empty_like(x)
    start(name, x, y, 777)
    start(f"{name}_backward", x, dy, dx, 777)
    p = minilora.Parameter(x)
    expected = reference(p)
    expected.backward(dy)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(y, expected.data, rtol=20 * eps, atol=8 * eps)
    # in the tail of the tanh form 1 + tanh cancels: its error, one eps, is multiplied by |dy x slope| < 64
    np.testing.assert_allclose(dx, p.grad, rtol=20 * eps, atol=64 * eps)


@pytest.mark.parametrize("n", [1, 4, 7, 1001])
@pytest.mark.parametrize("step", [1, 2 ** 40 + 3])
def test_dropout_mask_has_the_bits_of_the_reference(kernels, n, step):
    start, dtype = kernels
    p, seed = 0.3, 0x0123456789ABCDEF
    mask = np.empty(n, dtype)
    start("dropout_mask", mask, n, np.uint64(seed), np.uint64(step), np.uint32(np.ceil(p * 2 ** 24)), 1.0 / (1.0 - p),
          launch.NULL)
    reference = minilora.ops.dropout(minilora.Tensor(np.ones(n, dtype)), p, seed, step)
    np.testing.assert_array_equal(mask, reference.data)


# -- more than 2^31 numbers -------------------------------------------------------------------------------------------

R, D, THREADS = 2 ** 15 + 1, 2 ** 16 + 256, 64  # R D is a little more than 2^31; four numbers a thread divide D
# What a kernel takes. X, Y: (R, D) read, written; H: written, of 16 bits. d: (D). r: (R). l: labels. s: a number. n: R D. c: 1,
# the rows of a chunk. 0, 1, R, D: themselves.
LARGE = {
    ("norm", "norm"): "XddYrrs", ("norm", "norm_backward"): "XXdrrY", ("softmax", "softmax"): "XY",
    ("softmax", "softmax_backward"): "XXY",
    ("rows", "cross_entropy"): "XlrrrrYs", ("rows", "cross_entropy_backward"): "XlrrrYs",
    ("norm", "column_sums"): "XXrrYYc", ("rows", "mse"): "XXYrssn", ("rows", "mean"): "Xrs",
    ("softmax", "masked_softmax"): "YXrrs0ccn0cD00c", ("softmax", "masked_exp"): "YXrr0ccn0cD00c",
    ("rows", "rotary"): "XYddsccD000", ("rows", "split_heads"): "XY01110DDDD", ("rows", "join_heads"): "XY01110DDDD",
    ("elementwise", "adam"): "YXYYnsssss---", ("elementwise", "sgd"): "YXYnsss-",
    ("low_rank_8", "low_rank_forward"): "XdddrYsc1D111RDDc11D", ("low_rank_8", "low_rank_u_dB"): "X-r-Yscc001RD11D",
    ("low_rank_8", "low_rank_dA_dx"): "rd-Y-scc1D1RDc", ("low_rank_8", "low_rank_sums"): "X-Y-1n0",
    ("dora_8", "dora_rows"): "Xdrrrrss1D111RRDc", ("dora_8", "dora_columns"): "XdX-Y-ss11111nn1",
    ("window", "columns"): "XY1R1D111100111D", ("window", "from_columns"): "XY1R1D111100111D",
    ("elementwise", "to_float16"): "XHn", ("elementwise", "to_bfloat16"): "XHn",
    **{("elementwise", name + way): letters for name in ("gelu", "exact_gelu", "silu")
       for way, letters in (("", "XYn"), ("_backward", "XXYn"))},
}

# Of a thread: GELU, SiLU and rounding to 16 bits compute four.
NUMBERS = {row: 4 for row in LARGE if row[0] == "elementwise" and ("lu" in row[1] or row[1].startswith("to_"))}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 8.6 GB that take no room but for the pages that are written."""
    folder = tmp_path_factory.mktemp("large")
    try:
        return [np.memmap(folder / str(i), "float32", "w+", shape=(R, D)) for i in range(4)]
    except OSError as error:
        pytest.skip(f"no room for a sparse file: {error}")


def last_row(text, name, arrays):
    """Let the last block alone compute; the last row or number of every array that the kernel takes."""
    rows, given, arrays = len(arrays[0]), [], iter(arrays)
    for letter in LARGE[text, name]:
        if letter in "XY":
            given.append(next(arrays))
            given[-1][-1] = np.linspace(0.5, 1.5, D) if letter == "X" else 3.0
        elif letter == "H":
            whole = next(arrays)
            given.append(whole.reshape(-1).view("uint16")[:whole.size].reshape(whole.shape))
            given[-1][-1] = 3
        elif letter in "drl":
            given.append(np.full({"d": D}.get(letter, rows), 2, "int64" if letter == "l" else "float32"))
        else:
            number = {"s": 0.25, "n": rows * D, "c": 1, "0": 0, "1": 1, "R": rows, "D": D, "-": 0}[letter]  # -: a null pointer
            given.append(np.array(number, "float32" if letter == "s" else "int64"))
    sizes = [np.array(rows), np.array(D)] if not text.startswith(("elementwise", "low_rank", "dora", "window")) else []
    if text.startswith("low_rank"):
        blocks = rows * D // (THREADS if name == "low_rank_sums" else 32 if name == "low_rank_u_dB" else D)
    elif text == "window":
        blocks = rows * -(-D // 2048) if name == "columns" else rows * D // THREADS
    elif text == "dora_8":
        blocks = rows if name == "dora_rows" else rows * D // 32
    else:
        blocks = rows if sizes and name != "column_sums" else rows * D // (THREADS * NUMBERS.get((text, name), 1))
    emulator.emulator().kernel(text, name, "float").start([*given, *sizes], blocks, THREADS, blocks - 1, blocks)
    return [np.array(a[-1]) for a in given if a.ndim]


@pytest.mark.parametrize(("text", "name"), LARGE)
def test_places_beyond_31_bits(text, name, files):
    """The last row of more than 2^31 numbers gives what it gives alone."""
    alone = last_row(text, name, [np.empty((1, D), "float32") for _ in files])
    for one, other in zip(last_row(text, name, files), alone):
        np.testing.assert_array_equal(one, other)
    letters = [letter for letter in LARGE[text, name] if letter in "XYHdrl"]
    assert all((a[-THREADS:] != 3.0).any() for a, letter in zip(alone, letters) if letter in "YH")


def test_more_rows_than_31_bits(files):
    x, y = (f.reshape(-1, 1) for f in files[:2])
    x[-1] = y[-1] = 3.0
    softmax = emulator.emulator().kernel("softmax", "softmax", "float")
    softmax.start([x, y, np.array(R * D), np.array(1)], R * D, 32, R * D - 1, R * D)
    assert y[-1, 0] == 1.0


def test_every_kernel_is_tried_on_many_numbers():
    kernels = {name.removesuffix("_float") for module, text in launch.sources().items() if module.endswith("float")
               for name in emulator.parameters(text)}
    assert kernels == {name for _, name in LARGE} | {"dropout_mask", "order_by_id", "sums_by_id"}
    # the mask is tested to the bit, and counts in fours; sums by id have a test of their own in test_gpu_embedding.py
