"""Low-rank updates of a table and of a fused projection against torch's autograd, in float64. Run with -m parity."""
import warnings

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora.lora.gradients.embedding import lora_embedding, lora_head
from minilora.lora.gradients.fused import block_diagonal, lora_merged_linear

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        return pytest.importorskip("torch")


def assert_close(got, expected, name):
    got, expected = fetch(got), expected.detach().numpy()
    assert got.shape == expected.shape, f"{name}: {got.shape}, torch {expected.shape}"
    assert np.abs(got - expected).max(initial=0.0) <= 1e-10 * max(1.0, np.abs(expected).max(initial=0.0)), name


def compare(torch, ours, theirs, *shapes, seed=0):
    """Output and every gradient, under one random cotangent."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    leaves = [minilora.Parameter(place(a)) for a in arrays]
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, y_torch = ours(*leaves), theirs(*tensors)
    assert_close(y, y_torch, "output")
    dy = rng.standard_normal(y.shape)
    y.backward(place(dy))
    y_torch.backward(torch.tensor(dy))
    for i, (leaf, tensor) in enumerate(zip(leaves, tensors)):
        assert_close(leaf.grad, tensor.grad, f"gradient {i}")


@pytest.mark.parametrize("padding_idx", [None, 0, 4])
@pytest.mark.parametrize("shape", [(12,), (3, 5), (), (0,), (400,)], ids=str)
def test_embedding(device, torch, shape, padding_idx):
    ids = np.random.default_rng(1).integers(0, 11, shape)
    embedding = torch.nn.functional.embedding

    def theirs(W, A, B):
        places = torch.tensor(ids)
        return embedding(places, W, padding_idx) + 0.7 * (embedding(places, A.T, padding_idx) @ B.T)
    compare(torch, lambda W, A, B: lora_embedding(ids, W, A, B, 0.7, padding_idx), theirs, (11, 6), (3, 11), (6, 3))


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_embedding_of_peft(device, torch, padding_idx):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        base = torch.nn.Sequential(torch.nn.Embedding(11, 6, padding_idx=padding_idx))
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(base, config).double()
    layer = model.base_model.model[0]
    ids = np.random.default_rng(1).integers(0, 11, (3, 5))
    theirs = [layer.base_layer.weight, layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    theirs[0].requires_grad_()
    ours = [minilora.Parameter(place(p.detach().numpy())) for p in theirs]
    y, y_peft = lora_embedding(ids, *ours, layer.scaling["default"], padding_idx), model(torch.tensor(ids))
    assert_close(y, y_peft, "output")
    dy = np.random.default_rng(2).standard_normal(y.shape)
    y.backward(place(dy))
    y_peft.backward(torch.tensor(dy))
    for name, p, q in zip("WAB", ours, theirs):
        assert_close(p.grad, q.grad, name)
    merged = theirs[0] + layer.get_delta_weight("default")
    assert_close(y, merged[torch.tensor(ids)], "merged")


@pytest.mark.parametrize("axes", [(7,), (2, 3), ()], ids=str)
def test_tied_head(device, torch, axes):
    compare(torch, lambda h, W, A, B: lora_head(h, W, A, B, 0.7),
            lambda h, W, A, B: torch.nn.functional.linear(h, W + 0.7 * (B @ A).T), (*axes, 6), (11, 6), (3, 11), (6, 3))


def test_table_and_head_tied(device, torch):
    ids = np.random.default_rng(1).integers(0, 11, (2, 5))

    def theirs(W, A, B):
        table = W + 0.7 * (B @ A).T
        return torch.tanh(torch.nn.functional.embedding(torch.tensor(ids), table)) @ table.T
    compare(torch, lambda W, A, B: lora_head(minilora.ops.tanh(lora_embedding(ids, W, A, B, 0.7)), W, A, B, 0.7), theirs,
            (11, 6), (3, 11), (6, 3))


def merged_delta(torch, A, B, s, enable_lora, out):
    """The update as loralib defines it: a convolution with a group for each enabled slot, spread over their rows."""
    has_update = torch.zeros(len(enable_lora), out // len(enable_lora), dtype=torch.bool)
    has_update[list(enable_lora)] = True
    blocks = torch.nn.functional.conv1d(A[None], B[:, :, None], groups=sum(enable_lora))[0]
    delta = torch.zeros(out, A.shape[1], dtype=A.dtype)
    delta[has_update.reshape(-1)] = blocks
    return s * delta


@pytest.mark.parametrize("x", [(7, 5), (2, 3, 5), (5,), (0, 5)], ids=str)
@pytest.mark.parametrize("enable_lora", [(True, False, True), (True, True, True), (False, True), (True,)], ids=str)
@pytest.mark.parametrize("r", [1, 3])
def test_merged_linear(device, torch, x, enable_lora, r):
    o, m = 4, sum(enable_lora)
    out = o * len(enable_lora)
    compare(torch, lambda x, W, b, A, B: lora_merged_linear(x, W, b, A, B, 0.7, enable_lora),
            lambda x, W, b, A, B: torch.nn.functional.linear(x, W + merged_delta(torch, A, B, 0.7, enable_lora, out), b),
            x, (out, 5), (out,), (m * r, 5), (m * o, r))
    rng = np.random.default_rng(3)
    A, B = rng.standard_normal((m * r, 5)), rng.standard_normal((m * o, r))
    whole = minilora.lora.delta(*block_diagonal(place(A), place(B), 0.7, enable_lora, out))
    assert_close(whole, merged_delta(torch, torch.tensor(A), torch.tensor(B), 0.7, enable_lora, out), "delta")
