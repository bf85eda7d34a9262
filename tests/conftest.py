"""What every test shares: hypothesis profiles, the `device` fixture, and the seal on module state."""
import gc
import os
import shutil

import numpy as np
import pytest
import standin
from hypothesis import HealthCheck, settings

from minilora import Tensor, backend, engine, tensor_cores, versions

# The `device` fixture needs no reset between examples: it only says where new arrays are made.
COMMON = dict(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("quick", max_examples=30, **COMMON)
settings.register_profile("ci", max_examples=30, derandomize=True, database=None, **COMMON)
settings.register_profile("deep", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "quick"))

PASSED = pytest.StashKey[bool]()


def place(host, dtype=None):
    """A copy of numbers or of a host array, on the current device."""
    return backend.to_device(np.array(host, dtype=dtype))


def fetch(array):
    """A copy of an array of any device, or of a tensor's array, on the host; NumPy's scalars count as arrays."""
    if isinstance(array, np.generic):
        return np.asarray(array)
    return np.array(backend.to_host(array.data if isinstance(array, Tensor) else array))


def shares(a, b):
    """Whether two arrays of one device share memory. Where no axis is, CuPy compares the addresses of temporaries."""
    a, b = (x.reshape(-1) if x.ndim == 0 else x for x in (a, b))  # a view
    return bool(backend.device_of(a).xp.shares_memory(a, b))


def need_gpu():
    """Skip a test of the real GPU where none works; fail it where MINILORA_REQUIRE_GPU=1 says that one should.

    So a run that was meant to test a GPU cannot pass by skipping everything.
    """
    if problem := backend.gpu_problem():
        if os.environ.get("MINILORA_REQUIRE_GPU") not in (None, "", "0"):
            pytest.fail(f"MINILORA_REQUIRE_GPU is set, and: {problem}", pytrace=False)
        pytest.skip(problem)


@pytest.fixture(params=["cpu", "standin", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Select one device for the test, by name, and go back afterwards. The real GPU only on request: -m gpu."""
    if request.param == "standin":
        standin.register()
    elif request.param == "gpu":
        need_gpu()
    with backend.use(request.param) as chosen:
        yield request.param
    assert [fetch(one).item() for one in chosen._ones.values()] == [1.0] * 3, "somebody has written into Device.one"
    if request.param == "standin":
        backend.unregister_device("standin")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def card(request):
    """Where CUDA kernels run, as the current device: on the emulator, which is given, or on a real GPU, for which None is."""
    if request.param == "gpu":
        need_gpu()
        with backend.use("gpu"):
            yield None
    else:
        import emulator  # beside the tests that use it, in tests/kernels

        with emulator.emulated_device() as machine:
            yield machine


# For proofs about numbers: the stand-in computes with NumPy, so on it they would prove the same once more, at twice the time.
# That every op runs there and gives NumPy's numbers is a test of its own.
PROOF = pytest.mark.parametrize("device", ["cpu", pytest.param("standin", marks=pytest.mark.slow),
                                           pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)


def pytest_collection_finish(session):
    """Refuse names of tests that differ from process to process: pytest-xdist would then run none at all.

    And let the garbage collector pass over the tests themselves, which are tens of thousands of objects and stay to the end.
    """
    addresses = [item.nodeid for item in session.items if " at 0x" in item.nodeid]
    if addresses:
        raise pytest.UsageError("names of tests with addresses in them; give parametrize ids=[...]: " + ", ".join(addresses))
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


def device_names():
    return {known.name for known in backend._by_type.values()}


@pytest.fixture(autouse=True)
def sealed(request):
    """Put the library's few global variables back, and fail a test that passed and left one changed."""
    current, names = backend._current, device_names() | {"gpu", "hollow"}  # stay known once they were found, or imported
    kernels, tf32 = versions.KERNELS.chosen, tensor_cores.TF32.chosen
    yield
    left = [f"the device {name!r} is still registered" for name in sorted(device_names() - names)]
    left += [] if engine.is_recording() else ["recording is switched off"]
    left += [] if backend._current in (current, current or backend.cpu) else ["another device is current"]
    left += [] if versions.KERNELS.chosen in (kernels, True if kernels is None else kernels) else ["kernels are switched"]
    left += [] if tensor_cores.TF32.chosen in (tf32, False if tf32 is None else tf32) else ["TF32 is switched"]
    for name in device_names() - names:
        backend.unregister_device(name)
    backend._switch(kernels, tf32)
    backend._current, engine._state.recording = current, True
    if left and request.node.stash.get(PASSED, False):
        pytest.fail("the test left something behind: " + ", ".join(left))


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """The folder of `example_folder`, made once: not to be written to."""
    import example_folder

    folder = tmp_path_factory.mktemp("examples")
    example_folder.make(folder)
    return folder


@pytest.fixture
def there(examples, tmp_path, monkeypatch):
    """A copy of that folder to work in: the current folder."""
    folder = tmp_path / "work"
    shutil.copytree(examples, folder)
    monkeypatch.chdir(folder)
    return folder
