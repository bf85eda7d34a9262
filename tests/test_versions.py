"""Kernels on and off: the reference mode, in which nothing runs but what stands in ops/, lora/ and optim/."""
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minilora
from minilora import backend, lora, nn, ops, optim, tensor_cores, testing, versions
from minilora.errors import ConfigError, DeviceError
from minilora.hollow import rehearse
from minilora.optim.adam import adam_update

IDS = np.random.default_rng(0).integers(0, 97, (3, 12))


def gpt2():
    model = nn.GPT2(nn.GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=4), rng=0)
    lora.inject(model, lora.Config(r=3, target_modules="all-linear", lora_dropout=0.2), rng=0)
    return model


def trained(switch, steps=3):
    """The losses of a few steps; before each half of each, `switch` is called."""
    model = gpt2()
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=1e-2)
    losses = []
    for i in range(steps):
        switch(2 * i)
        loss = model(IDS, labels=IDS)
        switch(2 * i + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- the switch --------------------------------------------------------------------------------------------------------


def test_off_gives_every_reference_and_on_every_override():
    overrides = versions.load("cpu")
    with backend.use("cpu", kernels=False):
        assert not backend.kernels()
        assert all(backend.cpu.resolve(reference) is reference for reference in overrides)
        with backend.use("cpu", kernels=True):
            assert all(backend.cpu.resolve(reference) is version for reference, version in overrides.items())
        assert not backend.kernels() and backend.cpu.resolve(adam_update) is adam_update


def test_without_the_word_it_stays_as_it_was():
    with backend.use("cpu", kernels=False):
        with backend.use("cpu"):
            assert not backend.kernels()
        backend.use("cpu")
        assert not backend.kernels()
        backend.use("cpu", kernels=True)  # a call: what it chose ends with the context around it
        assert backend.kernels()
    assert backend.kernels()


def test_the_former_choice_comes_back_after_an_error():
    before = backend.cpu.resolve(adam_update)
    with pytest.raises(ZeroDivisionError):
        with backend.use("cpu", kernels=False):
            1 / 0
    assert backend.kernels() and backend.cpu.resolve(adam_update) is before is not adam_update


@pytest.mark.parametrize("kernels", [0, 1, "off", np.True_, ()])
def test_other_values_are_refused(kernels):
    with pytest.raises(ConfigError, match=r"kernels must be True, False or None.*use\('cpu', kernels=False\)"):
        backend.use("cpu", kernels=kernels)


def test_a_call_that_fails_changes_nothing(monkeypatch):
    monkeypatch.setattr(backend, "gpu_problem", lambda: "GPU asked for, but there is none")
    device, kernels = backend.current_device(), backend.kernels()
    for name, error in (("nonsense", ConfigError), ("gpu", DeviceError)):
        with pytest.raises(error):
            backend.use(name, kernels=not kernels)
        assert backend.current_device() is device and backend.kernels() is kernels


def test_repr_says_so():
    with backend.use("cpu", kernels=False) as device:
        assert repr(device) == "<Device cpu: numpy, without kernels>"
    assert repr(backend.cpu) == "<Device cpu: numpy>"


# -- the environment ---------------------------------------------------------------------------------------------------


@pytest.fixture
def undecided():
    """Nobody has chosen yet."""
    before = versions.KERNELS.chosen
    backend._switch(None, tensor_cores.TF32.chosen)
    yield
    backend._switch(before, tensor_cores.TF32.chosen)


@pytest.mark.parametrize(("word", "on"), [("on", True), ("1", True), ("off", False), ("0", False)])
def test_the_environment_decides_at_the_first_use(word, on, undecided, monkeypatch):
    monkeypatch.setenv("MINILORA_KERNELS", word)
    assert (backend.cpu.resolve(adam_update) is not adam_update) is on
    monkeypatch.setenv("MINILORA_KERNELS", "off" if on else "on")
    assert backend.kernels() is on


@pytest.mark.parametrize("word", ["maybe", "OFF", "", "false"])
def test_another_word_is_an_error_with_the_line_to_type(word, undecided, monkeypatch):
    monkeypatch.setenv("MINILORA_KERNELS", word)
    assert repr(backend.cpu) == "<Device cpu: numpy>"  # who only looks gets no error
    for use in (backend.kernels, lambda: minilora.tensor([1.0]) + 1.0):
        with pytest.raises(ConfigError, match=r"MINILORA_KERNELS is '.*': expected on or off.*export MINILORA_KERNELS=off"):
            use()
    with backend.use("cpu", kernels=False):  # who chooses wins over the environment
        assert (minilora.tensor([1.0]) + 1.0).item() == 2.0


STEPS = """
import sys, numpy, minilora
from minilora import lora, nn, ops, optim
rng = numpy.random.default_rng(0)

def train(model, loss):
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable])
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

x, ids = minilora.tensor(rng.standard_normal((1100, 128)).astype("float32")), rng.integers(0, 97, (3, 12))
mlp = nn.Sequential(nn.Linear(128, 128, rng=rng), nn.GELU(), nn.LayerNorm(128), lora.Linear(128, 128, r=2, rng=rng), nn.SiLU())
gpt2 = nn.GPT2(nn.GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=1, n_head=4), rng=0)
lora.inject(gpt2, lora.Config(r=3, target_modules="all-linear"), rng=0)
train(mlp, lambda model: ops.mse(model(x), x))
train(gpt2, lambda model: model(ids, labels=ids))
print(sorted(name for name in sys.modules if name.startswith("minilora.kernels"))[:1])
"""


@pytest.mark.parametrize(("word", "imported"), [("off", "[]"), ("on", "['minilora.kernels']")])
def test_nothing_of_the_folder_is_imported(word, imported):
    env = {**os.environ, "MINILORA_KERNELS": word, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", STEPS], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, imported), done.stderr


# -- on, off and on again ----------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(st.lists(st.booleans(), min_size=6, max_size=6))
@example([True] * 3 + [False] * 3)
@example([True, False] * 3)  # forward by kernels, then references
def test_switching_in_the_middle_of_a_training(pattern):
    expected = trained(lambda i: None)
    with backend.use("cpu"):
        losses = trained(lambda i: backend.use("cpu", kernels=pattern[i]))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert backend.kernels()


def test_threads_compute_while_another_switches():
    """Whatever is found, it is found for the choice of the moment: none is left over from an earlier one."""
    stop, errors = threading.Event(), []
    x = minilora.tensor(np.linspace(-3, 3, 1000, dtype="float32"))
    expected = ops.gelu(x).numpy()

    def compute():
        try:
            while not stop.is_set():
                np.testing.assert_allclose(ops.gelu(x).numpy(), expected, rtol=1e-5, atol=1e-6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    with backend.use("cpu"):
        for i in range(300):
            on = i % 2 == 0
            backend.use("cpu", kernels=on)
            assert (backend.cpu.resolve(ops.GELU) is ops.GELU) is not on
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_graph_goes_back_by_the_operations_it_was_made_of():
    w = minilora.Parameter(np.linspace(-3, 3, 1000, dtype="float32"))
    y = ops.gelu(w).sum()
    with backend.use("cpu", kernels=False):
        y.backward()
        by_kernel, w.grad = w.grad, None
        y = ops.gelu(w).sum()
    y.backward()
    np.testing.assert_allclose(w.grad, by_kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", [True, False])
def test_the_planner_counts_what_would_run(kernels):
    with backend.use("cpu", kernels=kernels):
        model = gpt2()
        step = rehearse(model, dict(ids=IDS, labels=IDS))
        assert step.activations == minilora.engine.ledger(model(IDS, labels=IDS)).nbytes


def test_the_planner_follows_the_switch():
    """A GELU of references has several temporary arrays of full size, the kernel has blocks."""
    model = nn.Sequential(nn.Linear(8, 512, rng=0), nn.GELU())
    scratch = []
    for kernels in (True, False, True):
        with backend.use("cpu", kernels=kernels):
            scratch.append(rehearse(model, np.zeros((4096, 8), "float32"), loss=lambda model, x: model(x).mean()).scratch)
    assert scratch[0] == scratch[2] < scratch[1]


# -- what says so ------------------------------------------------------------------------------------------------------


def test_gradcheck_says_what_it_checked():
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape) for shape in ((4, 6), (5, 6), (2, 6), (5, 2))]

    def f(x, W, A, B):
        return ops.gelu(lora.lora_linear(x, W, None, A, B, 0.5))

    report = testing.gradcheck(f, *inputs)
    assert "computed by: LoRALinear (reference), GELU (kernel BlockedGELU)" in str(report)
    with backend.use("cpu", kernels=False):
        assert "computed by: LoRALinear (reference), GELU (reference)" in str(testing.gradcheck(f, *inputs))
