"""The real cublasLt keeps what it is told: its descriptors live on the host, so that no GPU is needed to look into them."""
import ctypes
from pathlib import Path

import numpy as np
import pytest

from minilora.kernels.cublas import library as cublas, light, operands

pytestmark = pytest.mark.parity
OPERATION = {0: ctypes.c_int32, 1: ctypes.c_int32, 3: ctypes.c_int32, 4: ctypes.c_int32, 7: ctypes.c_uint32, 8: ctypes.c_void_p}
LAYOUT = {0: ctypes.c_uint32, 1: ctypes.c_int32, 2: ctypes.c_uint64, 3: ctypes.c_uint64, 4: ctypes.c_int64}
PREFERENCE = {1: ctypes.c_uint64, 5: ctypes.c_uint32, 6: ctypes.c_uint32, 7: ctypes.c_uint32, 8: ctypes.c_uint32}


class WithoutAnAnswer(light.Fused):
    """The heuristic wants a handle, and a handle a GPU."""

    def first_algorithm(self, *given):
        with pytest.raises(light.Refused, match="cublasLtMatmulAlgoGetHeuristic returned the status 1 "):
            super().first_algorithm(*given)
        return light.Heuristic()


@pytest.fixture(scope="module")
def library():
    """The library that torch brings for CUDA."""
    nvidia = pytest.importorskip("nvidia")
    found = sorted(path for folder in nvidia.__path__ for path in Path(folder).glob("**/libcublasLt.so.*"))
    if not found:
        pytest.skip("the packages of NVIDIA here have no cublasLt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cublas, "found", lambda name: ctypes.CDLL(str(found[0])))
        return cublas.load_light()


def told(library, kind, made, attributes):
    values = []
    for attribute, of_type in attributes.items():
        value, written = of_type(), ctypes.c_size_t()
        size = ctypes.c_size_t(ctypes.sizeof(value))
        assert getattr(library, f"{kind}GetAttribute")(made, attribute, ctypes.byref(value), size, ctypes.byref(written)) == 0
        assert written.value == size.value
        values.append(value.value)
    return values


@pytest.mark.parametrize(("turned", "dtype", "compute", "kind"), [(False, "float32", 68, 0), (True, "float32", 77, 0),
                                                                  (False, "float64", 70, 1), (True, "float16", 68, 2)])
def test_what_a_product_with_a_bias_says(turned, dtype, compute, kind, library):
    given = light.Light(library, ctypes.c_void_p())
    given.follow(0, 1 << 20, 32 << 20)
    a, b = np.ones((4, 5), dtype), np.ones((6, 5), dtype).T if turned else np.ones((5, 6), dtype)
    out = np.ones((4, 8), "float32" if dtype == "float16" else dtype)[:, :6]
    plan = WithoutAnAnswer(given, operands.operands(a, b, out), compute, 16, 1024)
    made = {name: [one for call, one in plan.owned if call == f"{name}Destroy"]
            for name in ("cublasLtMatmulDesc", "cublasLtMatrixLayout", "cublasLtMatmulPreference")}
    scale = int(dtype == "float64")
    assert told(library, "cublasLtMatmulDesc", *made["cublasLtMatmulDesc"], OPERATION) == [
        compute, scale, int(turned), 0, light.BIAS, 1024]
    left = [kind, 0, 5, 6, 5] if turned else [kind, 0, 6, 5, 6]  # a type, by columns, rows, columns, steps between columns
    assert [told(library, "cublasLtMatrixLayout", one, LAYOUT) for one in made["cublasLtMatrixLayout"]] == [
        left, [kind, 0, 5, 4, 5], [scale, 0, 6, 4, 8]]
    assert told(library, "cublasLtMatmulPreference", *made["cublasLtMatmulPreference"], PREFERENCE) == [32 << 20, *[16] * 4]
    with pytest.raises(light.Refused, match="cublasLtMatmul returned the status 1 "):
        plan(b.ctypes.data, a.ctypes.data, out.ctypes.data, 1.0, 0.0, 2048)
    assert told(library, "cublasLtMatmulDesc", *made["cublasLtMatmulDesc"], OPERATION)[-1] == 2048


def test_sizes_that_are_not_the_attributes_own_are_refused(library):
    given = light.Light(library, ctypes.c_void_p())
    plan = WithoutAnAnswer(given, operands.operands(*(np.ones((2, 2), "float32") for _ in range(3))), 68, 16, 1024)
    for attribute, value in ((light.EPILOGUE, ctypes.c_uint64(4)), (light.BIAS_POINTER, ctypes.c_uint32(4)),
                             (99, ctypes.c_int32(1))):
        with pytest.raises(light.Refused, match="SetAttribute returned the status 7 "):
            plan.set("cublasLtMatmulDesc", plan.operation, attribute, value)
