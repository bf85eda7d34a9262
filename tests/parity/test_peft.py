"""LoRA layers against PEFT's. Run with -m parity, where torch and peft are installed."""
import importlib.util
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import lora, nn, ops, optim

pytestmark = pytest.mark.parity
DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"))


# in, out, r, lora_alpha, bias
CASES = [(7, 4, 3, 6.0, True), (6, 8, 4, 5.0, False), (5, 3, 8, 16.0, True), (64, 32, 8, 4.0, True),
         (3, 2, 1, 0.5, False)]
cases = pytest.mark.parametrize("n_in, out, r, lora_alpha, bias", CASES)


def wrapped(libraries, n_in, out, r, lora_alpha, bias, lora_dropout=0.0, init=True):
    """PEFT's model around one Linear, and the LoRA layer in it."""
    torch, peft = libraries.torch, libraries.peft

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(n_in, out, bias=bias)

        def forward(self, x):
            return self.fc(x)

    torch.manual_seed(0)
    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=["fc"],
                             init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Model(), config)
    return model, model.base_model.model.fc


def pair(libraries, n_in, out, r, lora_alpha, bias, adapted=True, **options):
    """The same layer in both libraries: W, b and A as PEFT drew them, and a random B."""
    torch = libraries.torch
    model, theirs = wrapped(libraries, n_in, out, r, lora_alpha, bias, **options)
    with torch.no_grad():
        theirs.lora_B["default"].weight.copy_(torch.randn(out, r))
    rng = np.random.default_rng(0)
    settings = dict(r=r, lora_alpha=lora_alpha, rng=rng, lora_dropout=options.get("lora_dropout", 0.0))
    if adapted:
        ours = lora.adapt(nn.Linear(n_in, out, bias, rng=rng), **settings)
    else:
        ours = lora.Linear(n_in, out, bias=bias, **settings)
    drawn = dict(ours.named_state())  # a dropout's seed, which has no counterpart there
    ours.load_state_dict({**drawn, **{name: p.detach().numpy().copy() for name, p in tensors_of(theirs).items()}})
    return ours, model, theirs


def tensors_of(theirs):
    found = {"weight": theirs.base_layer.weight, "bias": theirs.base_layer.bias,
             "adapters.default.lora_A": theirs.lora_A["default"].weight,
             "adapters.default.lora_B": theirs.lora_B["default"].weight}
    return {name: p for name, p in found.items() if p is not None}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def assert_close(got, expected, name, rtol=1e-5):
    got, expected = fetch(got), expected.detach().numpy()
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max(initial=0.0), err_msg=name)


@cases
@pytest.mark.parametrize("adapted", [False, True], ids=["Linear", "adapt"])
@pytest.mark.parametrize("axes", [(6,), (2, 3)], ids=str)
def test_output_and_gradients(device, libraries, n_in, out, r, lora_alpha, bias, adapted, axes):
    torch = libraries.torch
    ours, model, theirs = pair(libraries, n_in, out, r, lora_alpha, bias, adapted)
    x, dy = draw(*axes, n_in), draw(*axes, out, seed=1)
    leaf, tensor = minilora.Parameter(place(x)), torch.tensor(x, requires_grad=True)
    y, y_peft = ours(leaf), model(tensor)
    assert_close(y, y_peft, "output")
    y.backward(place(dy))
    y_peft.backward(torch.tensor(dy))
    assert_close(leaf.grad, tensor.grad, "x")
    for name, p in ours.named_parameters():
        q = tensors_of(theirs)[name]
        assert p.trainable == q.requires_grad
        if p.trainable:
            assert_close(p.grad, q.grad, name)
        else:
            assert p.grad is None and q.grad is None


@cases
def test_scaling_and_delta(device, libraries, n_in, out, r, lora_alpha, bias):
    ours, _, theirs = pair(libraries, n_in, out, r, lora_alpha, bias)
    assert ours.scaling == theirs.scaling["default"]
    assert_close(ours.delta(), theirs.get_delta_weight("default"), "delta")


@cases
def test_merged(device, libraries, n_in, out, r, lora_alpha, bias):
    ours, model, theirs = pair(libraries, n_in, out, r, lora_alpha, bias)
    before = fetch(ours.weight)
    ours.eval().merge()
    model.eval()
    theirs.merge(safe_merge=True)
    assert_close(ours.weight, theirs.base_layer.weight, "merged weight")
    x = draw(5, n_in)
    assert_close(ours(minilora.Tensor(place(x))), model(libraries.torch.tensor(x)), "merged output")
    ours.unmerge()
    assert fetch(ours.weight).tobytes() == before.tobytes()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@cases
def test_training(device, libraries, n_in, out, r, lora_alpha, bias, name):
    """20 steps in float64, where rounding leaves room for a tight bound."""
    torch = libraries.torch
    ours, model, theirs = pair(libraries, n_in, out, r, lora_alpha, bias)
    ours.to(dtype="float64")
    model.double()
    optimizer = getattr(optim, name)(ours.parameters(), lr=0.01)
    other = getattr(torch.optim, name)([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(20):
        x, target = (draw(8, n, seed=step).astype("float64") for n in (n_in, out))
        optimizer.zero_grad()
        ops.mse(ours(minilora.Tensor(place(x))), place(target)).backward()
        optimizer.step()
        other.zero_grad()
        torch.nn.functional.mse_loss(model(torch.tensor(x)), torch.tensor(target)).backward()
        other.step()
    for key, p in ours.named_parameters():
        expected = tensors_of(theirs)[key].detach().numpy()
        atol = 1e-12 + 1e-10 * np.abs(expected).max()
        np.testing.assert_allclose(fetch(p), expected, rtol=1e-10, atol=atol, err_msg=key)


def test_dropout_in_evaluation(device, libraries):
    ours, model, _ = pair(libraries, 7, 4, 3, 6.0, True, lora_dropout=0.5)
    x = draw(5, 7)
    assert_close(ours.eval()(minilora.Tensor(place(x))), model.eval()(libraries.torch.tensor(x)), "output")


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initial_weights_have_the_same_spread(libraries, init):
    n_in, r = 400, 16
    _, theirs = wrapped(libraries, n_in, 3, r, 16.0, True, init=init)
    ours = lora.Linear(n_in, 3, r=r, init_lora_weights=init, rng=np.random.default_rng(0))
    A, expected = fetch(ours.lora_A), tensors_of(theirs)["adapters.default.lora_A"].detach().numpy()
    # The standard deviation of n draws is known to 1 / sqrt(2 n), of a uniform one better.
    assert math.isclose(A.std(), expected.std(), rel_tol=6 * math.sqrt(2 / (2 * A.size)))
    if init is True:
        assert max(np.abs(A).max(), np.abs(expected).max()) <= np.float32(1 / math.sqrt(n_in))
    assert not fetch(ours.lora_B).any() and not tensors_of(theirs)["adapters.default.lora_B"].detach().numpy().any()


@cases
def test_line_of_trainable_parameters(libraries, capsys, n_in, out, r, lora_alpha, bias):
    model, _ = wrapped(libraries, n_in, out, r, lora_alpha, bias)
    capsys.readouterr()
    model.print_trainable_parameters()
    ours = lora.Linear(n_in, out, r=r, lora_alpha=lora_alpha, bias=bias)
    assert capsys.readouterr().out == minilora.summary(ours).trainable_line + "\n"


def test_line_of_trainable_parameters_of_a_larger_model(libraries, capsys):
    torch, peft = libraries.torch, libraries.peft
    other = torch.nn.Sequential(torch.nn.Linear(300, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 1000))
    model = peft.get_peft_model(other, peft.LoraConfig(r=5, target_modules=["0", "2"]))
    capsys.readouterr()
    model.print_trainable_parameters()
    ours = nn.Sequential(lora.Linear(300, 1000, r=5), nn.Tanh(), lora.Linear(1000, 1000, r=5))
    assert capsys.readouterr().out == minilora.summary(ours).trainable_line + "\n"


def test_stored_vectors_are_those_of_the_installed_versions(libraries):
    """The file that the quick tests read, made anew: equal to rounding."""
    spec = importlib.util.spec_from_file_location("make_lora_vectors", DATA / "make_lora_vectors.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    with np.load(DATA / "lora_linear_torch.npz", allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        assert list(about["cases"]) == list(maker.CASES)
        for seed, (name, case) in enumerate(maker.CASES.items()):
            arrays = maker.vectors(*case, name == "at_the_start", seed)
            assert about["cases"][name]["shapes"] == {key: list(array.shape) for key, array in arrays.items()}
            flat = np.concatenate([array.ravel() for array in arrays.values()])
            np.testing.assert_allclose(file[name], flat, rtol=1e-9, atol=1e-11, err_msg=name)
