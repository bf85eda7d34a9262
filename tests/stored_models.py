"""The stored checkpoints of the Llama family and DeBERTa as folders, and the comparison with what transformers made of them."""
import json
from pathlib import Path

import numpy as np
from checkpoint_cases import numbers, write_vectors
from conftest import fetch, place

import minilora
from minilora import models
from minilora.models.checkpoints.names import common_name
from minilora.models.checkpoints.writing import family_of

WHERE = Path(__file__).parent / "data" / "llama_deberta_vectors.json"
FOR_FILES = [name for name in json.loads(WHERE.read_text()) if name != "made with"]
V, T = 13, 9


def folder_of(architecture, folder, config=(), **more):
    """A stored checkpoint as a folder; `config` changes fields (None takes one out), `more` are further tensors."""
    folder.mkdir(exist_ok=True)
    return write_vectors(folder, architecture, config=config, where=WHERE, **more)


def batch():
    """(ids (2, T), mask): the second text is padded at its right."""
    ids = np.random.default_rng(1).integers(1, V, (2, T))
    mask = np.ones((2, T), int)
    mask[1, 6:] = 0
    return ids * mask, mask


def labels_of(architecture, ids, mask):
    if architecture.endswith("ForSequenceClassification"):
        return np.array([2, 0])
    return np.where(mask == 1, ids % 3 if architecture.endswith("ForTokenClassification") else ids, -100)


def assert_stored(architecture, folder):
    """Output, loss and every gradient of a loaded checkpoint, to 1e-10, 1e-10 and 1e-8."""
    vectors = folder_of(architecture, folder)
    own = models.load(folder)
    ids, mask = batch()
    y = own(ids, attention_mask=mask)
    expected = np.array(vectors["output"])
    seen = np.ones(2, bool) if architecture.endswith("ForSequenceClassification") else mask == 1
    np.testing.assert_allclose(fetch(y)[seen], expected[seen], rtol=0, atol=1e-10 * max(1.0, np.abs(expected).max()))
    if architecture.endswith("Model"):
        loss = ((y * minilora.Tensor(place(mask[..., None].astype(float)))) ** 2.0).mean()
    else:
        loss = own(ids, labels_of(architecture, ids, mask), attention_mask=mask)
    np.testing.assert_allclose(loss.item(), vectors["loss"], rtol=1e-10)
    loss.backward()
    family, head = family_of(own)
    for path, p in own.named_parameters():
        name = common_name(path, family, head)
        name = name if name in vectors["tensors"] else name.removeprefix(family.prefix)
        gradient = np.zeros(p.shape) if p.grad is None else fetch(p.grad)
        np.testing.assert_allclose((gradient * numbers("gradient", gradient.shape)).sum(), vectors["gradients"].get(name, 0.0),
                                   rtol=1e-8, atol=1e-12, err_msg=name)
