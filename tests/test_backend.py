"""The switch: which device, how it is chosen, why the GPU cannot be, and the two roads between host and device."""
import array
import os
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import standin
from conftest import fetch, need_gpu, place

import minilora
from minilora import Parameter, Tensor, backend, errors, ops, use
from minilora.backend import asarray, current_device, device_of, to_device, to_host


@pytest.fixture
def two_devices():
    standin.register()
    with use("cpu"):
        yield
    backend.unregister_device("standin")


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_use_acts_at_once(two_devices):
    use("standin")
    assert current_device().name == "standin"
    assert Tensor(asarray([1.0])).device.name == "standin"
    use("cpu")
    assert current_device() is backend.cpu


def test_use_as_a_context_nests_and_is_restored(two_devices):
    with use("standin") as device:
        assert device is current_device() and device.name == "standin"
        with use("cpu") as inner:
            assert inner is backend.cpu and current_device() is backend.cpu
        assert current_device().name == "standin"
    assert current_device().name == "cpu"
    with pytest.raises(ZeroDivisionError), use("standin"):
        1 / 0
    assert current_device().name == "cpu"


def test_one_use_object_entered_twice(two_devices):
    switch = use("standin")
    with switch:
        with switch:
            pass
    assert current_device().name == "cpu"


@pytest.mark.parametrize("name", ["cuda", "CPU", "", "gpu:0", None, 0])
def test_an_unknown_name_changes_nothing(name, two_devices):
    use("standin")
    with pytest.raises(errors.ConfigError, match="cpu, gpu, auto"):
        use(name)
    assert current_device().name == "standin"


def test_an_operation_follows_its_arrays(two_devices):
    x = Parameter(np.ones((2, 2)))
    with use("standin"):
        y = (x @ x).sum()
        y.backward()
    assert y.device.name == "cpu" and type(x.grad) is np.ndarray


def test_a_registered_device_can_be_forgotten(two_devices):
    array = to_device(np.ones(2), "standin")
    backend.unregister_device("standin")
    with pytest.raises(errors.ConfigError):
        use("standin")
    with pytest.raises(errors.DTypeError):
        device_of(array)
    standin.register()


def test_repr_names_device_and_module():
    assert repr(backend.cpu) == "<Device cpu: numpy>"


@pytest.fixture
def undecided(monkeypatch):
    """Nobody has chosen a device yet."""
    monkeypatch.setattr(backend, "_current", None)
    monkeypatch.delenv("MINILORA_DEVICE", raising=False)


def test_the_default_is_the_cpu(undecided):
    assert current_device() is backend.cpu


def test_the_environment_is_read_at_the_first_use(undecided, two_devices, monkeypatch):
    monkeypatch.setattr(backend, "_current", None)
    monkeypatch.setenv("MINILORA_DEVICE", "standin")
    assert current_device().name == "standin"
    monkeypatch.setenv("MINILORA_DEVICE", "cpu")
    assert current_device().name == "standin"


def test_use_wins_over_the_environment(undecided, monkeypatch):
    monkeypatch.setenv("MINILORA_DEVICE", "nonsense")
    with use("cpu"):
        assert current_device() is backend.cpu


@pytest.mark.parametrize(("value", "answer"), [
    ("cpu", "cpu"), ("auto", "cpu"), ("cuda", "ConfigError"), ("gpu", "DeviceError"),
])
def test_minilora_device_in_a_fresh_process(value, answer):
    code = ("import sys; sys.modules['cupy'] = None; import minilora; print('imported')\n"
            "try:\n    print(minilora.current_device().name)\n"
            "except minilora.errors.MiniloraError as e:\n    print(type(e).__name__, e)")
    env = {**os.environ, "MINILORA_DEVICE": value, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("\n")
    assert first == "imported" and second.split()[0] == answer
    if answer == "ConfigError":
        assert "'cuda'" in second and "MINILORA_DEVICE" in second


# -- why the GPU cannot be used: a pretended CuPy ----------------------------------------------------------------------


class Wrong:
    """What a broken device computes."""

    def __add__(self, other):
        return self

    def __matmul__(self, other):
        return np.zeros((2, 2))


def pretend(monkeypatch, available=lambda: True, version=lambda: (13, 0), ones=standin.xp.ones):
    """Put a module in the place of CuPy; its arrays are the stand-in's."""
    cupy = types.ModuleType("cupy")
    cupy.__dict__.update({name: value for name, value in vars(standin.xp).items() if not name.startswith("__")})
    cupy.ones = ones
    waited = []
    stream = types.SimpleNamespace(synchronize=lambda: waited.append(True))
    cupy.cuda = types.SimpleNamespace(is_available=available, nvrtc=types.SimpleNamespace(getVersion=version),
                                      get_current_stream=lambda: stream)
    cupy.cublas = types.ModuleType("cupy.cublas")
    cupy.cublas.gemm = standin.xp.cublas.gemm
    cupy.waited = waited
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cublas", cupy.cublas)
    return cupy


@pytest.fixture
def no_gpu_yet(monkeypatch):
    """Forget a real GPU that earlier tests may have found."""
    monkeypatch.setattr(backend, "_by_type", type(backend._by_type)({np.ndarray: backend.cpu}))


def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)


def import_fails(monkeypatch, error):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "cupy":
                raise error
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


def made_for_another_numpy(monkeypatch):
    import_fails(monkeypatch, AttributeError("_ARRAY_API\nnot found"))


def package_without_its_library(monkeypatch):
    import_fails(monkeypatch, ImportError("libcudart.so.13: cannot open\nshared object file"))


def no_driver(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    pretend(monkeypatch, available=lambda: False)


def old_driver(monkeypatch):
    pretend(monkeypatch, available=raising(RuntimeError("cudaErrorInsufficientDriver:\n driver too old")))


def no_libraries(monkeypatch):
    pretend(monkeypatch, version=raising(ImportError("libnvrtc.so.13: cannot\nopen shared object file")))


def no_cublas(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy.cublas", None)


def wrong_kernel(monkeypatch):
    pretend(monkeypatch, ones=lambda *args, **settings: Wrong()).asnumpy = np.asarray


def failing_kernel(monkeypatch):
    pretend(monkeypatch, ones=raising(MemoryError("out of memory\nallocating 4 bytes")))


def raising(error):
    def call(*args, **settings):
        raise error
    return call


PROBLEMS = {
    missing: ["CuPy is not installed", "pip install", "minilora[gpu"],
    made_for_another_numpy: ["CuPy", "AttributeError: _ARRAY_API not found"],
    package_without_its_library: ["CuPy", "libcudart.so.13: cannot open shared object file"],
    no_driver: ["driver", "nvidia-smi", "CUDA_VISIBLE_DEVICES=7"],
    old_driver: ["driver", "RuntimeError", "cudaErrorInsufficientDriver: driver too old"],
    no_libraries: ["CUDA libraries", "pip install", "libnvrtc.so.13: cannot open"],
    no_cublas: ["CUDA libraries", "pip install", "cupy.cublas"],
    wrong_kernel: ["computed", "wrongly"],
    failing_kernel: ["not usable", "MemoryError: out of memory allocating 4 bytes"],
}


@pytest.mark.parametrize("cause", PROBLEMS, ids=lambda cause: cause.__name__)
def test_a_gpu_that_cannot_be_used_says_why_in_one_sentence(cause, monkeypatch, no_gpu_yet):
    cause(monkeypatch)
    with use("cpu"):
        with pytest.raises(errors.DeviceError) as caught:
            use("gpu")
        sentence = str(caught.value)
        assert current_device() is backend.cpu
        for words in PROBLEMS[cause]:
            assert words in sentence
        assert "\n" not in sentence and sentence.startswith("GPU")
        assert backend.gpu_problem() == sentence
        with use("auto") as device:
            assert device is backend.cpu


def test_each_problem_has_its_own_sentence(monkeypatch, no_gpu_yet):
    sentences = set()
    for cause in PROBLEMS:
        with monkeypatch.context() as patch:
            cause(patch)
            sentences.add(backend.gpu_problem())
    assert len(sentences) == len(PROBLEMS) and None not in sentences


@pytest.mark.parametrize("name", ["gpu", "auto"])
def test_a_gpu_that_works_is_used(name, monkeypatch, no_gpu_yet):
    cupy = pretend(monkeypatch)
    with use(name) as device:
        assert (device.name, device.xp, device.array_type) == ("gpu", cupy, standin.ndarray)
        x = asarray([[1.0, 2.0]])
        assert device_of(x) is device
        np.testing.assert_array_equal(to_host(x), [[1.0, 2.0]])
        cupy.waited.clear()
        minilora.synchronize()
        assert cupy.waited == [True]
        with use("gpu") as again:
            assert again is device
    assert current_device() is not device


CUPY_THAT_WARNS = """
import types, warnings
import standin
warnings.warn("made for another NumPy")
def available():
    warnings.warn("an old driver", DeprecationWarning)
    return True
globals().update({name: value for name, value in vars(standin.xp).items() if not name.startswith("__")})
cuda = types.SimpleNamespace(is_available=available, nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)))
"""


def test_a_warning_is_no_reason_to_refuse_a_gpu(monkeypatch, tmp_path, no_gpu_yet):
    """Where warnings are errors, as in these tests, all tests of the GPU would otherwise be skipped, and nobody told."""
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(CUPY_THAT_WARNS)
    (tmp_path / "cupy" / "cublas.py").write_text("")
    for name in ["cupy", "cupy.cublas", *(name for name in sys.modules if name.startswith("cupy."))]:
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        assert backend.gpu_problem() is None
        with pytest.raises(UserWarning):
            warnings.warn("the filters are as they were")
    assert [str(one.message) for one in shown] == ["made for another NumPy", "an old driver"]


def test_a_gpu_that_is_expected_and_cannot_be_used_fails_its_tests(monkeypatch):
    missing(monkeypatch)
    for value, outcome in (("", pytest.skip), ("0", pytest.skip), ("1", pytest.fail)):
        monkeypatch.setenv("MINILORA_REQUIRE_GPU", value)
        with pytest.raises(outcome.Exception, match="CuPy is not installed"):
            need_gpu()


def test_add_matmul_on_a_gpu_is_one_product(monkeypatch, no_gpu_yet):
    """cuBLAS accumulates into out; float16 and strided outputs go the plain way."""
    pretend(monkeypatch)
    rng = np.random.default_rng(0)
    with use("gpu"):
        for dtype, columns, expected in [("float32", 4, 1), ("float64", 4, 1), ("float16", 4, 0), ("float32", 8, 0)]:
            a, b, out = (rng.integers(-3, 4, s) for s in ((5, 2), (2, 4), (5, columns)))
            target, one, two = place(out, dtype)[:, :4], place(a, dtype), place(b, dtype)
            with standin.counting() as counts:
                backend.add_matmul(target, one, two, 2.0)
            np.testing.assert_array_equal(fetch(target), out[:, :4] + 2 * a @ b)
            assert counts.calls["gemm"] == expected and (counts.launches == 1) == bool(expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize(("n", "k", "m"), [(0, 2, 3), (3, 0, 2), (3, 2, 0), (0, 0, 2), (0, 0, 0)])
def test_add_matmul_on_a_gpu_takes_empty_arrays(dtype, n, k, m, monkeypatch, no_gpu_yet):
    """Where cuBLAS refuses: a leading dimension, the rows as CuPy stores an empty array, must be 1 or more."""
    gemm = pretend(monkeypatch).cublas.gemm
    rng = np.random.default_rng(0)
    with use("gpu"):
        a, b, out = (place(rng.integers(-3, 4, shape), dtype) for shape in ((n, k), (k, m), (n, m)))
        if dtype != "float16" and 0 in (n, k):
            with pytest.raises(standin.CUBLASError, match="INVALID_VALUE"):
                gemm("N", "N", a, b, out=out, alpha=2.0, beta=1.0)
        before = fetch(out)
        backend.add_matmul(out, a, b, 2.0)
        np.testing.assert_array_equal(fetch(out), before)


def test_an_empty_batch_through_lora_on_a_gpu(monkeypatch, no_gpu_yet):
    pretend(monkeypatch)
    with use("gpu"):
        layer = minilora.lora.Linear(4, 3, r=2, rng=0)
        y = layer(minilora.tensor(np.zeros((0, 4), "float32")))
        y.sum().backward()
        assert y.shape == (0, 3) and not fetch(layer.lora_B.grad).any()


# -- host and device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_number_one_is_kept(dtype, device):
    one = current_device().one(np.dtype(dtype))
    assert (one.shape, one.dtype, fetch(one)) == ((), dtype, 1.0) and type(one) is current_device().array_type
    assert current_device().one(place([], dtype).dtype) is one
    other = current_device().one(np.dtype("complex64"))
    assert (other.shape, other.dtype, fetch(other)) == ((), "complex64", 1.0)


def test_nobody_writes_into_the_number_one():
    with pytest.raises(ValueError, match="read-only"):
        backend.cpu.one(np.dtype("float32"))[...] = 2.0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_backward_begins_with_the_number_one(shape, dtype, device):
    """Its gradients are the caller's own: what is done with them touches no later backward."""
    for _ in range(2):
        p = Parameter(place(np.full(shape, 3.0), dtype))
        for loss in (p, ops.reshape(p, shape), p + 2.0, p * 1.0):
            p.grad = None
            loss.backward()
            assert (p.grad.shape, p.grad.dtype, fetch(p.grad)) == (shape, dtype, 1.0)
            p.grad[...] = 7.0


def test_nothing_is_copied_on_the_cpu():
    host = np.ones(3)
    with use("cpu"):
        assert to_device(host) is host and to_host(host) is host and asarray(host) is host
        assert asarray(host, "float64") is host and asarray(host, "float32") is not host


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_a_device_has_copies(device):
    host = np.ones(3)
    array = to_device(host)
    host[0] = 5.0
    back = to_host(array)
    back[1] = 7.0
    np.testing.assert_array_equal(fetch(array), [1.0, 1.0, 1.0])


def test_to_device_and_back_keeps_every_bit(device):
    for dtype in ("float16", "float32", "float64", "int8", "uint64", "bool"):
        for host in (np.zeros(()), np.zeros((0, 3)), np.arange(6).reshape(2, 3).T, np.array([np.nan, -0.0, np.inf])):
            with np.errstate(invalid="ignore"):
                host = host.astype(dtype)
            array = to_device(host)
            assert device_of(array).name == device
            np.testing.assert_array_equal(to_host(array), host, strict=True)
            assert to_host(array).tobytes() == host.tobytes()


def test_to_device_takes_a_name_or_a_device(two_devices):
    standin_device = device_of(to_device(np.ones(2), "standin"))
    assert standin_device.name == "standin" and current_device() is backend.cpu
    assert device_of(to_device(np.ones(2), standin_device)) is standin_device
    with pytest.raises(errors.ConfigError):
        to_device(np.ones(2), "nowhere")


@pytest.mark.parametrize("value", [[1.0], 1.0, Tensor(np.ones(2)), None], ids=lambda value: type(value).__name__)
def test_to_device_needs_a_host_array(value, device):
    with pytest.raises(errors.DeviceError, match=f"host array.*{type(value).__name__}"):
        to_device(value)


def test_a_device_array_takes_no_hidden_road(two_devices):
    array = to_device(np.ones(2), "standin")
    for convert in (to_device, asarray, minilora.tensor):
        with pytest.raises(errors.DeviceError, match="to_host"):
            convert(array)
    with use("standin"), pytest.raises(errors.DeviceError, match="to_host"):
        to_device(array)


@pytest.mark.parametrize(("value", "dtype", "expected"), [
    ([1, 2], None, "int64"), ([1.0, 2.0], None, "float32"), (3, "float32", "float32"),
    (np.ones(2, "float16"), None, "float16"), (np.ones(2), "float32", "float32"),
    ((True, False), None, "bool"), (np.float32(1.0), None, "float32"), (np.float64(1.0), None, "float64"),
    ([[1, 2.0], (3.0, True)], None, "float32"), ([1.0, np.float64(2.0)], None, "float64"), ([], None, "float32"),
    ([np.ones(2), np.zeros(2)], None, "float64"), ([np.float32(0.1)], None, "float32"), ([1j], None, "complex128"),
    (array.array("d", [1.0]), None, "float64"), ([1.0], "float64", "float64"), (range(3), None, "int64"),
])
def test_asarray_makes_arrays_of_the_current_device(value, dtype, expected, device):
    array = asarray(value, dtype)
    assert type(array) is current_device().array_type and array.dtype == expected
    np.testing.assert_array_equal(fetch(array), np.asarray(value, dtype))


def test_asarray_keeps_an_array_of_the_device(device):
    array = place([1.0, 2.0])
    assert asarray(array) is array and asarray(array, "float64") is array
    assert asarray(array, "float32").dtype == "float32" and array.dtype == "float64"


@pytest.mark.parametrize("value", [1.0, "text", None, [np.ones(2)], Tensor(np.ones(2))], ids=lambda v: type(v).__name__)
def test_device_of_what_is_no_array(value):
    for ask in (device_of, to_host):
        with pytest.raises(errors.DTypeError, match=type(value).__name__):
            ask(value)


def test_synchronize_waits_for_the_current_device(device):
    with standin.counting() as counts:
        minilora.synchronize()
    assert counts.syncs == (device == "standin")


# -- the primitive that differs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize(("n", "k", "m"), [(5, 2, 3), (2, 7, 2), (3, 1, 4), (1, 1, 1), (0, 2, 3), (3, 0, 2)])
def test_add_matmul_adds_in_place(dtype, n, k, m, device):
    rng = np.random.default_rng(n + k + m)
    a, b, out = rng.integers(-3, 4, (n, k)), rng.integers(-3, 4, (k, m)), rng.integers(-9, 10, (n, m))
    one, two, target = (place(host, dtype) for host in (a, b, out))
    for left, right in [(one, two), (place(a.T, dtype).T, place(b.T, dtype).T)]:
        before = fetch(target)
        backend.add_matmul(target, left, right, 0.5)
        np.testing.assert_array_equal(fetch(target), before + 0.5 * (a @ b))
    assert target.dtype == dtype
    np.testing.assert_array_equal(fetch(one), a)  # neither operand is changed
    np.testing.assert_array_equal(fetch(two), b)


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_without_an_override_the_reference_runs(device):
    def reference():
        """Nobody overrides this."""
    assert current_device().resolve(reference) is reference


def test_an_override_is_taken_on_its_device_only(two_devices):
    def reference():
        """The plain one."""

    @backend.override(reference, "standin")
    def fast():
        """The other one."""

    try:
        with use("standin"):
            assert current_device().resolve(reference) is fast
        assert backend.cpu.resolve(reference) is reference
        assert fast.__name__ == "fast"
    finally:
        from minilora import versions
        del versions.load("standin")[reference]
