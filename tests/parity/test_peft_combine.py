"""Combined adapters against PEFT's `add_weighted_adapter` and its merging functions. Run with -m parity.

PEFT's "cat", "svd", "ties_svd", "dare_linear_svd" and "dare_ties_svd" work on D, as the papers and this library do.
Its "linear", "ties" and "dare_*" without _svd work on A and B separately: another method, and shown to be one here.
"""
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fetch, place

from minilora import lora

pytestmark = pytest.mark.parity
OUT, IN, R = 9, 7, 3
NAMES = ["one", "two", "three"]
WEIGHTS = [0.5, -1.25, 2.0]  # PEFT keeps them in float32: these are exact there


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"),
                               merge=pytest.importorskip("peft.utils.merge_utils"))


def model_of(libraries):
    """PEFT's model around one float64 Linear with three adapters, its LoRA layer, and the same three as `LowRank`."""
    torch, peft = libraries.torch, libraries.peft
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(IN, OUT)

        def forward(self, x):
            return self.fc(x)

    def config(alpha):
        return peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=["fc"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Model(), config(6.0), adapter_name="one")
        model.add_adapter("two", config(3.0))
        model.add_adapter("three", config(1.5))
    model = model.double()
    layer = model.base_model.model.fc
    ours = []
    for name in NAMES:
        with torch.no_grad():
            layer.lora_B[name].weight.copy_(torch.randn(OUT, R, dtype=torch.float64))
        A, B = (getattr(layer, f)[name].weight.detach().numpy().copy() for f in ("lora_A", "lora_B"))
        ours.append(lora.LowRank(place(A), place(B), layer.scaling[name]))
    return model, layer, ours


def combined(libraries, model, layer, kind, **options):
    """D of the adapter that PEFT makes, and its rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(NAMES, WEIGHTS, kind, combination_type=kind, **options)
    # PEFT makes the new adapter in float32; what is compared below is limited by that where it copies into it.
    return layer.get_delta_weight(kind).detach().numpy().astype("float64"), layer.lora_A[kind].weight


def deltas(libraries, layer):
    return [layer.get_delta_weight(name).detach() for name in NAMES]


def dense(update):
    return fetch(update.dense())


def assert_close(got, expected, rel):
    assert np.linalg.norm(got - expected) <= rel * np.linalg.norm(expected)


def test_cat(device, libraries):
    model, layer, ours = model_of(libraries)
    expected, A = combined(libraries, model, layer, "cat")
    result = lora.cat(ours, WEIGHTS)
    assert result.r == A.shape[0] == 3 * R
    assert_close(dense(result), expected, 1e-6)
    assert_close(dense(result), sum(w * D.numpy() for w, D in zip(WEIGHTS, deltas(libraries, layer))), 1e-14)


@pytest.mark.parametrize("r", [None, 1, 2, 5])
def test_svd(device, libraries, r):
    model, layer, ours = model_of(libraries)
    expected, A = combined(libraries, model, layer, "svd", svd_rank=r)
    result = lora.svd(ours, WEIGHTS, r)
    assert result.update.r == A.shape[0] == (r or R)
    assert_close(dense(result.update), expected, 1e-12)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_ties_as_a_whole(device, libraries, method, density):
    """With rank 7 nothing is cut: PEFT's ties_svd is the same matrix, entry by entry, where the votes are not equal."""
    model, layer, ours = model_of(libraries)
    expected, _ = combined(libraries, model, layer, "ties_svd", density=density, svd_rank=IN, majority_sign_method=method)
    result = dense(lora.ties(ours, WEIGHTS, density, IN, method).update)
    trimmed = np.array([libraries.merge.prune(D, density, method="magnitude").numpy() for D in deltas(libraries, layer)])
    votes = (np.sign(trimmed) if method == "frequency" else trimmed).sum(axis=0)
    tied = votes == 0
    np.testing.assert_allclose(result[~tied], expected[~tied], rtol=0, atol=1e-12)
    np.testing.assert_allclose(result[tied], 0, atol=1e-12)
    # Where the votes are equal PEFT lets plus win: a choice that -D would not mirror.
    plus = trimmed > 0
    theirs = (np.reshape(WEIGHTS, (3, 1, 1)) * trimmed * plus).sum(axis=0) / np.maximum(plus.sum(axis=0), 1)
    np.testing.assert_allclose(expected[tied], theirs[tied], rtol=0, atol=1e-12)
    if method == "frequency":
        assert tied.any() and (trimmed[:, tied] != 0).any()


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_after_the_cut(device, libraries, method):
    """Rank 2, on adapters whose votes are never equal (three, no trimming)."""
    model, layer, ours = model_of(libraries)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, _ = combined(libraries, model, layer, "ties_svd", density=1.0, svd_rank=2, majority_sign_method=method)
    result = lora.ties(ours, WEIGHTS, 1.0, 2, method)
    assert_close(dense(result.update), expected, 1e-12)


@pytest.mark.parametrize("then", ["linear", "ties"])
def test_dare_with_equal_masks(device, libraries, monkeypatch, then):
    """PEFT draws its masks from torch; here it is given ours. What it then does with them must agree."""
    torch, merge = libraries.torch, libraries.merge
    model, layer, ours = model_of(libraries)
    seeds = np.random.default_rng(4).integers(2 ** 63, size=3)
    masks = iter([np.random.default_rng(seed).random((OUT, IN)) < 0.6 for seed in seeds])
    monkeypatch.setattr(merge.torch, "bernoulli", lambda p: torch.tensor(next(masks)).to(p.dtype))
    expected, _ = combined(libraries, model, layer, f"dare_{then}_svd", density=0.6, svd_rank=IN)
    monkeypatch.undo()
    assert_close(dense(lora.dare(ours, WEIGHTS, 0.6, IN, rng=4, then=then).update), expected, 1e-12)


def test_dare_in_expectation(libraries):
    """Without shared masks: both means over 300 draws are the weighted sum, within five standard errors."""
    _, layer, ours = model_of(libraries)
    matrices, draws = deltas(libraries, layer), 300
    libraries.torch.manual_seed(1)
    weights = libraries.torch.tensor(WEIGHTS)
    theirs = np.array([libraries.merge.dare_linear(matrices, weights, 0.5).numpy() for _ in range(draws)])
    mine = np.array([dense(lora.dare(ours, WEIGHTS, 0.5, IN, rng=seed).update) for seed in range(draws)])
    expected = sum(w * D.numpy() for w, D in zip(WEIGHTS, matrices))
    for sample in (theirs, mine):
        assert (np.abs(sample.mean(axis=0) - expected) <= 5 * sample.std(axis=0) / np.sqrt(draws)).all()
    np.testing.assert_allclose(mine.std(axis=0), theirs.std(axis=0), rtol=0.35)


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear"])
def test_what_works_on_the_factors_is_another_method(libraries, kind):
    """The cross terms are of the size of the result."""
    model, layer, ours = model_of(libraries)
    got, _ = combined(libraries, model, layer, kind, **({} if kind == "linear" else {"density": 1.0}))
    published = lora.ties(ours, WEIGHTS, 1.0, IN) if kind == "ties" else lora.linear_sum(ours, WEIGHTS)
    assert np.linalg.norm(got - dense(published.update)) > 0.3 * published.norm
