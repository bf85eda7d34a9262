"""The switch for TF32, without a GPU: what it takes, who is told, what it leaves alone; and what TF32 costs in digits."""
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import standin
from conftest import fetch, place
from hypothesis import given, strategies as st

import minilora
from minilora import backend, lora, nn, ops, quant, tensor_cores, testing
from minilora.errors import ConfigError, DeviceError
from minilora.lora.algebra.angles import principal_angles
from minilora.lora.algebra.combine import svd
from minilora.lora.algebra.compress import recompress
from minilora.lora.algebra.subspaces import subspace_similarity
from minilora.train.checkpoints.identity import on_tensor_cores

EXACT, TF32 = (0, 68), (0, 77)  # of cuBLAS: the dtype of the factors and how it computes


@pytest.fixture
def undecided(monkeypatch):
    """Nobody has chosen yet."""
    monkeypatch.delenv("MINILORA_TF32", raising=False)
    monkeypatch.delenv("CUPY_TF32", raising=False)
    before = tensor_cores.TF32.chosen
    tensor_cores.TF32.chosen = None
    yield monkeypatch
    tensor_cores.TF32.chosen = before


def kinds(device, call):
    """What the library was asked for meanwhile."""
    libraries = device.exact._libraries
    for library in libraries:
        del library.kinds[:]
    call()
    return {kind for library in libraries for kind in library.kinds}


def product(dtype="float32"):
    x = place(np.ones((3, 3)), dtype)
    return lambda: backend.device_of(x).xp.dot(x, x)


# -- the switch --------------------------------------------------------------------------------------------------------


def test_by_default_products_are_float32_and_on_request_tf32():
    with standin.card() as device:
        assert not backend.tf32() and not device.in_tf32 and kinds(device, product()) == {EXACT}
        with backend.use("card", tf32=True):
            assert backend.tf32() and device.in_tf32 and kinds(device, product()) == {TF32}
            assert kinds(device, product("float64")) == {(1, 70)}
            with backend.use("card"):  # without the word it stays as it was
                assert kinds(device, product()) == {TF32}
            with backend.use("card", tf32=False):
                assert kinds(device, product()) == {EXACT}
            assert kinds(device, product()) == {TF32}
        assert not device.in_tf32 and kinds(device, product()) == {EXACT}
        backend.use("card", tf32=True)  # a call: what it chose ends with the context around it
        assert device.in_tf32
    assert not backend.tf32()


def test_repr_says_so():
    with standin.card() as device:
        with backend.use("card", tf32=True):
            assert repr(device) == "<Device card: xp, products in TF32>"
        assert repr(device) == "<Device card: xp>"


def test_the_former_choice_comes_back_after_an_error():
    with standin.card() as device:
        with pytest.raises(ZeroDivisionError), backend.use("card", tf32=True):
            1 / 0
        assert not device.in_tf32 and not backend.tf32()


@pytest.mark.parametrize("tf32", [0, 1, "on", np.True_, ()])
def test_other_values_are_refused(tf32):
    with pytest.raises(ConfigError, match=r"tf32 must be True, False or None.*use\('cpu', tf32=True\)"):
        backend.use("cpu", tf32=tf32)


def test_the_cpu_has_none_and_says_so():
    before = backend.current_device()
    with pytest.raises(ConfigError, match=r"the CPU has none.*use\('cpu'\).*use\('gpu', tf32=True\).*use\('auto', tf32=True\)"):
        backend.use("cpu", tf32=True)
    assert not backend.tf32() and backend.current_device() is before
    with backend.use("cpu", tf32=False), backend.use("cpu"):
        assert not backend.tf32()


def test_auto_takes_it_where_it_finds_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "gpu_problem", lambda: "GPU asked for, but there is none")
    with backend.use("auto", tf32=True) as device:
        assert device is backend.cpu and not device.in_tf32 and repr(device) == "<Device cpu: numpy>"
    with pytest.raises(DeviceError):
        backend.use("gpu", tf32=True)
    assert not backend.tf32()


def test_the_switch_stays_while_the_cpu_is_current():
    with standin.card() as device, backend.use("card", tf32=True):
        x = place(np.ones((2, 2)), "float32")
        with backend.use("cpu"):  # an operation follows its arrays
            assert kinds(device, lambda: ops.linear(minilora.Tensor(x), x)) == {TF32}


def test_kernels_and_tf32_do_not_go_together():
    with standin.card() as device:
        with pytest.raises(ConfigError, match=r"TF32 was asked for.*CuPy's own here.*use\('card', kernels=True\)"):
            backend.use("card", kernels=False, tf32=True)
        assert backend.kernels() and not backend.tf32() and hasattr(device.xp, "products")
        with backend.use("card", tf32=True):
            with pytest.raises(ConfigError, match="TF32 was asked for"):
                backend.use("card", kernels=False)
            assert device.in_tf32 and backend.kernels()
            with backend.use("card", kernels=False, tf32=False):
                assert device.xp is device.exact is standin.xp


@pytest.mark.parametrize(("words", "on"), [({}, False), ({"MINILORA_TF32": "on"}, True), ({"MINILORA_TF32": "1"}, True),
                                           ({"CUPY_TF32": "1"}, True), ({"CUPY_TF32": "0"}, False),
                                           ({"CUPY_TF32": "1", "MINILORA_TF32": "off"}, False)], ids=repr)
def test_the_environment_decides_at_the_first_use(words, on, undecided):
    for word, value in words.items():
        undecided.setenv(word, value)
    with standin.card() as device:
        assert backend.tf32() is device.in_tf32 is on and kinds(device, product()) == {TF32 if on else EXACT}
        with backend.use("card", tf32=not on):
            assert kinds(device, product()) == {EXACT if on else TF32}


@pytest.mark.parametrize("word", ["maybe", "ON", "", "true"])
def test_another_word_is_an_error_with_the_line_to_type(word, undecided):
    undecided.setenv("MINILORA_TF32", word)
    with pytest.raises(ConfigError, match=r"MINILORA_TF32 is '.*': expected on or off.*export MINILORA_TF32=on"):
        backend.tf32()
    assert (minilora.tensor([1.0]) + 1.0).item() == 2.0  # the CPU does not ask


def test_cupys_own_word_without_own_products_is_an_error(undecided):
    """CuPy would round factors of merging, too, and cannot be told otherwise once it has read the word."""
    with standin.card():
        undecided.setenv("CUPY_TF32", "1")
        for tf32 in (None, False, True):
            with pytest.raises(ConfigError, match="TF32 (was asked for|is off, but CUPY_TF32=1 is set).*unset CUPY_TF32"):
                backend.use("card", kernels=False, tf32=tf32)
        undecided.delenv("CUPY_TF32")
        with backend.use("card", kernels=False, tf32=False):
            pass


def test_a_process_that_begins_with_the_word():
    code = ("import minilora; minilora.use('cpu'); print(minilora.backend.tf32(), minilora.current_device());"
            "minilora.use('cpu', tf32=False); print(minilora.backend.tf32())")
    env = {**os.environ, "MINILORA_TF32": "on", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True <Device cpu: numpy>\nFalse\n"), done.stderr


def test_threads_compute_while_another_switches():
    stop, errors = threading.Event(), []
    with standin.card() as device:
        x = place(np.full((4, 4), 1.0 + 2.0 ** -20), "float32")
        cut, whole = 4.0, np.dot(fetch(x), fetch(x))[0, 0]

        def compute():
            try:
                while not stop.is_set():
                    assert fetch(device.xp.dot(x, x))[0, 0] in (cut, whole)
                    assert fetch(device.exact.dot(x, x))[0, 0] == whole
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=compute) for _ in range(2)]
        for thread in threads:
            thread.start()
        for i in range(100):
            backend.use("card", tf32=i % 2 == 0)
            assert fetch(device.xp.dot(x, x))[0, 0] == (whole, cut)[i % 2 == 0]
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


# -- what it reaches, and what not -------------------------------------------------------------------------------------


def model():
    made = nn.GPT2(nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2), rng=0)
    lora.inject(made, lora.Config(r=2, target_modules="all-linear", init_lora_weights=False), rng=0)
    return made


def test_every_product_of_a_step_is_in_tf32():
    ids = np.arange(8)[None] % 11
    with standin.card() as device, backend.use("card", tf32=True):
        trained = model()
        assert kinds(device, lambda: trained.loss(ids, ids).backward()) == {TF32}
        with standin.counting() as counts:
            trained.loss(ids, ids).backward()
        assert not counts.calls["dot"] + counts.calls["matmul"]


def test_stacks_of_matrices_follow():
    with standin.card() as device, backend.use("card", tf32=True):
        a, b = (minilora.Parameter(place(np.ones(shape), "float32")) for shape in ((2, 3, 4), (2, 4, 5)))
        assert kinds(device, lambda: (a @ b).sum().backward()) == {TF32}


def test_merging_and_the_algebra_are_exact_whatever_is_chosen():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 6)).astype("float32"), rng.standard_normal((5, 2)).astype("float32")
    seen = []
    for tf32 in (False, True):
        with standin.card() as device, backend.use("card", tf32=tf32):
            trained = model().eval()
            before = fetch(trained.h[0].attn.c_attn.weight).tobytes()
            got = []

            def exact():
                lora.merge(trained)
                got.append(fetch(trained.h[0].attn.c_attn.weight).tobytes())
                lora.unmerge(trained)
                one, two = (lora.LowRank(place(A), place(f * B), 0.5) for f in (1.0, 2.0))
                for update in (one, recompress(one, r=1).update, svd([one, two], [0.3, 0.7], r=2).update, one.balanced()):
                    got.append(fetch(update.dense()).tobytes())
                got.append((fetch(one.singular_values()).tobytes(), one.norm(), one.inner(two), one.cosine(two)))
                got.append((principal_angles(one, two).tobytes(), subspace_similarity(one, two).grid.tobytes()))
                got.append(fetch(lora.gradient.delta(place(A), place(B), 2.0)).tobytes())
                dora = lora.Linear(6, 5, r=17, use_dora=True, rng=1)  # lengths of more ranks than the kernel takes: by products
                dora.lora_B.data[...] = 0.5
                dora.merge()
                got.append(fetch(dora.weight).tobytes())
                projected = lora.adapt(nn.Linear(6, 5, rng=2), 2, on_output=True, rng=1)
                projected.lora_B.data[...] = 0.5
                projected.merge()
                got.append(fetch(projected.weight).tobytes() + fetch(projected.bias).tobytes())
            assert kinds(device, exact) <= {EXACT, (1, 70)}
            assert fetch(trained.h[0].attn.c_attn.weight).tobytes() == before
            seen.append(got)
    assert seen[0] == seen[1]


def test_a_recorded_step_is_recorded_for_what_is_chosen():
    x = np.full((2, 2), 1.0 + 2.0 ** -20, "float32")
    with standin.card():
        read, write = os.pipe()  # nobody sees that the step changes something, which a step that is recorded may not

        @minilora.record
        def step(x):
            os.write(write, b"1" if backend.tf32() else b"0")
            return ops.matmul(minilora.Tensor(x), minilora.Tensor(x))

        given = place(x)
        for tf32, value, times in ((False, np.dot(x, x)[0, 0], 2), (True, 2.0, 2), (False, np.dot(x, x)[0, 0], 0)):
            with backend.use("card", tf32=tf32):
                assert {fetch(step(given))[0, 0] for _ in range(4)} == {value}
                os.write(write, b".")
                assert os.read(read, 9) == b"01"[tf32:][:1] * times + b"."  # called, recorded, replayed; kept for the next time
        os.close(read), os.close(write)


def test_both_kinds_of_products_share_the_memory_of_a_stream():
    with standin.card() as device:
        exact, other = device.exact.products, device.exact.in_tf32.products
        x = place(np.ones((2, 2)), "float32")
        device.exact.dot(x, x), device.exact.in_tf32.dot(x, x)
        assert other.workspaces is exact.workspaces and len(exact.workspaces) == 1 and other.handle.value != exact.handle.value


# -- who says so --------------------------------------------------------------------------------------------------------


def test_gradcheck_and_ledger_say_so():
    W = np.random.default_rng(0).standard_normal((3, 3))
    with standin.card():
        for tf32 in (True, False):
            with backend.use("card", tf32=tf32):
                report = testing.gradcheck(lambda W: ops.linear(W, W), W)
                assert report.passed and report.tf32 is tf32 and ("note: TF32 is on" in str(report)) is tf32
                y = ops.linear(minilora.Parameter(place(W, "float32")), place(W, "float32"))
                table = minilora.engine.ledger(y)
                assert table.tf32 is tf32 and ("float32 products in TF32" in str(table)) is tf32
    assert not minilora.engine.ledger(ops.linear(minilora.Parameter(W), W)).tf32


def test_a_checkpoint_says_what_its_products_round():
    with standin.card():
        layer = nn.Linear(3, 2, rng=0).requires_grad(False)
        quant.quantize(layer, "float16")
        for tf32, halves, text in ((False, False, ""), (True, False, "; TF32"), (True, True, "; TF32; products in 16 bits"),
                                   (False, True, "; products in 16 bits")):
            with backend.use("card", tf32=tf32):
                quant.half_products(layer, halves)
                assert on_tensor_cores(layer) == text
        layer.to("cpu")
    assert on_tensor_cores(layer) == ""


def test_the_command_line_asks_for_products_of_16_bits():
    from minilora.cli.loading import multiply_in_16_bits
    from minilora.cli.terms import UsageError

    layer = nn.Linear(3, 2, rng=0).requires_grad(False)
    with pytest.raises(UsageError, match="on the cpu.*add --device gpu"):
        multiply_in_16_bits(layer)
    with standin.card():
        layer.to("card")
        with pytest.raises(UsageError, match="no weight is held in 16 bits: add --base-dtype bfloat16"):
            multiply_in_16_bits(layer)
        quant.quantize(layer, "float16")
        multiply_in_16_bits(layer)
        assert layer.weight.data.as_it_is


def test_doctor_says_so(capsys, undecided):
    from minilora.cli.main import main

    for word, text in (("on", "products   in TF32 on a GPU"), ("off", "products   in true float32")):
        undecided.setenv("MINILORA_TF32", word)
        tensor_cores.TF32.chosen = None
        assert main(["doctor", "--device", "cpu"]) == 0
        assert text in capsys.readouterr().out


# -- what it costs -----------------------------------------------------------------------------------------------------


def cut(x):
    return standin.cublas.cut_to_tf32(x)


def to_nearest(x):
    return ((x.view("uint32") + np.uint32(0x1000)) & np.uint32(0xffffe000)).view("float32")  # ties away from 0


@pytest.mark.parametrize(("rounded", "e"), [(cut, 2.0 ** -10), (to_nearest, 2.0 ** -11)], ids=["cut", "nearest"])
@given(n=st.sampled_from([1, 2, 7, 300]), scale=st.sampled_from([1e-30, 1.0, 1e15]), seed=st.integers(0, 2 ** 32 - 1))
def test_the_bound_of_the_docstring(rounded, e, n, scale, seed):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(shape).astype("float32") * np.float32(scale) for shape in ((3, n), (n, 4)))
    assert (abs(rounded(x).astype("float64") - x) <= e * abs(x)).all()
    exact, sums = x.astype("float64") @ w, abs(x).astype("float64") @ abs(w)
    assert (abs(rounded(x).astype("float64") @ rounded(w) - exact) <= (2 * e + e * e) * sums * (1 + 1e-12)).all()


def test_a_typical_error():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype("float32") for shape in ((200, 768), (768, 200)))
    exact = x.astype("float64") @ w
    for rounded, low, high in ((to_nearest, 2e-4, 4e-4), (cut, 5e-4, 1.1e-3)):
        error = rounded(x).astype("float64") @ rounded(w) - exact
        assert low < np.linalg.norm(error) / np.linalg.norm(exact) < high


def test_what_is_exact_in_it():
    for x in (np.arange(-2048, 2049), np.arange(2 ** 16, dtype="uint16").view("float16")):
        numbers = x[np.isfinite(x)].astype("float32")
        for rounded in (cut, to_nearest):
            np.testing.assert_array_equal(rounded(numbers), numbers)
    bits = (np.arange(2 ** 16, dtype="uint32") << 16).view("float32")
    numbers = bits[np.isfinite(bits)]  # all of bfloat16
    np.testing.assert_array_equal(cut(numbers), numbers)
