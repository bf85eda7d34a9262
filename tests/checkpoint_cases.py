"""Tiny checkpoints of every architecture: what transformers' config is made with, and what each is asked.

`SIZES` gives the config of a family, `ARCHITECTURES` the family of an architecture, and what kind of labels it takes.
"""
import json
import zlib
from pathlib import Path

import numpy as np

from minilora.formats.tensors.writing import save_state

VECTORS = Path(__file__).parent / "data" / "model_vectors.json"

V, P, N = 13, 12, 3  # tokens, positions, classes
BERT = dict(vocab_size=V, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=P, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

SIZES = {
    "gpt2": dict(vocab_size=V, n_positions=P, n_embd=8, n_layer=2, n_head=2, n_inner=12, embd_pdrop=0.0, resid_pdrop=0.0,
                 attn_pdrop=0.0, classifier_dropout=0.0, pad_token_id=12, bos_token_id=None, eos_token_id=None),
    "bert": dict(BERT, pad_token_id=0),
    "roberta": dict(BERT, pad_token_id=1, type_vocab_size=1, bos_token_id=0, eos_token_id=2),
    "xlm-roberta": dict(BERT, pad_token_id=1, type_vocab_size=1, bos_token_id=0, eos_token_id=2),
    "distilbert": dict(vocab_size=V, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=P, dropout=0.0,
                       attention_dropout=0.0, seq_classif_dropout=0.0, pad_token_id=0),
}
KINDS = {"": "hidden", "LMHeadModel": "next", "ForMaskedLM": "masked", "ForSequenceClassification": "text",
         "ForTokenClassification": "tokens", "Model": "hidden"}
HEADS = {
    "gpt2": ("GPT2", ["Model", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification"]),
    **{family: (name, ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
       for family, name in [("bert", "Bert"), ("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"),
                            ("distilbert", "DistilBert")]},
}
ARCHITECTURES = {name + head: (family, KINDS[head]) for family, (name, heads) in HEADS.items() for head in heads}

PADDINGS = {"none": (0, 0), "right": (0, 3), "left": (3, 0)}  # of the second of two texts


def batch(family, padding, seed=1):
    """(ids (2, 7), mask or None); where the mask is 0 stands the padding's id, and nowhere else."""
    pad = SIZES[family]["pad_token_id"]
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V - 1, (2, 7))
    ids += ids >= pad
    left, right = PADDINGS[padding]
    mask = np.ones((2, 7), int)
    mask[1, :left] = 0
    mask[1, 7 - right:] = 0
    return np.where(mask, ids, pad), None if padding == "none" else mask


def labels_of(kind, ids, mask, seed=2):
    """Labels for a kind of head; -100 where there is padding, and in some places more."""
    rng = np.random.default_rng(seed)
    kept = np.ones_like(ids) if mask is None else mask
    if kind == "text":
        return rng.integers(0, N, len(ids))
    if kind in ("next", "masked"):
        return np.where((kept == 1) & ((kind == "next") | (rng.random(ids.shape) < 0.5)), ids, -100)
    return np.where(kept == 1, rng.integers(0, N, ids.shape), -100)


def numbers(name, shape):
    """Weights that are written down by a formula: files need not hold them. Around 1 for what norms multiply with."""
    size = int(np.prod(shape, dtype=int))
    centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return (centre + 0.4 * np.sin(1.0 + 0.7 * np.arange(size) + zlib.crc32(name.encode()) % 1000)).reshape(shape)


def write_vectors(folder, architecture, dtype="float64", config=(), rename=None, where=VECTORS, **more):
    """A stored checkpoint as a folder, and what is known of it; `config` changes fields (None takes one out).

    `rename` maps a name to that in the file, or to None for none; `more` are further tensors.
    """
    vectors = json.loads(where.read_text())[architecture]
    tensors = {name: numbers(name, tuple(shape)).astype(dtype) for name, shape in vectors["tensors"].items()}
    if rename is not None:
        tensors = {rename(name): array for name, array in tensors.items() if rename(name) is not None}
    tensors.update(more)
    fields = {**vectors["config"], **dict(config)}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    save_state(folder / "model.safetensors", tensors, {"format": "pt"})
    return vectors
