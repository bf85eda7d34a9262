"""The CUDA kernels with a real thread for every thread of a block, watched by ThreadSanitizer.

The emulator sees every race in which the order of the threads changes the result. This sees any two accesses to one place that
no barrier separates, but not in every run: it remembers only the last few accesses to a place.
"""
import subprocess

import emulator
import pytest
from test_cuda_arithmetic import LARGE

from minilora.kernels import launch

pytestmark = pytest.mark.slow

PRELUDE = """
#include <cmath>
#include <cstring>
#include <pthread.h>
#include <thread>
#include <vector>
using std::exp; using std::log; using std::nan; using std::rint; using std::sqrt; using std::tanh;
struct Index { unsigned int x; };
static thread_local Index threadIdx;
static Index blockIdx, blockDim, gridDim{1};
static pthread_barrier_t barrier;
#define WARP 4  // few threads, and several warps
#define COLUMNS 2
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() pthread_barrier_wait(&barrier)
"""
MAIN = """
template <class F> void start(F kernel)
{
    std::vector<std::thread> threads;
    pthread_barrier_init(&barrier, nullptr, blockDim.x);
    for (unsigned int t = 0; t < blockDim.x; ++t)
        threads.emplace_back([=] { threadIdx.x = t; kernel(); });
    for (auto &t : threads)
        t.join();
    pthread_barrier_destroy(&barrier);
}

int main()
{
    const long long R = 3, D = 21;
    for (unsigned int size : {%s}) {
        blockDim.x = size;
        %s
    }
}
"""
BARRIER = "__syncthreads();"
VALUES = {"d": "std::vector<T>(D, T(2))", "r": "std::vector<T>(R, T(2))", "l": "std::vector<long long>(R, 2)",
          "X": "std::vector<T>(R * D, T(2))", "Y": "std::vector<T>(R * D, T(3))", "M": "std::vector<T>(R * R * D, T(3))",
          "H": "std::vector<unsigned short>(R * D)"}
NUMBERS = {"s": "T(0.25)", "n": "R * D", "c": "2LL", "-": "nullptr", "R": "R", "D": "D",
           "S": "STAGE + 6LL"}
MORE = [  # RMSNorm; losses alone; the gradient in the place of the logits; a seed, a step, a threshold, a scale
    ("norm", "norm", "X--Y-rs"), ("norm", "norm_backward", "XX--rY"), ("rows", "cross_entropy", "Xlrr---s"),
    ("rows", "mse", "XX-rssn"), ("rows", "cross_entropy", "Xlrr--=s"), ("elementwise", "dropout_mask", "Yn1111-"),
    ("embedding", "order_by_id", "lllRR"), ("embedding", "sums_by_id", "XlllY1RD1cD"),
    # three ranks; u and dB, dA and dx side by side, in chunks of two rows; more rows than are staged
    ("low_rank_8", "low_rank_forward", "XXXdMYsc1DR1RRDDc11D"), ("low_rank_8", "low_rank_u_dB", "XXXMMsccR1RRD11D"),
    ("low_rank_8", "low_rank_dA_dx", "XXXYMscc1DRRDc"), ("low_rank_8", "low_rank_u_dB", "M-M-MscS111S1111"),
    # factors, and lengths alone, by rows and by columns; with three ranks
    ("dora_8", "dora_rows", "XXXrddss1DR1RRRDc"), ("dora_8", "dora_columns", "XXX-d-ss1DR1RRRD"),
    # two of three slots of seven columns
    ("low_rank_8", "low_rank_forward", "XMXdMYsc1DR1RRDDc527"), ("low_rank_8", "low_rank_u_dB", "XXMMMsccR1RRD527"),
]
WITHOUT_SIZES = "elementwise", "low_rank", "dora", "window", "embedding"  # their launches do not end with R and D
BARRIERS = {"rows_float": ("#define MAX_THREADS", 4), "embedding_float": ("#define DEEPEST", 2),
            "low_rank_8_float": ("#define THREADS", 9), "dora_8_float": ("#define THREADS", 3)}


def program(module):
    """A program that runs every kernel of a text."""
    text, calls, (stem, _, T) = launch.sources()[module], [], module.rpartition("_")
    wanted = [*MORE, *((text, name, letters) for (text, name), letters in LARGE.items())]
    for _, name, letters in (row for row in wanted if row[0] == stem):
        arrays = "".join(f"auto a{i} = {VALUES[letter]}; " for i, letter in enumerate(letters) if letter in VALUES)
        given = [f"a{i}.data()" if letter in VALUES else "a0.data()" if letter == "=" else NUMBERS.get(letter, letter)
                 for i, letter in enumerate(letters)] + ["R", "D"] * (not stem.startswith(WITHOUT_SIZES))
        calls.append(f"{{ {arrays}start([&] {{ {name}_{T}({', '.join(given)}); }}); }}")
    return PRELUDE + text + MAIN % ("4, 16, 64" if stem.endswith("_8") else "1, 4, 16", "\n        ".join(calls))


def races(source, folder, runs):
    """What ThreadSanitizer says, in the first of some runs in which it says anything."""
    emulator.skip_without_compiler()
    (folder / "run.cpp").write_text(source)
    build = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-o", folder / "run", folder / "run.cpp"]
    done = subprocess.run(build, capture_output=True, text=True)
    for _ in range(runs):
        if done.stderr:
            break
        done = subprocess.run([folder / "run"], capture_output=True, text=True, timeout=60)
    if "cannot find" in done.stderr or "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return done.stderr


@pytest.mark.parametrize("module", [module for module in launch.sources()
                                    if module.endswith("float") and (module.count("_") == 1 or "_8_" in module)])
def test_no_race(module, tmp_path):
    assert races(program(module), tmp_path, runs=10) == ""


@pytest.mark.parametrize(("module", "place"), [(module, i) for module, (_, n) in BARRIERS.items() for i in range(n)])
def test_every_barrier_is_needed(module, place, tmp_path):
    start, n = BARRIERS[module]
    head, mark, body = program(module).partition(start)  # behind the prelude, which names barriers too
    before, *pieces = body.split(BARRIER)
    assert len(pieces) == n
    text = head + mark + before + "".join(BARRIER * (i != place) + piece for i, piece in enumerate(pieces))
    assert "data race" in races(text, tmp_path, runs=50)
