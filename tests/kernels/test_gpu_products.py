"""The binding to cuBLAS, against NumPy: with a pretended library that checks what it is given, and on a real GPU (-m gpu)."""
import ctypes
import math
import sys
import threading
import types

import numpy as np
import pytest
import standin
import standin.streams
from conftest import fetch, need_gpu, place
from hypothesis import given, strategies as st

import minilora
from minilora import backend
from minilora.device import GPU
from minilora.kernels import products


@pytest.fixture(params=["card", pytest.param("gpu", marks=pytest.mark.gpu)])
def xp(request):
    if request.param == "gpu":
        need_gpu()
        with backend.use("gpu") as device:
            yield device.xp
    else:
        with standin.card() as device:
            yield device.xp


LAYOUTS = {  # a host array as one of the same numbers on the device
    "rows": place,
    "columns": lambda a: place(a.swapaxes(-1, -2).copy(order="C")).swapaxes(-1, -2),
    "left part": lambda a: place(np.concatenate([a, a], axis=-1))[..., :a.shape[-1]],
    "lower part": lambda a: place(np.concatenate([a, a], axis=-2))[..., a.shape[-2]:, :],
    "part of columns": lambda a: place(np.concatenate([a, a], axis=-2).swapaxes(-1, -2).copy(order="C")
                                       ).swapaxes(-1, -2)[..., :a.shape[-2], :],
    "heads": lambda a: place(np.moveaxis(a, -2, 0).copy(order="C")).swapaxes(0, -2) if a.ndim == 3 else place(a),
}
UNFIT = {
    "every other": lambda a: place(np.repeat(a, 2, axis=-1))[..., ::2],
    "backwards": lambda a: place(a[..., ::-1, :].copy(order="C"))[..., ::-1, :],
}
sizes = st.sampled_from([1, 2, 3, 5, 8])


def near(got, expected, sums, dtype):
    eps = float(np.finfo(dtype).eps)
    assert (abs(fetch(got) - expected) <= 4 * eps * (1 + sums)).all()


@given(data=st.data(), n=sizes, k=sizes, m=sizes, lead=st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]),
       dtype=st.sampled_from(["float32", "float64"]), alpha=st.sampled_from([1.0, -0.5]), beta=st.sampled_from([0.0, 1.0, 2.0]))
def test_any_layout_factor_and_sum(xp, data, n, k, m, lead, dtype, alpha, beta):
    rng = np.random.default_rng(n + 10 * k + 100 * m)
    a, b, out = (rng.standard_normal((*lead, *shape)).astype(dtype) for shape in ((n, k), (k, m), (n, m)))
    shared = data.draw(st.sampled_from([None, 0, 1])) if lead else None  # one matrix for all, of the left or the right
    a, b = (x[(0,) * len(lead)] if i == shared else x for i, x in enumerate((a, b)))
    if beta == 0.0:
        out.fill(np.nan)  # is not read
    kinds = data.draw(st.tuples(*[st.sampled_from([*LAYOUTS, *UNFIT])] * 3))
    one, two, target = ((LAYOUTS | UNFIT)[kind](x) for kind, x in zip(kinds, (a, b, out)))
    before = fetch(one).tobytes(), fetch(two).tobytes()
    products.accumulate(xp, one, two, target, alpha, beta)
    expected = alpha * np.matmul(a, b) + (beta * out if beta else 0.0)
    near(target, expected, np.matmul(abs(a), abs(b)) + (beta * abs(out) if beta else 0.0), dtype)
    assert (fetch(one).tobytes(), fetch(two).tobytes()) == before
    if not lead and not set(kinds) & set(UNFIT):
        assert xp.products.gemm(one, two, target, alpha, beta)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_dot_and_matmul(xp, kind):
    rng = np.random.default_rng(0)
    for shapes in (((4, 3), (3, 5)), ((2, 4, 3), (2, 3, 5)), ((2, 4, 3), (3, 5)), ((2, 1, 4, 3), (1, 3, 3, 5)),
                   ((4, 3), (2, 3, 5))):
        a, b = (rng.standard_normal(shape) for shape in shapes)
        one, two = LAYOUTS[kind](a), LAYOUTS[kind](b)
        near(xp.matmul(one, two), a @ b, abs(a) @ abs(b), "float64")
        if a.ndim == b.ndim == 2:
            out = place(np.full((4, 5), np.nan))
            assert xp.dot(one, two, out=out) is out
            near(out, a @ b, abs(a) @ abs(b), "float64")
    v = place(np.arange(3.0))
    assert fetch(xp.dot(v, v)) == 5.0 and xp.matmul(place(a), v).shape == (4,)  # vectors are CuPy's


def test_what_cublas_does_not_take_is_left_to_cupy(xp):
    def fits(a, b, out, dtype="float32"):
        return xp.products.gemm(*(place(np.ones(shape), dtype) for shape in (a, b, out)))

    assert fits((2, 3), (3, 4), (2, 4)) and fits((5, 2, 3), (3, 4), (5, 2, 4))
    for shapes in (((0, 3), (3, 4), (0, 4)), ((2, 0), (0, 4), (2, 4)), ((2, 3), (3, 4), (2, 5)), ((2, 3), (4, 4), (2, 4)),
                   ((5, 2, 3), (6, 3, 4), (5, 2, 4)), ((5, 2, 3), (3, 4), (2, 4)), ((1, 2, 3), (3, 4), (0, 2, 4)),
                   ((3,), (3, 4), (2, 4)), ((2, 3), (3,), (2,)), ((), (), ())):
        assert not fits(*shapes)
    for dtype in ("float16", "complex64", "int64"):
        assert not fits((2, 3), (3, 4), (2, 4), dtype)
    one = place(np.ones((2, 2)), "float32")
    assert not xp.products.gemm(one, place(np.ones((2, 2))), one)
    spread = xp.broadcast_to(place(np.ones((1, 2, 2)), "float32"), (3, 2, 2))
    assert xp.products.gemm(spread, one, place(np.ones((3, 2, 2)), "float32")) and not xp.products.gemm(spread, one, spread)
    for shape in ((0, 3), (3, 0)):
        assert xp.dot(place(np.ones(shape)), place(np.ones(shape[::-1]))).shape == (shape[0],) * 2


def test_a_plan_is_made_once(xp, monkeypatch):
    """For shapes, strides and dtypes, whatever the factors and the addresses are; for what cuBLAS does not take, too."""
    own = xp.products
    own.plans.clear()
    a, b, out = (place(np.random.default_rng(0).standard_normal((4, 4)), "float32") for _ in range(3))
    for i in range(9):
        assert own.gemm(a, b if i % 2 else b.copy(), out, float(i), float(-i)) and not own.gemm(a[:, ::2], b[::2, ::2], out)
    assert len(own.plans) == 2 and list(own.plans.values())[1] is None
    monkeypatch.setattr(own, "plan", None)  # not called again
    own.gemm(a, b, out, 3.0)
    near(out, 3.0 * fetch(a) @ fetch(b), 3.0 * abs(fetch(a)) @ abs(fetch(b)), "float32")


@given(data=st.data(), factors=st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, -0.5, 3.0])] * 2), min_size=1, max_size=3))
def test_equal_shapes_with_other_strides_factors_and_dtypes_in_turn(xp, data, factors):
    rng = np.random.default_rng(0)
    for alpha, beta in factors * 2:
        dtype = data.draw(st.sampled_from(["float32", "float64"]))
        a, b, out = (rng.standard_normal((3, 3)).astype(dtype) for _ in range(3))
        kinds = data.draw(st.tuples(*[st.sampled_from([*LAYOUTS, *UNFIT])] * 3))
        one, two, target = ((LAYOUTS | UNFIT)[kind](x) for kind, x in zip(kinds, (a, b, out)))
        products.accumulate(xp, one, two, target, alpha, beta)
        near(target, alpha * (a @ b) + beta * out, abs(alpha) * (abs(a) @ abs(b)) + abs(beta * out), dtype)


def test_plans_are_bounded(xp, monkeypatch):
    monkeypatch.setattr(products, "PLANS", 3)
    own = xp.products
    own.plans.clear()
    for n in (1, 2, 3, 4, 5, 4, 1):
        x = place(np.ones((n, n)), "float32")
        assert fetch(xp.dot(x, x)).tolist() == [[n] * n] * n and len(own.plans) <= 3


def test_another_precision_makes_another_plan():
    """Nobody multiplies in TF32 after it was switched off."""
    with standin.card() as device:
        own, x = device.xp.products, place(np.ones((2, 2)), "float32")
        device.xp.dot(x, x)
        before = own.compute["f"]
        own.compute["f"] = products.TF32
        device.xp.dot(x, x)
        assert own.library.kinds[-1] == (0, products.TF32)
        own.compute["f"] = before
        assert fetch(device.xp.dot(x, x)).tolist() == [[2.0, 2.0]] * 2


def test_threads_have_handles_and_plans_of_their_own(xp):
    rng = np.random.default_rng(0)
    pairs = [[rng.standard_normal(shape).astype("float32") for shape in ((5, 7), (7, 3))] for _ in range(4)]
    own, seen, wrong, device = xp.products, set(), [], backend.current_device().name

    def work(a, b):
        with backend.use(device):
            one, two, out = place(a), place(b), place(np.zeros((5, 3)), "float32")
            for i in range(30):
                if not own.gemm(one, two, out, float(i)) or abs(fetch(out) - i * (a @ b)).max() > 1e-4:
                    wrong.append(i)
            seen.add((own.handle.value, id(own.plans)))

    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(seen) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bias_is_added_to_every_row(xp, layout):
    rng = np.random.default_rng(0)
    for lead in ((), (3,)):
        a, b, out, bias = (rng.standard_normal(shape).astype("float32")
                           for shape in ((*lead, 4, 5), (*lead, 5, 6), (*lead, 4, 6), (6,)))
        target = LAYOUTS[layout](out)
        for given_bias in (place(bias), place(np.repeat(bias, 2))[::2], place(bias[::-1].copy())[::-1]):
            target[...] = place(out)
            assert xp.products.gemm(LAYOUTS[layout](a), LAYOUTS[layout](b), target, -0.5, 2.0, given_bias)
            near(target, -0.5 * (a @ b) + 2.0 * out + bias, abs(a) @ abs(b) + 2.0 * abs(out) + abs(bias), "float32")
    before = fetch(target)
    for wrong in (np.ones(5), np.ones((1, 6)), np.ones((6, 1)), np.ones(()), np.ones(1)):
        assert not xp.products.gemm(place(a), place(b), target, bias=place(wrong, "float32"))
    assert not xp.products.gemm(place(a), place(b), target, bias=place(bias, "float64"))
    assert not xp.products.gemm(place(a), place(b, "float64"), target, bias=place(bias))
    np.testing.assert_array_equal(fetch(target), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_products_are_those_of_cupy(dtype):
    """The shapes of the main job and of GPT-2, whole and as attention splits them."""
    need_gpu()
    import cupy
    rng = np.random.default_rng(0)
    with backend.use("gpu") as device:
        for n, k, m in ((128, 1001, 1000), (128, 1001, 1), (1000, 128, 1), (1, 128, 1001), (128, 1, 1000), (4096, 768, 2304)):
            a, b = (place(rng.standard_normal(shape), dtype) for shape in ((n, k), (k, m)))
            bound = 8 * k ** 0.5 * float(np.finfo(dtype).eps)
            for x, y in ((a, b), (cupy.asfortranarray(a), b), (a, cupy.asfortranarray(b))):
                assert float(abs(device.xp.dot(x, y) - cupy.dot(x, y)).max()) <= bound * math.sqrt(k)
        qkv = place(rng.standard_normal((2, 64, 3, 12, 64)), dtype)
        q, k = (qkv[:, :, i].swapaxes(1, 2) for i in range(2))
        assert float(abs(device.xp.matmul(q, k.swapaxes(-1, -2)) - cupy.matmul(q, k.swapaxes(-1, -2))).max()) < 1e-3


def test_the_stream_is_followed_and_has_a_workspace(monkeypatch):
    with standin.card() as device:
        own, x = device.xp.products, place(np.ones((2, 2)), "float32")
        device.xp.dot(x, x)
        handle = own.handle.value
        assert own.library.streams == {handle: 0} and own.library.workspaces[handle][1] == products.WORKSPACE
        monkeypatch.setattr(device.xp.cuda, "get_current_stream", lambda: standin.streams.Stream(7))
        device.xp.dot(x, x)
        assert own.library.streams == {handle: 7} and own.library.workspaces[handle] is not None and len(own.workspaces) == 2
        first = own.workspaces[0]
        monkeypatch.setattr(device.xp.cuda, "get_current_stream", lambda: standin.streams.Stream(0))
        device.xp.dot(x, x)
        assert own.workspaces[0] is first and own.library.workspaces[handle][0] == first.data.ptr


def test_a_refusal_of_cublas_is_an_error(monkeypatch):
    with standin.card() as device:
        monkeypatch.setattr(device.xp.products.library, "cublasGemmEx", lambda *arguments: 13)
        with pytest.raises(RuntimeError, match="cublasGemmEx returned the status 13"):
            device.xp.dot(*[place(np.ones((2, 2)), "float32")] * 2)


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_without_a_library_cupy_multiplies(error, monkeypatch):
    def missing():
        raise error("no cuBLAS")

    monkeypatch.setattr(products, "load", missing)
    assert products.with_own_products(standin.xp) is standin.xp
    assert GPU(standin.xp).xp is standin.xp


@pytest.mark.parametrize("fault", ["status", "value"])
def test_a_library_that_does_not_work_is_left_alone_and_said(fault, monkeypatch):
    class Faulty(standin.Library):
        def cublasGemmEx(self, *arguments):
            return 15 if fault == "status" else 0  # not supported; or nothing is written

    monkeypatch.setattr(products, "load", Faulty)
    with pytest.warns(RuntimeWarning, match="status 15" if fault == "status" else "dot gave .*nan.* in the place of"):
        assert GPU(standin.xp).xp is standin.xp


def test_a_main_step_asks_no_product_of_cupy():
    with standin.card(), standin.counting() as counts:
        x, layer = place(np.ones((8, 5)), "float32"), minilora.lora.adapt(minilora.nn.Linear(5, 4), r=2, lora_alpha=2)
        minilora.ops.mse(layer(x), place(np.ones((8, 4)), "float32")).backward()
    assert counts.calls["gemm"] == 6 and not counts.calls["dot"] + counts.calls["matmul"] + counts.calls["copy"]


def test_the_library_is_called_as_it_is_declared(monkeypatch):
    """ctypes checks the number and the kinds of arguments where there is a library: here one of functions that do nothing."""
    class Function:
        argtypes = None

    class Loaded:
        cublasCreate_v2, cublasSetStream_v2, cublasSetWorkspace_v2 = Function(), Function(), Function()
        cublasGemmEx, cublasGemmStridedBatchedEx = Function(), Function()

    pathfinder = types.SimpleNamespace(load_nvidia_dynamic_lib=lambda name: types.SimpleNamespace(abs_path=f"lib{name}.so"))
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Loaded())
    library = products.load()
    kinds = library.cublasGemmEx.argtypes, library.cublasGemmStridedBatchedEx.argtypes
    calls = []
    with standin.card() as device:
        real = device.xp.products.library
        for name, declared in zip(("cublasGemmEx", "cublasGemmStridedBatchedEx"), kinds):
            prototype = ctypes.CFUNCTYPE(ctypes.c_int, *declared)

            def checked(*arguments, prototype=prototype, call=getattr(real, name)):
                assert prototype(lambda *given: calls.append(len(given)) or 0)(*arguments) == 0
                return call(*arguments)
            monkeypatch.setattr(real, name, checked)
        x = place(np.ones((3, 2, 2)), "float32")
        device.xp.matmul(x, x), device.xp.dot(x[0], x[0])
    assert calls == [len(kinds[1]), len(kinds[0])] == [23, 19]
