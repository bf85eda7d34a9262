"""The CUDA kernels compute the right numbers: their text, compiled as C++ and run on the CPU by one thread.

A kernel strides over the whole grid, so a grid of one thread computes everything. That proves the arithmetic and the
indexing of the loop; races and launch shapes need `pytest -m gpu`.
"""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

import minilora
from minilora import backend
from minilora.kernels import gpu
from minilora.optim.adam import adam_update

PRELUDE = """
#include <cmath>
using std::sqrt; using std::tanh;
struct Index { int x; };
static const Index blockIdx{0}, threadIdx{0}, blockDim{1}, gridDim{1};
#define __global__
"""


@pytest.fixture(scope="module", params=["float", "double"])
def kernels(request, tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "k.cpp").write_text(PRELUDE + gpu.sources()[f"elementwise_{request.param}"])
    subprocess.run([compiler, "-O1", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", "-o", folder / "k.so",
                    folder / "k.cpp"], check=True, capture_output=True, text=True)
    library = ctypes.CDLL(str(folder / "k.so"))
    real = {"float": ctypes.c_float, "double": ctypes.c_double}[request.param]
    dtype = {"float": np.float32, "double": np.float64}[request.param]

    def launch(name, *arguments):
        typed = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else real(a) if isinstance(a, float)
                 else ctypes.c_longlong(a) if isinstance(a, int) else a for a in arguments]
        getattr(library, f"{name}_{request.param}")(*typed)
    return launch, dtype


@pytest.mark.parametrize("keep", [1.0, 0.99])
def test_adam_equals_the_reference(kernels, keep):
    launch, dtype = kernels
    rng = np.random.default_rng(0)
    mine = [rng.standard_normal(1001).astype(dtype) for _ in range(3)] + [rng.random(1001).astype(dtype)]
    reference = [a.copy() for a in mine]
    settings = (0.9, 0.999, 1e-3, 1e-8, keep)
    for _ in range(5):
        launch("adam", *mine, 1001, *settings)
        adam_update(*reference, *settings)
    for ours, theirs in zip(mine, reference):
        np.testing.assert_allclose(ours, theirs, rtol=16 * np.finfo(dtype).eps, atol=16 * np.finfo(dtype).eps)


def test_gelu_equals_the_reference(kernels):
    launch, dtype = kernels
    x = np.linspace(-6, 6, 777).astype(dtype)
    dy = np.random.default_rng(1).standard_normal(777).astype(dtype)
    y, dx = np.empty_like(x), np.empty_like(x)
    launch("gelu", x, y, 777)
    launch("gelu_backward", x, dy, dx, 777)
    p = minilora.Parameter(x)
    reference = minilora.ops.gelu(p)
    reference.backward(dy)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(y, reference.data, rtol=20 * eps, atol=8 * eps)
    # in the tail 1 + tanh cancels: its error, one eps, is multiplied by |dy x slope| < 64
    np.testing.assert_allclose(dx, p.grad, rtol=20 * eps, atol=64 * eps)


@pytest.mark.parametrize("n", [1, 4, 7, 1001])
@pytest.mark.parametrize("step", [1, 2 ** 40 + 3])
def test_dropout_mask_has_the_bits_of_the_reference(kernels, n, step):
    launch, dtype = kernels
    p, seed = 0.3, 0x0123456789ABCDEF
    mask = np.empty(n, dtype)
    threshold = ctypes.c_uint(int(np.ceil(p * 2 ** 24)))
    launch("dropout_mask", mask, n, ctypes.c_ulonglong(seed), ctypes.c_ulonglong(step), threshold, 1.0 / (1.0 - p))
    reference = minilora.ops.dropout(minilora.Tensor(np.ones(n, dtype)), p, seed, step)
    np.testing.assert_array_equal(mask, reference.data)


def test_every_override_of_the_gpu_keeps_its_reference_for_other_dtypes():
    # float16 has no kernel: the overrides must then be the reference, and that needs no GPU.
    x = np.linspace(-2, 2, 5).astype(np.float16)
    op = gpu.FusedGELU()
    op.xp = np
    reference = minilora.ops.gelu(minilora.Tensor(x))
    np.testing.assert_array_equal(op.forward(x), reference.data)
    assert backend.device_of(x).name == "cpu"
