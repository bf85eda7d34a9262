"""NF4 and FP4: every bit is that of bitsandbytes, and what follows from the definitions holds."""

import copy
import pathlib
import pickle
import tracemalloc

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora import quant
from minilora.errors import ConfigError, ShapeError, StateError
from minilora.quant import codes, scales
from minilora.quant.blocks import decode, encode

VECTORS = numpy.load(pathlib.Path(__file__).parents[1] / "data" / "four_bit_vectors.npz")
CASES = sorted(name.split(".")[0] for name in VECTORS.files if name.endswith(".W"))


def same_bits(a, b):
    a, b = numpy.ascontiguousarray(a), numpy.ascontiguousarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def wide(W, dtype):
    """The numbers of a stored vector: 16-bit ones are kept as their bits."""
    if dtype == "float32":
        return W
    return W.view("float16") if dtype == "float16" else quant.Sixteen(W.view("uint16"))


@pytest.mark.parametrize("name", CASES)
def test_bitsandbytes_makes_the_same_bits(name):
    kind, blocksize, dtype = VECTORS[f"{name}.settings"]
    double = f"{name}.nested_offset" in VECTORS.files
    W = quant.FourBit.of(wide(VECTORS[f"{name}.W"], dtype), str(kind), int(blocksize), double=double)
    for ending, array in W.arrays().items():
        same_bits(array, VECTORS[f"{name}.{ending or 'codes'}"])
    if f"{name}.decoded" in VECTORS.files:
        numpy.testing.assert_array_equal(W.dense(), VECTORS[f"{name}.decoded"])  # FP4's second zero has a sign there


def test_the_tables_are_those_of_bitsandbytes():
    same_bits(codes.dynamic_map(), VECTORS["map"])
    for kind in codes.KINDS:
        same_bits(codes.KINDS[kind], VECTORS[kind])


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    """Eight equal steps of probability on the positive side and seven on the negative one, from 0.9677083 inwards."""
    from statistics import NormalDist

    def side(count):
        return [NormalDist().inv_cdf(p) for p in numpy.linspace(0.9677083, 0.5, count)[:-1]]

    numbers = numpy.array(sorted([*side(9), 0.0, *(-x for x in side(8))]))
    numpy.testing.assert_allclose(numbers / numbers.max(), codes.NF4, atol=2e-7)


def test_a_number_between_two_codes_gets_the_lower_one_up_to_the_middle():
    for kind in codes.KINDS:
        borders, order = codes.steps(kind)
        for step, place in ((-2.0, 0), (None, 0), (2.0, 1)):
            at = borders if step is None else numpy.nextafter(borders, numpy.float32(step))
            made = encode(numpy.concatenate([[1.0], at]).astype("float32"), kind).codes
            found = numpy.stack([made >> 4, made & 15], axis=1).reshape(-1)[1:]
            assert found.tolist() == order[numpy.arange(15) + place].tolist()


matrices = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2 ** 32 - 1),
                     st.sampled_from([1e-6, 0.02, 1.0, 1e6]), st.sampled_from(["float16", "float32", "float64"]))


def drawn(matrix):
    rows, columns, seed, size, dtype = matrix
    rng = numpy.random.default_rng(seed)
    W = rng.normal(size=(rows, columns)) * size * rng.choice([1.0, 0.0, 1e-3], size=(rows, 1))
    return numpy.clip(W, -6e4, 6e4).astype(dtype)


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 128]))
def test_what_comes_back_is_near_and_in_order_and_stays(matrix, kind, blocksize):
    W = drawn(matrix)
    held = quant.FourBit.of(W, kind, blocksize, double=False, dtype="float32")
    back = held.dense().reshape(-1)
    flat = W.reshape(-1).astype("float32")
    gap = {"nf4": 0.15191, "fp4": 0.16668}[kind]  # half the widest: between -1 and -0.696, and between 2/3 and 1
    numbers = numpy.sort(codes.KINDS[kind].astype("float64"))
    assert numpy.diff(numbers).max() / 2.0 <= gap
    for low in range(0, len(flat), blocksize):
        some, its = flat[low:low + blocksize], back[low:low + blocksize]
        largest = numpy.abs(some).max()
        assert numpy.abs(some - its).max() <= gap * largest * (1.0 + 1e-6)
        assert (numpy.diff(its[numpy.argsort(some, kind="stable")]) >= 0.0).all()
        if largest > 1e-30:
            numpy.testing.assert_array_equal(its[numpy.abs(some) == largest], some[numpy.abs(some) == largest])
    again = quant.FourBit.of(held.dense(), kind, blocksize, double=False)
    numpy.testing.assert_array_equal(again.dense(), held.dense())
    numpy.testing.assert_array_equal(again.absmax, held.absmax)
    if kind == "nf4":  # FP4 has two codes for 0
        numpy.testing.assert_array_equal(again.codes, held.codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1200), st.integers(0, 2 ** 32 - 1), st.sampled_from([1e-4, 1.0, 1e5]), st.booleans())
def test_scales_in_8_bits(count, seed, size, equal):
    rng = numpy.random.default_rng(seed)
    given = (numpy.ones(count) if equal else numpy.abs(rng.normal(size=count))).astype("float32") * numpy.float32(size)
    held = scales.compress(given)
    back = scales.decompress(held, 0, count, numpy)
    # half the widest gap of the map, half of one of its 65,535 steps, and roundings of float32
    bound = numpy.repeat(held.absmax, 256)[:count] * (0.00705 + 2.0 ** -16) + 4e-7 * size * 6
    assert (numpy.abs(back - given) <= bound).all()
    exact = given.astype("float64").mean()
    assert abs(float(held.offset) - exact) <= 2.0 ** -24 * exact * (len(given) ** 0.5 + 70)
    low, high = sorted(rng.integers(0, count + 1, 2))
    same_bits(scales.decompress(held, low, high, numpy), back[low:high])


def test_the_mean_is_a_sum_in_levels_and_as_exact_as_it_says():
    rng = numpy.random.default_rng(3)
    for n in (1, 7, 8, 33, 4097, 70_001, 600_000):
        given = rng.random(n).astype("float32")
        assert abs(float(scales.mean(given)) - given.astype("float64").mean()) < 2e-6
    assert abs(scales.mean(numpy.full(1 << 20, 0.1, "float32")) / numpy.float32(0.1) - 1.0) < 3 * 32 * 2.0 ** -24
    assert numpy.isnan(scales.mean(numpy.empty(0, "float32")))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (5, 129), (0, 5), (4, 0), (9, 64), (3, 8192)])
def test_rows_are_those_of_the_whole(shape, blocksize, double, monkeypatch):
    monkeypatch.setattr("minilora.stored.TILE", 100)
    W = numpy.random.default_rng(5).normal(size=shape).astype("float32")
    held = quant.FourBit.of(W, "nf4", blocksize, double=double)
    absmax = held.scales(0, -(-W.size // blocksize))
    numbers = decode(held.codes, absmax, "nf4", blocksize).reshape(-1)[:W.size].reshape(shape)
    same_bits(held.dense(), numbers)
    for low, high in ((0, 0), (0, shape[0]), (shape[0] // 2, shape[0]), (1, 2)):
        high = min(high, shape[0])
        if low <= high:
            same_bits(held.rows(low, high), numbers[low:high])
    assert held.double == (double and W.size > 0)


def test_views_and_other_orders_hold_the_same(monkeypatch):
    W = numpy.random.default_rng(6).normal(size=(37, 50)).astype("float32")
    one = quant.FourBit.of(W)
    monkeypatch.setattr("minilora.quant.blocks.CHUNK", 64)
    for same in (W, numpy.asfortranarray(W), W.astype(">f4"), W[::-1][::-1], W.astype("float64")):
        other = quant.FourBit.of(same)
        assert all((a == b).all() for a, b in zip(one.arrays().values(), other.arrays().values()))
    read_only = W.copy()
    read_only.flags.writeable = False
    assert (quant.FourBit.of(read_only).codes == one.codes).all()
    assert (quant.FourBit.of(quant.Sixteen(W.astype("float16"))).codes == quant.FourBit.of(W.astype("float16")).codes).all()


def test_memory_is_bounded_while_it_is_made_and_4_2_bits_a_weight_after():
    W = numpy.random.default_rng(7).normal(size=(1024, 1024)).astype("float32")
    quant.FourBit.of(W[:64])
    tracemalloc.start()
    held = quant.FourBit.of(W)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 8 * held.nbytes / held.size <= 4.13
    assert peak - held.nbytes < W.nbytes / 3  # chunks of 65,536 numbers, and 16,384 scales several times
    tracemalloc.start()
    for low, high in [(0, 128), (128, 256)]:
        held.rows(low, high)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.2 * 128 * 1024 * 4


def test_copies_pickles_and_state_dicts_hold_the_same():
    W = quant.FourBit.of(numpy.random.default_rng(8).normal(size=(6, 70)).astype("float32"), "fp4", 32)
    for other in (copy.deepcopy(W), pickle.loads(pickle.dumps(W)), W.with_arrays(W.arrays()), W.astype("float64")):
        assert (other.kind, other.blocksize, other.shape) == ("fp4", 32, (6, 70))
        numpy.testing.assert_array_equal(other.dense(), W.dense())
    layer = minilora.nn.Linear(70, 6, rng=0)
    layer.weight = minilora.Parameter(W, trainable=False)
    state = layer.state_dict()
    assert list(state) == ["weight", "weight.absmax", "weight.nested_absmax", "weight.nested_offset", "bias"]
    other = minilora.nn.Linear(70, 6, rng=1)
    other.weight = minilora.Parameter(quant.FourBit.of(numpy.zeros((6, 70), "float32"), "fp4", 32), trainable=False)
    other.load_state_dict(state)
    numpy.testing.assert_array_equal(other.weight.data.dense(), W.dense())
    assert "FourBit(fp4, (6, 70)" in repr(W)


def test_what_cannot_be_held_is_refused():
    W = numpy.ones((4, 40), "float32")
    for bad in (numpy.nan, numpy.inf, -numpy.inf):
        for at in ((0, 0), (3, 39)):
            wrong = W.copy()
            wrong[at] = bad
            with pytest.raises(StateError, match="NaN or inf"):
                quant.FourBit.of(wrong)
            with pytest.raises(StateError, match="NaN or inf"):
                quant.Int8Rows.of(wrong)
    with pytest.raises(StateError, match="NaN or inf"):
        quant.FourBit.of(W.astype("float64") * 1e300)
    for kind, blocksize in (("nf3", 64), ("nf4", 63), ("nf4", True), ("nf4", 16), (None, 64)):
        with pytest.raises(ConfigError):
            quant.FourBit.of(W, kind, blocksize)
    held = quant.FourBit.of(W)
    assert held.nested_absmax is not None
    with pytest.raises(ShapeError, match="codes: expected uint8"):
        quant.FourBit((4, 41), held.codes, *list(held.arrays().values())[1:])
    with pytest.raises(ShapeError, match="nested_offset: expected float32 .., got nothing"):
        quant.FourBit((4, 40), held.codes, held.absmax, held.nested_absmax)
    with pytest.raises(ShapeError, match="holds a matrix"):
        quant.FourBit.of(W.reshape(-1))


def test_int8_has_one_step_a_row():
    rng = numpy.random.default_rng(9)
    W = rng.normal(size=(7, 50)).astype("float32") * 10.0 ** rng.integers(-3, 3, (7, 1)).astype("float32")
    W[3] = 0.0
    held = quant.Int8Rows.of(W)
    largest = numpy.abs(W).max(axis=1, keepdims=True)
    assert (numpy.abs(held.dense() - W) <= largest * (1.0 / 254.0 + 1e-6)).all()
    assert held.nbytes == 7 * 50 + 7 * 4
    again = quant.Int8Rows.of(held.dense())
    assert (again.codes == held.codes).all()
    same_bits(held.rows(2, 5), held.dense()[2:5])
    half = quant.Int8Rows.of(W.astype("float16"))
    assert half.dtype == "float16" and half.dense().dtype == "float16"
    assert quant.Int8Rows.of(numpy.empty((0, 4), "float32")).dense().shape == (0, 4)
    assert quant.Int8Rows.of(numpy.empty((4, 0), "float32")).dense().shape == (4, 0)
    with pytest.raises(ShapeError):
        quant.Int8Rows(W, held.steps)
    with pytest.raises(ShapeError):
        quant.Int8Rows.of(W[0])


def test_numbers_from_a_normal_distribution_lose_9_percent():
    W = numpy.random.default_rng(10).normal(size=(256, 512)).astype("float32")

    def lost(held):
        return numpy.linalg.norm(held.dense() - W) / numpy.linalg.norm(W)

    nf4, fp4 = (lost(quant.FourBit.of(W, kind)) for kind in ("nf4", "fp4"))
    assert nf4 == pytest.approx(0.092, abs=0.002) and nf4 < fp4 < 0.13
    assert lost(quant.Int8Rows.of(W)) < 0.01
