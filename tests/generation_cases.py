"""Prompts and settings of greedy generation, and the tiny models that continue them: for parity, and for stored vectors."""
import numpy as np
from tiny_transformers import V, build, randomise

from minilora import no_grad

N = 50  # new tokens
CHANGES = {"gpt2": {"n_positions": 64}, "llama": {}}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]
SETTINGS = {"plain": {}, "penalty": {"repetition_penalty": 1.3}, "reward": {"repetition_penalty": 0.7}}
PROCESSED = {  # settings of a draw: (temperature, top_k, top_p, repetition_penalty)
    "temperature": (0.7, None, None, None), "top_k": (1.0, 3, None, None), "top_p": (1.0, None, 0.8, None),
    "all": (1.6, 5, 0.7, 1.2), "few": (0.3, 1, 0.1, 2.0), "many": (2.5, 99, 1.0, 0.8),
}


def settle(family, model):
    """Weights with which the texts do not repeat one token: GPT-2's logits are products with the tokens' own vectors."""
    if family == "gpt2":
        model.wpe.weight.data *= 30.0
        model.ln_f.bias.data *= 0.0
        with no_grad():
            wte = model.wte.weight
            wte.data /= ((wte * wte).sum(axis=1, keepdims=True) ** 0.5).data
    return model


def model_of(family, **changes):
    return settle(family, randomise(build(family, **{**CHANGES[family], **changes})))


def logits(ties):
    """Logits (4, V), on a coarse grid if there are to be equal ones."""
    z = np.random.default_rng(2).normal(0.0, 2.0, (4, V))
    return np.round(z * 2.0) / 2.0 if ties else z


def seen():
    """The tokens of four texts, (4, 5)."""
    return np.random.default_rng(3).integers(0, V, (4, 5))
