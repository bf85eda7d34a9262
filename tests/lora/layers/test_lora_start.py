"""How adapters start: the published formulas, D = 0, and a base of which no bit changes."""
import math

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import lora, nn
from minilora.errors import ConfigError, StateError

INITS = [True, "gaussian", "orthogonal", "pissa", "olora"]
X = {"Linear": (3, 6), "Conv1d": (2, 3, 7), "Conv2d": (2, 3, 4, 4)}


def base_of(kind, dtype="float64"):
    if kind == "Embedding":
        return nn.Embedding(7, 5, dtype=dtype, rng=0)
    if kind == "Linear":
        return nn.Linear(6, 5, dtype=dtype, rng=0)
    return getattr(nn, kind)(3, 5, 2, dtype=dtype, rng=0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def matrix(p):
    return fetch(p).reshape(len(fetch(p)), -1)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", INITS, ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "Embedding"])
def test_training_begins_at_the_base(device, kind, init, use_dora):
    if kind == "Embedding" and init not in (True, "gaussian"):
        return
    for dtype, tolerance in (("float64", 1e-14), ("float32", 2e-6)):
        base = base_of(kind, dtype)
        before = {name: fetch(p).tobytes() for name, p in base.named_parameters()}
        layer = lora.adapt(base, r=4, lora_alpha=3, init_lora_weights=init, use_dora=use_dora, rng=1)
        x = [[1, 4], [0, 6]] if kind == "Embedding" else minilora.tensor(place(draw(*X[kind]), dtype))
        y, expected = fetch(layer(x)), fetch(base(x))
        assert y.dtype == dtype and np.abs(y - expected).max() <= tolerance * np.abs(expected).max()
        assert {name: fetch(p).tobytes() for name, p in base.named_parameters()} == before
        assert layer.weight.data is base.weight.data
        if init in (True, "gaussian") and not use_dora:
            assert np.array_equal(y, expected)  # one factor is 0
        D = fetch(layer.delta())
        assert np.abs(D).max() <= 4 * tolerance and D.shape == layer.weight.shape


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d"])
def test_first_steps_move_what_they_should(kind):
    """Where a factor starts at 0 the other one gets no gradient; elsewhere both do."""
    for init in INITS:
        layer = lora.adapt(base_of(kind), r=2, init_lora_weights=init, rng=1)
        layer(minilora.tensor(draw(*X[kind]))).sum().backward()
        assert layer.lora_A.grad.any() == (init not in (True, "gaussian")) and layer.lora_B.grad.any()
        start = [name for name, p in layer.named_parameters() if "start" in name]
        assert len(start) == (2 if init in ("pissa", "olora") else 0)
        assert not any(p.trainable or p.grad is not None for name, p in layer.named_parameters() if name in start)


def test_uniform_is_that_of_the_inputs_of_an_output():
    for kind, n in (("Conv1d", 6), ("Conv2d", 12)):
        A = fetch(lora.adapt(base_of(kind), r=200, rng=1).lora_A)
        assert 0.97 / math.sqrt(n) < np.abs(A).max() <= 1 / math.sqrt(n)
        A = fetch(lora.adapt(base_of(kind), r=200, init_lora_weights="gaussian", rng=1).lora_A) * 200
        assert abs(A.var() - 1) < 6 * math.sqrt(2 / A.size)


def test_embedding_starts_with_B_from_the_normal_distribution():
    layer = lora.Embedding(5, 300, r=20, rng=0)
    B = fetch(layer.lora_B)
    assert not fetch(layer.lora_A).any() and abs(B.var() - 1) < 6 * math.sqrt(2 / B.size)


@pytest.mark.parametrize("s", [0.75, -0.75])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_pissa_is_the_best_approximation(device, kind, s):
    """s B A is W cut after r singular values, and A and B share them evenly. Meng et al. 2024, eqs. 2 and 3."""
    base, r = base_of(kind), 2
    layer = lora.adapt(base, r=r, lora_alpha=r * s, init_lora_weights="pissa", rng=1)
    W, A, B = matrix(base.weight), matrix(layer.lora_A), matrix(layer.lora_B)
    S = np.linalg.svd(W, compute_uv=False)
    D = s * B @ A
    assert math.isclose(np.linalg.norm(W - D), np.linalg.norm(S[r:]))  # Eckart and Young: only the best has this distance
    np.testing.assert_allclose(A @ A.T, np.diag(S[:r] / abs(s)), atol=1e-12)
    np.testing.assert_allclose(B.T @ B, np.diag(S[:r] / abs(s)), atol=1e-12)
    adapter = layer.adapter
    assert np.array_equal(fetch(adapter.start_A), fetch(layer.lora_A))
    assert np.array_equal(fetch(adapter.start_B), -fetch(layer.lora_B))
    assert adapter.start_A.data is not layer.lora_A.data


@pytest.mark.parametrize("kind", ["Linear", "Conv1d"])
def test_olora_takes_a_part_of_qr(kind):
    """B has orthonormal columns, A is the top of a triangle, and B A is W on what they span. Büyükakyüz 2024, algorithm 1."""
    base, r = base_of(kind), 3
    layer = lora.adapt(base, r=r, lora_alpha=7, use_rslora=True, init_lora_weights="olora", rng=1)
    W, A, B = matrix(base.weight), matrix(layer.lora_A), matrix(layer.lora_B)
    np.testing.assert_allclose(B.T @ B, np.eye(r), atol=1e-12)
    np.testing.assert_allclose(np.tril(A, -1), 0, atol=1e-12)
    np.testing.assert_allclose(B.T @ W, A, atol=1e-12)
    np.testing.assert_allclose((B @ A)[:, :r], W[:, :r], atol=1e-12)


def test_orthogonal_starts_with_nothing_but_zero():
    layer = lora.Linear(300, 200, r=8, dtype="float64", init_lora_weights="orthogonal", rng=1)
    A, B = fetch(layer.lora_A), fetch(layer.lora_B)
    assert np.abs(B @ A).max() < 1e-14 and layer.adapter.start_A is None
    # Each column of A^T and each row of B is a normal vector of r / 2 numbers, turned, over 10.
    for factor in (A, B):
        assert abs(factor.var() * 100 * 2 - 1) < 6 * math.sqrt(2 / factor.size) * 2
    assert np.linalg.matrix_rank(A) == np.linalg.matrix_rank(B) == 4


def test_start_is_frozen_while_training_goes_on(device):
    """Three steps: the update is that of rank 2 r, [B, -B0] and [A; A0]."""
    layer = lora.Linear(6, 5, r=2, lora_alpha=3, dtype="float64", init_lora_weights="pissa", rng=0)
    A0, B0 = fetch(layer.lora_A), fetch(layer.lora_B)
    optimizer = minilora.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        (layer(minilora.tensor(draw(4, 6, seed=step))) ** 2).mean().backward()
        optimizer.step()
    D = 1.5 * (fetch(layer.lora_B) @ fetch(layer.lora_A) - B0 @ A0)
    np.testing.assert_allclose(fetch(layer.delta()), D, atol=1e-14)
    assert np.abs(D).max() > 0.01
    assert np.array_equal(fetch(layer.adapter.start_A), A0) and np.array_equal(fetch(layer.adapter.start_B), -B0)
    A, B = layer.adapter.factors()
    assert A.shape == (4, 6) and B.shape == (5, 4)
    layer.requires_grad()
    layer.adapter.set_trainable(True)
    assert not layer.adapter.start_A.trainable and not layer.adapter.start_B.trainable


def test_one_seed_gives_one_adapter(device):
    for init in INITS:
        one = lora.adapt(base_of("Linear"), r=2, init_lora_weights=init, rng=3)
        with minilora.use("cpu"):
            two = lora.adapt(base_of("Linear"), r=2, init_lora_weights=init, rng=3)
        for (name, p), (_, q) in zip(one.named_parameters(), two.named_parameters()):
            assert fetch(p).tobytes() == fetch(q).tobytes(), name


@pytest.mark.parametrize("options, match", [
    (dict(r=6, init_lora_weights="pissa"), r"'pissa' takes r directions of the weight \(5, 6\): r is at most 5, got 6"),
    (dict(r=6, init_lora_weights="olora"), "'olora' takes r directions"),
    (dict(r=3, init_lora_weights="orthogonal"), "r must be even, got 3"),
    (dict(init_lora_weights=1), "got 1"), (dict(init_lora_weights=0), "got 0"),
    (dict(init_lora_weights="mica"), "begins none"), (dict(init_lora_weights="eva"), "begins none"),
    (dict(init_lora_weights=np.ones(2)), "must be one of True"),
    (dict(init_lora_weights="gaussian", lora_bias=True), "lora_bias: only with init_lora_weights=True"),
], ids=str)
def test_refused(options, match):
    base = base_of("Linear")
    before = fetch(base.weight).tobytes()
    with pytest.raises(ConfigError, match=match):
        lora.adapt(base, **options)
    assert fetch(base.weight).tobytes() == before and base.weight.trainable


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
def test_the_debug_start_is_random_in_both_factors(device, kind):
    layer = lora.adapt(base_of(kind), r=2, init_lora_weights=False, rng=1)
    A, B = fetch(layer.lora_A), fetch(layer.lora_B)
    assert (A != 0).all() and (B != 0).all() and not hasattr(layer, "start_A")
    if kind != "Embedding":
        assert np.abs(A).max() <= 1 / np.sqrt(np.prod(A.shape[1:])) and np.abs(B).max() <= 1 / np.sqrt(np.prod(B.shape[1:]))
    plain = lora.adapt(base_of(kind), r=2, init_lora_weights=True, rng=1)
    assert (fetch(plain.lora_A) == A).all() or kind == "Embedding"  # one seed, one A


def test_inject_with_a_start_that_only_files_have():
    for init in ("eva", "mica"):
        model = nn.Sequential(nn.Linear(4, 4, rng=0))
        with pytest.raises(ConfigError, match="begins none: take one of True"):
            lora.inject(model, lora.Config(target_modules=["0"], init_lora_weights=init))
        assert type(model[0]) is nn.Linear
    with pytest.raises(ConfigError, match="True, False, 'gaussian'"):
        lora.Config(target_modules=["0"], init_lora_weights="none")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_that_is_not_finite(init):
    base = base_of("Linear")
    base.weight.data[0, 0] = np.nan
    with pytest.raises(StateError, match="decomposes the weight, which holds NaN or inf"):
        lora.adapt(base, r=2, init_lora_weights=init)
