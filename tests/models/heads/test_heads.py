"""Heads: losses by their formulas, the last token, positions that skip padding, masked places, and vectors of sentences."""
import numpy as np
import pytest

from conftest import PROOF, fetch, place
from minilora import Tensor, models, nn
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError
from minilora.models.heads.classifier import last_rows
from minilora.models.heads.labels import Labels, loss_of_classes
from minilora.testing import gradcheck

BERT = nn.BertConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
                     max_position_embeddings=9)
ROBERTA = models.RobertaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
                               max_position_embeddings=9)
GPT2 = nn.GPT2Config(vocab_size=13, n_positions=9, n_embd=8, n_layer=1, n_head=2, n_inner=12)
DISTIL = models.DistilBertConfig(vocab_size=13, dim=8, n_layers=1, n_heads=2, hidden_dim=12, max_position_embeddings=9)
MADE = {
    "GPT2Classifier": (GPT2, 3), "GPT2TokenClassifier": (GPT2, 3),
    "BertClassifier": (BERT, 3), "BertTokenClassifier": (BERT, 3), "BertMaskedLM": (BERT, None),
    "RobertaClassifier": (ROBERTA, 3), "RobertaTokenClassifier": (ROBERTA, 3),
    "RobertaMaskedLM": (ROBERTA, None), "DistilBertClassifier": (DISTIL, 3), "DistilBertTokenClassifier": (DISTIL, 3),
    "DistilBertMaskedLM": (DISTIL, None),
}


def build(name, dtype="float64", rng=0):
    config, n = MADE[name]
    return getattr(models, name)(config, *([] if n is None else [Labels(n)]), dtype=dtype, rng=rng)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# -- losses ------------------------------------------------------------------------------------------------------------


def expected_loss(problem, z, labels):
    if problem == "regression":
        return ((z - np.reshape(labels, z.shape)) ** 2).mean()
    if problem == "single_label_classification":
        kept = labels != -100
        return -np.log(softmax(z)[kept, labels[kept]]).mean()
    p = 1 / (1 + np.exp(-z))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()


@pytest.mark.parametrize("problem, shape, given", [
    ("regression", (4, 1), (4, 1)), ("regression", (4, 1), (4,)), ("regression", (4, 3), (4, 3)),
    ("regression", (2, 2, 1), (2, 2)),
    ("single_label_classification", (4, 3), (4,)), ("single_label_classification", (3,), ()),
    ("single_label_classification", (2, 2, 3), (2, 2)), ("multi_label_classification", (4, 3), (4, 3)),
    ("multi_label_classification", (4, 1), (4, 1)), ("multi_label_classification", (1, 3), (1, 3)),
])
def test_losses(problem, shape, given, device):
    rng = np.random.default_rng(0)
    z = rng.normal(size=shape)
    single = problem == "single_label_classification"
    labels = rng.integers(0, shape[-1], given) if single else rng.random(given)
    labels = np.asarray(labels)
    kinds = [problem]
    if single or (problem == "regression") == (shape[-1] == 1):
        kinds.append(None)  # found from the labels
    for kind in kinds:
        narrow = labels.astype("int32" if single else "float32")
        for same in (labels, labels.tolist(), place(labels), Tensor(place(labels)), narrow):
            loss = loss_of_classes(Tensor(place(z)), same, Labels(shape[-1], kind))
            expected = expected_loss(problem, z, labels)
            np.testing.assert_allclose(fetch(loss), expected, rtol=1e-6 if getattr(same, "dtype", None) == "float32" else 1e-13)
            assert loss.shape == ()


def test_labels_of_ints_for_several_classes_each(device):
    """0 and 1, not floats: multi label if it is said so; and large logits lose nothing."""
    z = np.array([[800.0, -800.0, 3.0]])
    loss = loss_of_classes(Tensor(place(z)), [[1, 0, 0]], Labels(3, "multi_label_classification"))
    np.testing.assert_allclose(fetch(loss), np.log1p(np.exp(3.0)) / 3, rtol=1e-13)
    loss = loss_of_classes(Tensor(place(z)), [[0, 1, 0]], Labels(3, "multi_label_classification"))
    np.testing.assert_allclose(fetch(loss), (1600 + np.log1p(np.exp(3.0))) / 3, rtol=1e-13)


def test_a_text_that_is_not_to_count():
    z = np.random.default_rng(0).normal(size=(3, 4))
    loss = loss_of_classes(Tensor(z), [1, -100, 2], Labels(4))
    np.testing.assert_allclose(loss.item(), expected_loss("single_label_classification", z, np.array([1, -100, 2])))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_gradients_of_losses(problem, device):
    rng = np.random.default_rng(1)
    z = nn.Linear(3, 3, dtype="float64", rng=0)
    x = Tensor(place(rng.normal(size=(4, 3))))
    labels = rng.integers(0, 3, 4) if problem.startswith("single") else rng.random((4, 3))
    gradcheck(lambda x: loss_of_classes(z(x), labels, Labels(3, problem)), x, parameters=z.named_parameters()).check()


@pytest.mark.parametrize("labels, settings, error, text", [
    ([0, 3], (3, None), OutOfRangeError, "label 3 at position 1"), ([0, 1, 2], (3, None), ShapeError, "expected labels"),
    ([[0.5, 0.5]], (3, "multi_label_classification"), ShapeError, "expected labels of the shape of the logits"),
    ([0.5, 0.5], (3, "regression"), ShapeError, "regression: expected labels"), (["a", "b"], (3, None), DTypeError, "numbers"),
    ({0: 1}, (3, None), DTypeError, "got dict"), ([0.0, 1.0], (3, "single_label_classification"), DTypeError, "integers"),
])
def test_labels_that_do_not_fit(labels, settings, error, text):
    with pytest.raises(error, match=text):
        loss_of_classes(Tensor(np.zeros((2, 3))), labels, Labels(*settings))


@pytest.mark.parametrize("names", [0, -1, True, [], "ab", [1, 2], 2.0, None])
def test_labels_out_of_range(names):
    with pytest.raises(ConfigError, match="labels must be an int >= 1"):
        Labels(names)
    with pytest.raises(ConfigError, match="problem_type"):
        Labels(2, "ranking")


def test_labels_read_and_written():
    assert Labels.read({}) == Labels(2) and Labels.read({"num_labels": 3}) == Labels(3)
    many = {str(i): f"class {i}" for i in range(12)}
    read = Labels.read({"id2label": dict(reversed(many.items())), "problem_type": "regression"})
    assert read.names == tuple(many.values()) and Labels.read(read.write()) == read


# -- which token -------------------------------------------------------------------------------------------------------


def test_last_rows(device):
    h = np.random.default_rng(0).normal(size=(4, 5, 3))
    ids = np.array([[1, 2, 0, 0, 0], [0, 0, 1, 2, 3], [1, 0, 2, 0, 0], [0, 0, 0, 0, 0]])
    rows = np.arange(4)
    for given in (ids, ids.tolist(), place(ids), Tensor(place(ids))):  # all padding: the first, as in transformers
        np.testing.assert_array_equal(fetch(last_rows(Tensor(place(h)), given, 0, None)), h[rows, [1, 4, 2, 0]])
        np.testing.assert_array_equal(fetch(last_rows(Tensor(place(h)), given, None, None)), h[:, -1])
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    for given in (mask, mask.tolist(), mask.astype(bool), place(mask)):
        np.testing.assert_array_equal(fetch(last_rows(Tensor(place(h)), ids, None, given)), h[rows, [2, 4, 4, 0]])
    np.testing.assert_array_equal(fetch(last_rows(Tensor(place(h[0])), ids[0], 0, None)), h[0, 1])
    np.testing.assert_array_equal(fetch(last_rows(Tensor(place(h[None])), ids[None], 0, None)), h[None, rows, [1, 4, 2, 0]])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_class(side, device):
    for config in (GPT2, nn.GPT2Config(**{**vars(GPT2), "pad_token_id": 12})):
        own = models.GPT2Classifier(config, Labels(3), dtype="float64", rng=0)
        text = np.array([[1, 2, 3, 4]])
        expected = fetch(own(text))
        ids = np.array([[1, 2, 3, 4, 12, 12] if side == "right" else [12, 12, 1, 2, 3, 4]])
        mask = (ids != 12).astype(int)
        more = {} if side == "right" else {"position_ids": np.maximum(mask.cumsum() - 1, 0)}
        np.testing.assert_allclose(fetch(own(ids, attention_mask=mask, **more)), expected, atol=1e-12)


def test_positions_of_roberta(device):
    own = models.Roberta(ROBERTA, dtype="float64", rng=0)
    for ids, positions in [([[5, 6, 7]], [[2, 3, 4]]), ([[5, 1, 7, 1]], [[2, 1, 3, 1]]), ([[1, 1, 7]], [[1, 1, 2]]),
                           ([1], [1])]:
        np.testing.assert_array_equal(fetch(own.positions(place(np.array(ids)))), positions)
    text = np.array([[5, 6, 7]])
    for ids in (np.array([[5, 6, 7, 1, 1]]), np.array([[1, 1, 5, 6, 7]])):
        h = fetch(own(ids, attention_mask=ids != 1))
        np.testing.assert_allclose(h[ids != 1], fetch(own(text))[0], atol=1e-12)
    np.testing.assert_array_equal(fetch(own(text, position_ids=[2, 3, 4])), fetch(own(text)))
    assert own([[5] * 7]).shape == (1, 7, 8) and own([[5] * 7 + [1] * 5]).shape == (1, 12, 8)
    with pytest.raises(ShapeError, match="8 tokens, but the model has a vector for 7 positions"):
        own([[5] * 8])
    with pytest.raises(ConfigError, match="positions begin behind it"):
        models.RobertaConfig(pad_token_id=None)
    table = own.embeddings.position_embeddings
    assert table.padding_idx == 1 and not fetch(table.weight)[1].any()


# -- whole heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_shapes(name, device):
    own = build(name)
    n = 13 if MADE[name][1] is None else 3
    text = name.endswith("Classifier") and "Token" not in name
    for ids in ([[1, 2, 3], [4, 5, 6]], [7, 8], [[[1, 2]], [[3, 4]]]):
        ids = np.array(ids)
        shape = (*ids.shape[:-1], n) if text else (*ids.shape, n)
        assert own(ids).shape == shape == own(ids.tolist()).shape
        labels = np.ones(shape[:-1], int)
        loss = own(ids, labels)
        assert loss.shape == ()
        z = fetch(own(ids)).reshape(-1, n)
        np.testing.assert_allclose(fetch(loss), -np.log(softmax(z)[:, 1]).mean(), rtol=1e-12)
    with pytest.raises(ConfigError, match="two names of one thing"):
        own(ids, key_padding=ids > 0, attention_mask=ids > 0)


@pytest.mark.parametrize("name", [name for name in MADE if "Masked" in name])
def test_masked_places(name, device):
    """Only they are computed, and only they count; on whichever side the labels lie."""
    own = build(name)
    ids, labels = np.array([[2, 3, 4, 5], [6, 7, 8, 9]]), np.array([[-100, 3, -100, 5], [-100, -100, 8, -100]])
    z = fetch(own(ids))
    kept = labels != -100
    expected = -np.log(softmax(z[kept])[np.arange(3), labels[kept]]).mean()
    for given in (labels, labels.tolist(), place(labels)):
        np.testing.assert_allclose(fetch(own(ids, given)), expected, rtol=1e-12)
    with pytest.raises(ShapeError, match="nothing to average"):
        own(ids, np.full_like(ids, -100))
    with pytest.raises(ShapeError, match="expected labels of the shape of the ids"):
        own(ids, labels[:, 1:])


@pytest.mark.parametrize("name", [name for name in MADE if "Masked" in name])
@PROOF
def test_gradients_of_masked_places(name, device):
    own = build(name)
    ids, labels = np.array([[2, 3, 4, 5], [6, 7, 8, 9]]), np.array([[-100, 3, -100, 5], [-100, -100, 8, -100]])
    gradcheck(lambda: own(ids, labels), parameters=own.named_parameters(), directions=2, full_size=8).check()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentences(pooling, normalize, device):
    own = models.SentenceEncoder(nn.Bert(BERT, dtype="float64", rng=0), pooling, normalize, max_tokens=6)
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [1, 12], [3, 2, 1, 4, 5, 6]]
    expected = []
    for text in texts:
        h = fetch(own.hidden(text[:6]))
        v = h[0] if pooling == "cls" else h.mean(axis=0)
        expected.append(v / np.linalg.norm(v) if normalize else v)
        np.testing.assert_allclose(fetch(own(text[:6])), expected[-1], rtol=1e-12)
    for size in (1, 2, 32):
        vectors = own.embed(texts, batch_size=size)
        assert vectors.dtype == np.float64 and isinstance(vectors, np.ndarray)
        np.testing.assert_allclose(vectors, expected, rtol=1e-11)
        np.testing.assert_allclose(own.embed(texts, batch_size=size, threads=2), expected, rtol=1e-11)
    ids, mask = np.array([[1, 2, 3], [0, 0, 4]]), np.array([[1, 1, 1], [0, 0, 1]])
    more = {"position_ids": [[0, 1, 2], [0, 0, 0]]}
    for given in (mask, mask.tolist(), mask.astype(bool), place(mask)):
        v = fetch(own(ids, attention_mask=given, **more))
        np.testing.assert_allclose(v[0], expected[0], rtol=1e-11)
        if pooling == "mean":
            np.testing.assert_allclose(v[1], expected[1], rtol=1e-11)
    assert np.isfinite(fetch(own([[1, 2]], [[0, 0]]))).all()
    assert own.embed([]).shape == (0, 8)
    with pytest.raises(ConfigError, match="text 1 has no tokens"):
        own.embed([[1], []])


@PROOF
def test_gradients_of_sentences(device):
    own = models.SentenceEncoder(nn.Bert(BERT, False, dtype="float64", rng=0))
    mask = [[1, 1, 1, 0], [1, 1, 0, 0]]
    report = gradcheck(lambda: own([[1, 2, 3, 4], [5, 6, 7, 8]], mask), parameters=own.named_parameters(), full_size=8,
                       directions=2)
    assert report, str(report)


@pytest.mark.parametrize("settings", [("max",), ("mean", 1), ("mean", True, 0), ("mean", True, 1.5)])
def test_settings_of_sentences(settings):
    with pytest.raises(ConfigError):
        models.SentenceEncoder(nn.Bert(BERT), *settings)


def test_public_names():
    assert {getattr(models, name).__name__ for name in models.__all__} == set(models.__all__)
    assert set(models.__all__) <= set(dir(models))
    with pytest.raises(AttributeError, match="no attribute 'bert_'"):
        models.bert_  # noqa: B018
