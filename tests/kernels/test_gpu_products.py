"""The binding to cuBLAS, against NumPy: with a pretended library that checks what it is given, and on a real GPU (-m gpu)."""
import ctypes
import gc
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
from minilora.kernels.cublas import library as cublas, light, operands, products


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


# -- the bias inside of the product: cublasLt ---------------------------------------------------------------------------


def biased(dtype="float32", n=4, k=5, m=6, seed=0):
    """Host arrays a, b, out, bias."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((n, k), (k, m), (n, m), (m,))]


def bound(a, b, out, bias, alpha, beta):
    """How far two ways to compute alpha a b + beta out + bias may lie apart: each rounds a number k + 4 times at most.

    A summand a_i b_i takes part in one product, in k - 1 sums in whatever order, and then in those with alpha, beta out and the
    bias; (1 + u)^n - 1 <= n u / (1 - n u) with u = eps / 2 (Higham, Accuracy and stability, 3.1), from either side.
    """
    rounded = (a.shape[-1] + 4) * float(np.finfo(out.dtype).eps) / 2
    size = abs(alpha) * (abs(a).astype("float64") @ abs(b)) + abs(beta) * abs(out) + abs(bias)
    return 2.0 * rounded / (1.0 - rounded) * size


def is_fused(xp):
    """Whether cublasLt has taken the product that was asked for last."""
    return list(xp.products.fused_plans.values())[-1] is not None


@given(data=st.data(), n=sizes, k=sizes, m=sizes, dtype=st.sampled_from(["float32", "float64"]),
       alpha=st.sampled_from([1.0, -0.5, 0.0]), beta=st.sampled_from([0.0, 1.0, 2.0]))
def test_a_product_with_its_bias_is_the_product_and_the_bias(xp, data, n, k, m, dtype, alpha, beta):
    hosts = biased(dtype, n, k, m, n + 10 * k + 100 * m)
    a, b, out, bias = hosts
    kinds = data.draw(st.tuples(*[st.sampled_from([*LAYOUTS])] * 3))
    one, two, target, separate = (LAYOUTS[kind](x) for kind, x in zip([*kinds, kinds[-1]], (a, b, out, out)))
    add = place(bias)
    if beta == 0.0:
        target.fill(np.nan), separate.fill(np.nan)  # are not read
    assert xp.products.gemm(one, two, target, alpha, beta, add) and xp.products.gemm(one, two, separate, alpha, beta)
    separate += add
    limit = bound(*hosts, alpha, beta)
    assert (abs(fetch(target) - fetch(separate)) <= limit).all()
    assert (abs(fetch(target) - (alpha * (a.astype("float64") @ b) + (beta * out if beta else 0.0) + bias)) <= limit).all()


@pytest.fixture
def lt():
    """The pretended cublasLt of the stand-in as the current device, after the trial of a new device."""
    with standin.card() as device:
        device.xp.products.fused_plans.clear()
        yield device.xp.products.light.library


def once(own, hosts=None, fused=True, launches=1):
    """One product with a bias is right, and this is how it was made."""
    a, b, out, bias = hosts or biased()
    arrays = [place(x) for x in (a, b, out, bias)]
    with standin.counting() as counts:
        assert own.gemm(*arrays[:3], 2.0, 0.5, arrays[3])
    near(arrays[2], 2.0 * (a @ b) + 0.5 * out + bias, 2.0 * abs(a) @ abs(b) + abs(out) + abs(bias), out.dtype)
    assert counts.launches == launches == (1 if fused else 2), counts


def test_one_launch_and_the_layouts_that_are_read(lt):
    own = backend.current_device().xp.products
    once(own)
    left, right, out, stream = lt.calls[-1]
    assert [x["ld"] for x in (left, right, out)] == [6, 5, 6] and (out["rows"], out["columns"], stream) == (6, 4, 0)
    once(own, biased("float64"))
    a, b, out, bias = (place(x) for x in biased())
    for one, two in ((LAYOUTS["columns"](fetch(a)), b), (a, LAYOUTS["left part"](fetch(b)))):
        target = LAYOUTS["left part"](fetch(out))
        assert own.gemm(one, two, target, bias=bias) and is_fused(backend.current_device().xp)
        near(target, fetch(a) @ fetch(b) + fetch(bias), abs(fetch(a)) @ abs(fetch(b)) + 3, "float32")
    assert not own.gemm(a[:, :0], b[:0], out, bias=bias) and not is_fused(backend.current_device().xp)


def test_16_bits_with_a_bias_in_float32(lt):
    own = backend.current_device().xp.products
    a, b, out, bias = biased()
    halves = [place(x, "float16") for x in (a, b)]
    assert own.gemm(*halves, target := place(out), bias=place(bias)) and len(lt.calls) == 2  # and the trial's
    a, b = (fetch(x).astype("float32") for x in halves)
    near(target, a @ b + bias, abs(a) @ abs(b) + abs(bias), "float32")


def test_the_algorithm_is_asked_for_once(lt):
    own, before = backend.current_device().xp.products, lt.asked
    for seed in range(5):
        once(own, biased(seed=seed))
    aligned = len(own.fused_plans)  # at 16 bytes or at more: as the memory fell
    assert lt.asked == before + aligned and 1 <= aligned <= 2


def test_what_is_made_is_given_back(lt):
    own = backend.current_device().xp.products
    gc.collect()
    before = len(lt.made)
    for m in (1, 4, 8):
        once(own, biased(m=m))
    assert len(lt.made) > before
    own.fused_plans.clear()
    gc.collect()
    assert len(lt.made) == before
    lt.answers = 0
    once(own, fused=False, launches=2)
    gc.collect()
    assert len(lt.made) == before


def test_plans_with_a_bias_are_bounded(lt, monkeypatch):
    monkeypatch.setattr(products, "PLANS", 2)
    own = backend.current_device().xp.products
    for m in (1, 2, 3, 4, 1):
        once(own, biased(m=m))
        assert len(own.fused_plans) <= 2


CALLS = [*(f"cublasLt{kind}Create" for kind in ("MatmulDesc", "MatrixLayout", "MatmulPreference")),
         "cublasLtMatmulDescSetAttribute", "cublasLtMatmulPreferenceSetAttribute", "cublasLtMatmulAlgoGetHeuristic",
         "cublasLtMatmul"]


@pytest.mark.parametrize("status", [3, 7, 8, 13, 14, 15])
@pytest.mark.parametrize("call", CALLS)
def test_where_cublaslt_refuses_the_bias_has_its_own_launch(call, status, lt):
    """It is asked once. An error is only what has gone wrong in the product itself."""
    own = backend.current_device().xp.products
    lt.failing[call] = status
    if call == "cublasLtMatmul" and status not in (7, 8, 15):
        with pytest.raises(RuntimeError, match=f"cublasLtMatmul returned the status {status}"):
            once(own)
        return
    once(own, fused=False, launches=2)
    (plan,) = own.fused_plans.values()
    lt.failing.clear()
    arrays, key = [place(x) for x in biased()], own.fused_plans.copy()
    own.gemm(*arrays[:3], bias=arrays[3])
    assert plan is None and (own.fused_plans == key or len(own.fused_plans) == 2)  # at 16 bytes, or at more


def test_a_heuristic_that_fails_while_a_stream_records_is_asked_again(lt):
    own, xp = backend.current_device().xp.products, backend.current_device().xp
    a, b, out, bias = (place(x) for x in biased())
    stream = xp.cuda.Stream()
    with stream:
        own.follow()
        stream.begin_capture()
        assert own.gemm(a, b, out, bias=bias)
        graph = stream.end_capture()
        assert not own.fused_plans
        before = fetch(out)
        graph.launch()
        assert (fetch(out) != before).any()
    once(own)


def test_a_product_with_a_bias_is_recorded_and_replayed(lt):
    own, xp = backend.current_device().xp.products, backend.current_device().xp
    a, b, out, bias = (place(x) for x in biased())
    stream = xp.cuda.Stream()
    with stream:
        own.gemm(a, b, out, bias=bias)
        expected = fetch(out)
        stream.begin_capture()
        own.gemm(a, b, out, bias=bias)
        graph = stream.end_capture()
        out.fill(np.nan)
        graph.launch()
    np.testing.assert_array_equal(fetch(out), expected)
    assert lt.calls[-1][-1] == stream.ptr
    bias.fill(0.0)
    graph.launch()
    np.testing.assert_allclose(fetch(out), expected - biased()[3], atol=1e-6)


def test_memory_that_begins_elsewhere_is_not_handed_over(lt):
    """At no multiple of 16 bytes: the pretended library would say that a kernel reads at a misaligned address."""
    own = backend.current_device().xp.products
    for shifted in range(4):
        hosts = biased()
        arrays = [place(x) for x in hosts]
        x = hosts[shifted]
        arrays[shifted] = place(np.concatenate([[0.0], x.ravel()]), "float32")[1:].reshape(x.shape)
        before = len(lt.calls)
        assert own.gemm(*arrays[:3], bias=arrays[3]) and len(lt.calls) == before
        near(arrays[2], hosts[0] @ hosts[1] + hosts[3], abs(hosts[0]) @ abs(hosts[1]) + abs(hosts[3]), "float32")


def test_biases_take_turns(lt):
    """Layers of one shape share a plan, and have a bias each."""
    own = backend.current_device().xp.products
    a, b, out, _ = (place(x) for x in biased())
    biases = [place(np.full(6, i), "float32") for i in range(3)]
    for i in (0, 1, 1, 2, 0, 2):
        own.gemm(a, b, out, bias=biases[i])
        near(out, fetch(a) @ fetch(b) + i, abs(fetch(a)) @ abs(fetch(b)) + i, "float32")


def test_a_bias_of_which_cublaslt_was_not_told_is_not_taken_for_known(lt):
    own = backend.current_device().xp.products
    a, b, out, _ = (place(x) for x in biased())
    biases = [place(np.full(6, i), "float32") for i in range(2)]
    own.gemm(a, b, out, bias=biases[0])
    for status in (3, 0, 0):
        lt.failing["cublasLtMatmulDescSetAttribute"] = status
        own.gemm(a, b, out, bias=biases[1])
        near(out, fetch(a) @ fetch(b) + 1.0, abs(fetch(a)) @ abs(fetch(b)) + 1.0, "float32")


TAMPERED = {  # what the pages forbid, and the status that says so
    "ld of the left": (dict(ld_left=5), 7), "ld of the right": (dict(ld_right=4), 7), "ld of the output": (dict(ld_out=5), 7),
    "no rows": (dict(m=0), 7), "no columns": (dict(n=0), 7), "nothing to add up": (dict(k=0), 7),
    "no such transposition": (dict(op_right=3), 7),
    "types that do not go together": (dict(kind=1), 15), "no such type": (dict(kind=77), 15),
    "no such precision": (dict(compute=5), 15), "no such epilogue": (dict(epilogue=77), 15), "no bias": (dict(bias=0), 7),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_the_pretended_library_refuses_what_the_pages_forbid(what, lt, monkeypatch):
    changed, status = TAMPERED[what]
    own = backend.current_device().xp.products
    a, b, out, bias = (place(x) for x in biased())
    given = operands.operands(a, b, out)
    light.Fused(own.light, given, 68, 16, bias.data.ptr)  # as it should be
    monkeypatch.setattr(light, "BIAS", changed.get("epilogue", light.BIAS))
    compute, address = changed.get("compute", 68), changed.get("bias", bias.data.ptr)
    if not address:
        monkeypatch.setattr(light, "DEFAULT", light.BIAS)
    made = {key: value for key, value in changed.items() if key in given._fields}
    with pytest.raises(light.Refused, match=f"cublasLtMatmulAlgoGetHeuristic returned the status {status}") as error:
        light.Fused(own.light, given._replace(**made), compute, 16, address)
    assert not error.value.failed


def test_attributes_have_sizes_and_memory_has_ends(lt):
    own = backend.current_device().xp.products
    a, b, out, bias = (place(x) for x in biased())
    plan = light.Fused(own.light, operands.operands(a, b, out), 68, 16, bias.data.ptr)
    for kind, made, attribute, value in (("cublasLtMatmulDesc", plan.operation, light.EPILOGUE, ctypes.c_uint64(4)),
                                         ("cublasLtMatmulDesc", plan.operation, 99, ctypes.c_uint32(4))):
        with pytest.raises(light.Refused, match="SetAttribute returned the status 7"):
            plan.set(kind, made, attribute, value)
    with pytest.raises(standin.CUBLASError, match="beyond an array"):
        plan(b.data.ptr, bias.data.ptr, out.data.ptr, 1.0, 0.0, bias.data.ptr)  # a is larger than what lies there
    with pytest.raises(AssertionError, match="misaligned"):
        plan(b.data.ptr, a.data.ptr, out.data.ptr, 1.0, 0.0, bias[1:].data.ptr)


def test_tf32_is_for_who_asked_for_it(lt):
    own = backend.current_device().xp.products
    once(own)
    assert {x["compute"] for x in lt.made.values() if x["kind"] == "desc"} == {68}
    own.compute["f"] = products.TF32
    a, b, out, bias = (place(x) for x in biased())
    own.gemm(a, b, out, bias=bias)
    assert sorted({x["compute"] for x in lt.made.values() if x["kind"] == "desc"}) == [68, 77]
    own.gemm(*(place(x) for x in biased("float64")[:3]), bias=place(biased("float64")[3]))
    assert sorted({x["compute"] for x in lt.made.values() if x["kind"] == "desc"}) == [68, 70, 77]


def test_threads_have_descriptors_of_their_own(lt):
    own, handles = backend.current_device().xp.products, set()

    def work(seed):
        with backend.use("card"):
            once(own, biased(seed=seed))
            handles.add((own.light.handle.value, id(own.fused_plans)))

    for i in range(3):
        thread = threading.Thread(target=work, args=(i,))
        thread.start()
        thread.join()
    assert len(handles) == 3


@pytest.fixture
def everywhere(xp):
    """Products that go through cublasLt without a bias, too."""
    own = products.Products(xp, xp.products.library, xp.products.light.library)
    own.everything = True
    return own


@given(data=st.data(), n=sizes, k=sizes, m=sizes, dtype=st.sampled_from(["float32", "float64"]))
def test_all_products_may_go_through_cublaslt(everywhere, data, n, k, m, dtype):
    a, b, out, _ = biased(dtype, n, k, m)
    one, two, target = (LAYOUTS[data.draw(st.sampled_from([*LAYOUTS]))](x) for x in (a, b, out))
    assert everywhere.gemm(one, two, target, 2.0, -1.0) and everywhere.gemm(one, two, target, 1.0, 0.0)
    near(target, a @ b, abs(a) @ abs(b), dtype)
    assert None not in everywhere.fused_plans.values() or backend.current_device().name == "gpu"


def test_without_cublaslt_the_bias_has_its_own_launch():
    with standin.card(light=lambda: None) as device:
        assert device.xp.products.light is None
        once(device.xp.products, fused=False, launches=2)


def test_a_cublaslt_that_computes_wrongly_is_left_alone_and_said():
    class Faulty(standin.Light):
        def cublasLtMatmul(self, *arguments):
            return 0  # nothing is written

    with pytest.warns(RuntimeWarning, match="a launch of its own, because cublasLt .*a product with a bias gave .*nan"):
        with standin.card(light=Faulty) as device:
            assert device.xp.products.light is None
            once(device.xp.products, fused=False, launches=2)


def test_a_cublaslt_that_fails_is_left_alone_and_said():
    with pytest.warns(RuntimeWarning, match="cublasLtMatmul returned the status 13"):
        with standin.card(light=lambda: standin.Light({"cublasLtMatmul": 13})) as device:
            assert device.xp.products.light is None


def test_cublaslt_is_called_as_it_is_declared(monkeypatch):
    """ctypes checks the number and the kinds of arguments where there is a library: here one of functions that do nothing."""
    class Function:
        argtypes = None

    class Loaded:
        def __getattr__(self, name):
            assert name in light.KINDS
            setattr(self, name, Function())
            return getattr(self, name)

    monkeypatch.setattr(cublas, "found", lambda name: {"cublasLt": Loaded()}[name])
    loaded, calls = products.load_light(), []

    class Checked(standin.Light):
        def __getattr__(self, name):
            return self.checked(name, super().__getattr__(name))

        def cublasLtMatmulAlgoGetHeuristic(self, *arguments):
            return self.checked("cublasLtMatmulAlgoGetHeuristic", super().cublasLtMatmulAlgoGetHeuristic)(*arguments)

        def cublasLtMatmul(self, *arguments):
            return self.checked("cublasLtMatmul", super().cublasLtMatmul)(*arguments)

        def checked(self, name, call):
            prototype = ctypes.CFUNCTYPE(ctypes.c_int, *getattr(loaded, name).argtypes)

            def both(*arguments):
                assert prototype(lambda *given: calls.append(name) or 0)(*arguments) == 0
                return call(*arguments)
            return both if name in light.KINDS else call

    with standin.card(light=Checked) as device:
        once(device.xp.products)
        device.xp.products.fused_plans.clear()
        gc.collect()
    assert set(calls) == set(light.KINDS)


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_a_cublaslt_that_is_missing_or_old_is_none(error, monkeypatch):
    def missing(name):
        if error is OSError:
            raise OSError(name)
        return object()

    monkeypatch.setattr(cublas, "found", missing)
    assert products.load_light() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_a_card_large_products_with_a_bias(dtype):
    """The layers of GPT-2 and of the main job: within the bound, and the same bits every time and in a recorded graph."""
    need_gpu()
    import cupy
    with backend.use("gpu") as device:
        own = device.xp.products
        assert own.light is not None, "cublasLt was not found, or multiplied wrongly"
        for n, k, m in ((512, 768, 2304), (512, 3072, 768), (128, 1001, 1000), (1, 768, 768), (33, 1, 7)):
            hosts = biased(dtype, n, k, m)
            one, two, target, add = place(hosts[0]), place(hosts[1].T.copy()).T, place(hosts[2]), place(hosts[3])
            separate = place(hosts[2])
            stream = cupy.cuda.Stream(non_blocking=True)
            device.synchronize()
            with stream:
                assert own.gemm(one, two, target, 0.5, 0.0, add) and own.gemm(one, two, separate, 0.5, 0.0)
                separate += add
                first = fetch(target)
                assert (abs(first - fetch(separate)) <= bound(*hosts, 0.5, 0.0)).all()
                if dtype == "float32" and n > 33:
                    assert is_fused(device.xp), f"cublasLt has nothing for {n} x {k} x {m}"
                stream.begin_capture()
                own.gemm(one, two, target, 0.5, 0.0, add)
                graph = stream.end_capture()
                for _ in range(3):
                    target.fill(math.nan)
                    graph.launch(stream)
                    assert fetch(target).tobytes() == first.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("through", ["cublasGemmEx", "cublasLt"])
def test_on_a_card_float32_is_float32(through):
    """1 + 2^-12 needs 13 bits of a significand, and TF32 has 11: it would be 1."""
    need_gpu()
    with backend.use("gpu", tf32=False) as device:
        x, one = place(np.full((256, 256), 1 + 2.0 ** -12), "float32"), place(np.eye(256), "float32")
        bias = place(np.zeros(256), "float32") if through == "cublasLt" else None
        out = device.xp.empty((256, 256), dtype="float32")
        assert device.xp.products.gemm(x, one, out, bias=bias)
        assert (fetch(out) == 1 + 2.0 ** -12).all()


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


@pytest.mark.parametrize(("r", "asked"), [(2, 1), (17, 6)])  # thin products up to 16 have kernels of their own
def test_a_main_step_asks_no_product_of_cupy(r, asked):
    with standin.card(), standin.counting() as counts:
        x, layer = place(np.ones((8, 5)), "float32"), minilora.lora.adapt(minilora.nn.Linear(5, 4), r=r, lora_alpha=2)
        minilora.ops.mse(layer(x), place(np.ones((8, 4)), "float32")).backward()
    assert counts.calls["gemm"] == asked and not counts.calls["dot"] + counts.calls["matmul"] + counts.calls["copy"]


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


def drawn_view(rng, shape, dtype, written):
    """An array of the device and its numbers: axes in any order, steps of 2 and backwards, gaps, and axes repeated by 0."""
    order = tuple(map(int, rng.permutation(len(shape))))
    steps = [int(rng.choice([1, 1, 1, 2, -1, -2])) for _ in shape]
    repeated = [not written and rng.random() < 0.1 for _ in shape]
    starts = [int(rng.integers(3)) for _ in shape]
    sizes = [1 if again else start + abs(step) * max(n - 1, 0) + 1 + int(rng.integers(3))
             for n, step, start, again in zip(shape, steps, starts, repeated)]
    memory = rng.integers(-3, 4, [sizes[axis] for axis in order]).astype(dtype)
    back = tuple(map(int, np.argsort(order)))
    places = []
    for n, step, start, again in zip(shape, steps, starts, repeated):
        first, last = (start, start + step * (n - 1)) if step > 0 else (start - step * (n - 1), start)
        end = last + (1 if step > 0 else -1)
        places.append(slice(None) if again else slice(0, 0) if n == 0 else slice(first, end if end >= 0 else None, step))
    there, here = (array.transpose(back)[tuple(places)] for array in (place(memory), memory))
    if not any(repeated):
        return there, here
    return backend.current_device().xp.broadcast_to(there, shape), np.broadcast_to(here, shape)


@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20)]])
def test_any_strides_at_all(xp, seed):
    """Small whole numbers, so that every sum is exact: the numbers of NumPy, or, with a bias, left alone."""
    rng = np.random.default_rng(seed)
    for _ in range(150):
        lead = [(), (), (1,), (3,), (2, 3), (2, 1, 2), (0,), (3, 1)][rng.integers(8)]
        fronts = [[lead, tuple(1 if rng.random() < 0.5 else n for n in lead), lead[int(rng.integers(len(lead) + 1)):], ()][
            rng.integers(4)] for _ in range(2)]
        n, k, m = (int(rng.choice([0, 1, 1, 2, 3, 5])) for _ in range(3))
        alpha, beta = [(1.0, 0.0), (1.0, 1.0), (-0.5, 2.0), (0.0, 1.0), (2.0, 0.0)][rng.integers(5)]
        dtype = str(rng.choice(["float32", "float64"]))
        (a, one), (b, two), (out, before) = (drawn_view(rng, shape, dtype, written) for shape, written in (
            ((*fronts[0], n, k), False), ((*fronts[1], k, m), False), ((*lead, n, m), True)))
        expected = alpha * np.matmul(one, two) + (beta * before if beta else 0.0)
        if expected.shape != before.shape:
            continue  # neither of the two reaches along all that leads
        described = a.shape, a.strides, b.shape, b.strides, out.shape, out.strides, alpha, beta
        if rng.random() < 0.3:
            bias, more = drawn_view(rng, (m,), dtype, False)
            done = xp.products.gemm(a, b, out, alpha, beta, bias)
            expected = expected + more if done else before
        else:
            products.accumulate(xp, a, b, out, alpha, beta)
        assert np.array_equal(fetch(out), expected), described
