"""Checkpoints that transformers wrote, loaded; ours, loaded by transformers: the same numbers, losses and gradients.

Some losses of transformers are computed in float32 whatever the model's dtype is: they are written out, in float64.
"""
import json
import warnings

import numpy as np
import pytest
from checkpoint_cases import ARCHITECTURES, PADDINGS, SIZES, batch, labels_of
from test_torch import torch  # noqa: F401  (a fixture)

from conftest import fetch
from minilora import models
from minilora.models.checkpoints.names import common_name
from minilora.models.checkpoints.writing import family_of

pytestmark = pytest.mark.parity
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(scope="module")
def transformers(torch):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own imports
        found = pytest.importorskip("transformers")
    found.utils.logging.set_verbosity_error()
    found.utils.logging.disable_progress_bar()
    return found


def theirs(torch, transformers, architecture, dtype="float64", seed=3, **changes):  # noqa: F811
    """A model of transformers with random numbers everywhere, so large that every part of it counts."""
    family, kind = ARCHITECTURES[architecture]
    config = transformers.AutoConfig.for_model(family, **{**SIZES[family], **changes})
    if kind in ("text", "tokens") and "num_labels" not in changes:
        config.num_labels = 3
    model = getattr(transformers, architecture)(config)
    randomise(torch, model, seed)
    return model.to(getattr(torch, dtype)).eval()


def randomise(torch, model, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(torch.tensor(rng.normal(centre, 0.3, tuple(p.shape))))


def assert_close(ours, other, what, tolerance):
    ours, other = fetch(ours), other.detach().numpy()
    assert ours.shape == other.shape, what
    assert np.abs(ours - other).max(initial=0.0) <= tolerance * max(1.0, np.abs(other).max(initial=0.0)), what


def loss_of(torch, kind, result, labels):  # noqa: F811
    """Their loss, in the dtype of the model."""
    entropy = torch.nn.functional.cross_entropy
    if kind == "hidden":
        return (result.last_hidden_state ** 2).mean()
    if kind == "text":
        return entropy(result.logits, labels)
    logits, labels = (result.logits[:, :-1], labels[:, 1:]) if kind == "next" else (result.logits, labels)
    return entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def check(torch, own, other, architecture, padding, dtype):  # noqa: F811
    """Outputs, loss and every gradient of two models."""
    family, kind = ARCHITECTURES[architecture]
    tolerance = TOLERANCE[dtype]
    ids, mask = batch(family, padding)
    labels = labels_of(kind, ids, mask)
    result = other(input_ids=torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask))
    y = own(ids, attention_mask=mask)
    expected = result.last_hidden_state if kind == "hidden" else result.logits
    seen = np.ones(ids.shape, bool) if mask is None else mask == 1
    if kind == "text":
        assert_close(y, expected, "logits", tolerance)
    else:  # of padding, transformers gives other numbers, which nobody reads
        assert_close(fetch(y)[seen], expected[torch.tensor(seen)], "output", tolerance)
    if kind == "hidden":
        weights = seen[..., None].astype(dtype)
        loss, mine = ((expected * torch.tensor(weights)) ** 2).mean(), ((y * weights_as(y, weights)) ** 2.0).mean()
    else:
        loss, mine = loss_of(torch, kind, result, torch.tensor(labels)), own(ids, labels, attention_mask=mask)
    assert_close(mine, loss, "loss", tolerance)
    loss.backward()
    mine.backward()
    compare_gradients(own, other, tolerance)


def weights_as(y, weights):
    return type(y)(weights)


def compare_gradients(own, other, tolerance):
    family, head = family_of(own)
    their = dict(other.named_parameters(remove_duplicate=False))
    pairs = {}
    for path, p in own.named_parameters():
        name = common_name(path, family, head)
        name = name if name in their else name.removeprefix(family.prefix)
        pairs[path] = (p, their.pop(name), name.endswith(family.transposed))
    assert not [name for name, p in their.items() if p.grad is not None and p.grad.any() and id(p) not in
                {id(q) for _, q, _ in pairs.values()}]
    largest = max(q.grad.abs().max().item() for _, q, _ in pairs.values() if q.grad is not None)
    for path, (p, q, turned) in pairs.items():
        if q.grad is None:
            assert p.grad is None or not fetch(p.grad).any(), path
        else:
            grad = q.grad.numpy().T if turned else q.grad.numpy()
            scale = largest if path.endswith(("key.bias", "k_lin.bias")) else max(np.abs(grad).max(), 1e-3 * largest)
            assert np.abs(fetch(p.grad) - grad).max() <= tolerance * scale, path


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded(architecture, padding, dtype, tmp_path, torch, transformers):  # noqa: F811
    other = theirs(torch, transformers, architecture, dtype)
    other.save_pretrained(tmp_path)
    own = models.load(tmp_path)
    assert {p.dtype.name for p in own.parameters()} == {dtype} and not own.training
    check(torch, own, other, architecture, padding, dtype)


OPTIONS = [
    *(("GPT2LMHeadModel", dict(activation_function=name)) for name in ("gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh")),
    ("GPT2LMHeadModel", dict(tie_word_embeddings=False)), ("GPT2LMHeadModel", dict(n_inner=None, layer_norm_epsilon=0.1)),
    ("GPT2LMHeadModel", dict(reorder_and_upcast_attn=False, scale_attn_weights=True)),
    *((name, dict(hidden_act=act)) for name in ("BertForMaskedLM", "RobertaForMaskedLM")
      for act in ("gelu_new", "relu", "silu")),
    ("BertForSequenceClassification", dict(layer_norm_eps=0.1, pad_token_id=None)),
    ("DistilBertForMaskedLM", dict(activation="relu")), ("DistilBertForSequenceClassification", dict(activation="gelu_new")),
    ("RobertaModel", dict(type_vocab_size=2)),
]


@pytest.mark.parametrize("architecture, changes", OPTIONS, ids=str)
def test_options(architecture, changes, tmp_path, torch, transformers):  # noqa: F811
    other = theirs(torch, transformers, architecture, **changes)
    other.save_pretrained(tmp_path)
    check(torch, models.load(tmp_path), other, architecture, "right", "float64")


@pytest.mark.parametrize("problem, count", [("regression", 1), (None, 1), ("regression", 3), ("multi_label_classification", 3),
                                            (None, 3), ("single_label_classification", 3)])
@pytest.mark.parametrize("architecture", [name for name, (_, kind) in ARCHITECTURES.items() if kind == "text"])
def test_losses_of_classifiers(architecture, problem, count, tmp_path, torch, transformers):  # noqa: F811
    """Theirs, as they compute it."""
    other = theirs(torch, transformers, architecture, num_labels=count, problem_type=problem)
    other.save_pretrained(tmp_path)
    own = models.load(tmp_path)
    ids, mask = batch(ARCHITECTURES[architecture][0], "left")
    rng = np.random.default_rng(4)
    for labels in (rng.integers(0, count, 2), rng.random((2, count)), rng.random(2)):
        if (labels.dtype.kind == "i") != (problem == "single_label_classification" or problem is None and count > 1):
            continue
        if labels.shape != (2, count) and labels.dtype.kind == "f" and count > 1:
            continue
        other.config.problem_type = problem
        other.zero_grad()
        loss = other(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
        for p in own.parameters():
            p.grad = None
        mine = own(ids, labels, attention_mask=mask)
        assert_close(mine, loss, "loss", 1e-10)
        loss.backward()
        mine.backward()
        compare_gradients(own, other, 1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_models_load_there(architecture, tmp_path, torch, transformers):  # noqa: F811
    """As they were saved, and after all weights have changed; nothing is missing or unexpected there."""
    other = theirs(torch, transformers, architecture)
    other.save_pretrained(tmp_path / "a")
    own = models.load(tmp_path / "a")
    for shift in (0.0, 0.1):
        for p in own.parameters():
            p.data = p.data + shift
        models.save(own, tmp_path / "b", max_shard_bytes=2000)
        again, info = getattr(transformers, architecture).from_pretrained(tmp_path / "b", dtype="auto",
                                                                          output_loading_info=True)
        assert not any(info.values()), info
        family = ARCHITECTURES[architecture][0]
        ids, mask = batch(family, "right")
        result = again.eval()(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        expected = getattr(result, "logits", None)
        expected = result.last_hidden_state if expected is None else expected
        y = fetch(own(ids, attention_mask=mask))
        seen = slice(None) if y.ndim == 2 else mask == 1
        assert_close(y[seen], expected[torch.tensor(seen) if not isinstance(seen, slice) else seen], "output", 1e-10)
        before = {name: tensor.numpy().tobytes() for name, tensor in other.state_dict().items()}
        if not shift:
            assert {name: tensor.numpy().tobytes() for name, tensor in again.state_dict().items()} == before
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    first = json.loads((tmp_path / "a" / "config.json").read_text())
    assert {name: written.get(name) for name in first} == first


@pytest.mark.parametrize("name", ["GPT2Model", "BertModel", "RobertaModel", "DistilBertModel"])
def test_a_head_of_its_own_on_a_bare_body(name, tmp_path, torch, transformers):  # noqa: F811
    """A file without prefixes: the body is theirs, the head is drawn; and back, the body of a model with a head."""
    other = theirs(torch, transformers, name)
    other.save_pretrained(tmp_path / "body")
    own = models.load(tmp_path / "body", head="sequence_classification", labels=["no", "yes"], rng=0)
    assert "drawn" in " ".join(own.origin.notes)
    family = ARCHITECTURES[name][0]
    ids, mask = batch(family, "right")
    expected = other(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    assert_close(fetch(own.hidden(ids, mask))[mask == 1], expected[torch.tensor(mask == 1)], "hidden", 1e-10)
    models.save(own, tmp_path / "classifier")
    body = models.load(tmp_path / "classifier", head="base")
    assert_close(fetch(body(ids, attention_mask=mask))[mask == 1], expected[torch.tensor(mask == 1)], "hidden", 1e-10)
    assert "left aside" in " ".join(body.origin.notes)
