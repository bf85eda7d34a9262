"""The emulator notices what it says it notices: each fault is planted in a kernel or in a launch."""
import emulator
import numpy as np
import pytest

from minilora.kernels import launch

BARRIER = "__syncthreads();"
SUM = """
extern "C" __global__ void %s_float(const T *x, T *y, long long n)
{
    __shared__ T part[64];
    for (long long r = blockIdx.x; r < n; r += gridDim.x) {
        %s
        part[threadIdx.x] = x[r * blockDim.x + threadIdx.x];
        for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half)
                part[threadIdx.x] += part[threadIdx.x + half];
        }
        %s
        y[r * blockDim.x + threadIdx.x] = part[0];
    }
}
"""
TEXT = "#define T float" + "".join(SUM % barriers for barriers in [
    ("right", BARRIER, BARRIER), ("no_first_barrier", "", BARRIER), ("no_last_barrier", BARRIER, "")]) + """
extern "C" __global__ void left_alone_float(T *y) { if (threadIdx.x) __syncthreads(); y[threadIdx.x] = T(1); }
extern "C" __global__ void two_barriers_float(T *y)
{
    if (threadIdx.x) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = T(1);
}
extern "C" __global__ void writes_after_float(T *y, long long n) { y[n] = T(1); }
extern "C" __global__ void writes_before_float(T *y, long long n) { y[-n] = T(1); }
extern "C" __global__ void reads_after_float(T *y, long long n) { y[0] = y[n]; }
extern "C" __global__ void casts_away_float(const T *x) { const_cast<T *>(x)[0] = T(1); }
extern "C" __global__ void between_blocks_float(T *y) { y[0] = T(blockIdx.x); }
extern "C" __global__ void takes_float(const T *x, T *y, long long n, unsigned long long m, T a) { y[0] = x[0] + n + m + a; }
extern "C" __global__ void null_float(const T *x, T *y) { y[0] = x ? T(1) : T(2); }
"""


def test_products_joined_with_sums_are_seen(tmp_path, monkeypatch):
    """As NVRTC joins them, unless it is told not to: g - mean(g), one number a row, is the rounding of dy w and not 0."""
    emulator.skip_without_compiler()
    texts, dx = {"norm_float": launch.sources()["norm_float"]}, {}
    x, dy, w, q = (np.random.default_rng(0).random(n).astype("float32") for n in (9, 9, 1, 9))
    for name, options in (("told", launch.OPTIONS), ("not_told", ("--std=c++17",))):
        monkeypatch.setattr(launch, "OPTIONS", options)
        (tmp_path / name).mkdir()
        dx[name] = np.empty_like(x)
        machine = emulator.Emulator(tmp_path / name, texts)
        machine.kernel("norm", "norm_backward", "float")(
            (9,), (32,), (dy, x, w, x.copy(), q, dx[name], np.int64(9), np.int64(1)))
    assert not dx["told"].any() and dx["not_told"].any()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    emulator.skip_without_compiler()
    machine = emulator.Emulator(tmp_path_factory.mktemp("planted"), {"planted_float": TEXT})

    def start(name, *arguments, grid=1, threads=32):
        machine.kernel("planted", name, "float")((grid,), (threads,), arguments)
    return start


def floats(n):
    return np.arange(1.0, n + 1, dtype="float32")


@pytest.mark.parametrize("threads", [1, 2, 32, 64])
@pytest.mark.parametrize("grid", [1, 2, 5])
def test_a_right_sum(start, grid, threads):
    x, y = floats(3 * threads), floats(3 * threads)
    start("right", x, y, np.int64(3), grid=grid, threads=threads)
    np.testing.assert_array_equal(y, np.repeat(x.reshape(3, -1).sum(axis=1), threads))


@pytest.mark.parametrize("name", ["no_first_barrier", "no_last_barrier"])
def test_a_missing_barrier(start, name):
    with pytest.raises(emulator.LaunchError, match="race"):
        start(name, floats(96), floats(96), np.int64(3))


def test_a_race_between_blocks(start):
    start("between_blocks", floats(1), grid=1)
    with pytest.raises(emulator.LaunchError, match="race"):
        start("between_blocks", floats(1), grid=2)


@pytest.mark.parametrize("name", ["left_alone", "two_barriers"])
def test_a_barrier_that_not_all_threads_reach(start, name):
    start(name, floats(1), threads=1)
    with pytest.raises(emulator.LaunchError, match="barrier in line"):
        start(name, floats(32))


@pytest.mark.parametrize("distance", [8, 9, 400])
def test_memory_outside_an_array(start, distance):
    with pytest.raises(emulator.LaunchError, match="outside"):
        start("writes_after", floats(8), np.int64(distance))
    with pytest.raises(emulator.LaunchError, match="outside"):
        start("writes_before", floats(8), np.int64(distance - 7))
    y = floats(8)
    start("reads_after", y, np.int64(distance))
    assert np.isnan(y[0])


def test_an_array_behind_const(start):
    start("casts_away", floats(4))  # 1 stood there
    with pytest.raises(emulator.LaunchError, match="const"):
        start("casts_away", floats(4) + 1)


RIGHT = [floats(4), floats(4), np.int64(1), np.uint64(1), np.float32(1)]
PLACES = [(0, floats(4).astype("float64")), (0, floats(8)[::2]), (0, None), (0, np.float32(1)), (0, np.int64(0)), (0, 0),
          (2, True), (2, np.int32(1)), (2, np.uint64(1)), (2, floats(4).astype("int64")), (3, np.int64(1)), (4, 1.0),
          (4, np.float64(1))]


@pytest.mark.parametrize(("place", "value"), PLACES)
def test_arguments_of_the_wrong_type(start, place, value):
    start("takes", *RIGHT)
    start("takes", *RIGHT[:2], 1, *RIGHT[3:])  # Python's ints have 64 bits
    wrong = list(RIGHT)
    wrong[place] = value
    with pytest.raises(emulator.LaunchError, match=f"argument {place} "):
        start("takes", *wrong)


def test_other_faults_of_a_launch(start):
    with pytest.raises(emulator.LaunchError, match="4 arguments for 5"):
        start("takes", *RIGHT[:4])
    with pytest.raises(emulator.LaunchError, match="overlap"):
        both = floats(8)
        start("takes", both[:5], both[3:], *RIGHT[2:])
    for shape in (dict(grid=0), dict(threads=0), dict(threads=1025)):
        with pytest.raises(emulator.LaunchError, match="blocks of"):
            start("takes", *RIGHT, **shape)


def test_a_null_pointer(start):
    y = floats(1)
    start("null", np.uint64(0), y)
    assert y[0] == 2


def test_one_array_twice_is_one_memory(start):
    x = floats(1)
    start("takes", x, x, *RIGHT[2:], threads=1)
    assert x[0] == 4
