"""Classes of texts from pooled tokens: the formula, gradients, and what it is made with."""
import copy
import pickle

import numpy as np
import pytest

from conftest import PROOF, fetch, place
from minilora import Tensor, models, nn
from minilora.errors import ConfigError
from minilora.models.heads.pooled import pooled
from minilora.testing import gradcheck

BERT = nn.BertConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
                     max_position_embeddings=9)
IDS, MASK = np.array([[1, 2, 3, 4], [5, 6, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])


def build(pooling="mean", dtype="float64", labels=3, config=BERT):
    return models.SentenceClassifier(nn.Bert(config, False, dtype=dtype, rng=0), labels, pooling, rng=1)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_logits_and_loss_are_those_of_each_text_alone(pooling, device):
    own = build(pooling)
    W, b = fetch(own.classifier.weight), fetch(own.classifier.bias)
    expected = []
    for ids, mask in zip(IDS, MASK):
        h = fetch(own.body(ids[mask == 1]))
        expected.append((h[0] if pooling == "cls" else h.mean(axis=0)) @ W.T + b)
    for mask in (MASK, MASK.tolist(), MASK.astype(bool), place(MASK)):
        np.testing.assert_allclose(fetch(own(IDS, attention_mask=mask)), expected, rtol=1e-11)
        np.testing.assert_allclose(fetch(own(IDS, key_padding=mask)), expected, rtol=1e-11)
    loss = own(IDS, [2, 0], MASK)
    np.testing.assert_allclose(fetch(loss), -np.log(softmax(np.array(expected))[[0, 1], [2, 0]]).mean(), rtol=1e-11)
    assert own(IDS[0]).shape == (3,) and own(IDS[None]).shape == (1, 2, 3)
    assert np.isfinite(fetch(own([[1, 2]], key_padding=[[0, 0]]))).all()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@PROOF
def test_gradients(pooling, device):
    own = build(pooling)
    report = gradcheck(lambda: own(IDS, [2, 0], MASK), parameters=own.named_parameters(), full_size=8, directions=2)
    assert report, str(report)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pooled_keeps_the_dtype(dtype, device):
    h = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(dtype)
    for how in ("mean", "cls"):
        for mask in (None, np.array([[1, 1, 0], [0, 0, 0]])):
            v = pooled(Tensor(place(h)), mask, how)
            assert v.shape == (2, 4) and v.dtype == np.dtype(dtype)
    np.testing.assert_allclose(fetch(pooled(Tensor(place(h)), np.array([[1, 1, 0], [0, 0, 0]]), "mean")),
                               [h[0, :2].astype("float64").mean(0), np.zeros(4)], atol=1e-3 if dtype == "float16" else 1e-6)


def test_dropout_stands_before_the_classifier_in_training_alone():
    own = build(config=nn.BertConfig(**{**vars(BERT), "classifier_dropout": 0.5}))
    assert own.drop.p == 0.5 and build().drop.p == 0.0
    own.eval()
    assert np.array_equal(own(IDS).numpy(), own(IDS).numpy())
    own.train()
    assert not np.array_equal(own(IDS).numpy(), own(IDS).numpy())


def test_what_it_is_made_with():
    assert build(dtype="float32").classifier.weight.dtype == np.float32
    assert build(labels=["bad", "good"]).labels.names == ("bad", "good")
    assert build(labels=models.Labels(1, "regression"))(IDS, [0.5, 1.0]).shape == ()
    for wrong in (dict(labels=0), dict(labels=[]), dict(pooling="max")):
        with pytest.raises(ConfigError):
            build(**wrong)
    with pytest.raises(ConfigError, match="max_tokens"):
        models.SentenceClassifier(nn.Bert(BERT, False), 2, max_tokens=0)


def test_copies_compute_the_same():
    own = build()
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert np.array_equal(own(IDS).numpy(), other(IDS).numpy())
        other.classifier.weight.data[...] = 0.0
        assert own.classifier.weight.numpy().any()


@pytest.mark.parametrize("name, config", [
    ("DistilBert", models.DistilBertConfig(vocab_size=13, dim=8, n_layers=1, n_heads=2, hidden_dim=12,
                                           max_position_embeddings=9, seq_classif_dropout=0.25)),
    ("Roberta", models.RobertaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=12, max_position_embeddings=9, hidden_dropout_prob=0.25)),
])
def test_other_bodies(name, config):
    own = models.SentenceClassifier(getattr(models, name)(config, rng=0), 2, rng=1).eval()
    assert own.drop.p == 0.25 and own([[2, 3, 4]]).shape == (1, 2)
