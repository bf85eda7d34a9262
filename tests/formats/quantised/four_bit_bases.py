"""Small folders with 4-bit weights for tests, and the means to spoil one tensor of them."""
import json

import numpy as np

from minilora import models, nn
from minilora.formats import load_state, save_state
from minilora.quant import FourBit

KINDS = [("nf4", True), ("nf4", False), ("fp4", True)]


def llama(**more):
    return models.Llama(models.LlamaConfig(**{**dict(
        vocab_size=31, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32), **more}), rng=0)


def gpt2(**more):
    return nn.GPT2(nn.GPT2Config(**{**dict(vocab_size=31, n_positions=32, n_embd=64, n_layer=1, n_head=4), **more}), rng=0)


def four_bits(model, kind="nf4", double=True, skip=("lm_head",), blocksize=64):
    """The model with its linear weights in 4 bits."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in skip:
            module.weight.data = FourBit.of(module.weight.data, kind, blocksize, double=double)
            module.weight.trainable = False
    return model


def write(folder, kind="nf4", double=True, make=llama, shard=None):
    models.save(four_bits(make(), kind, double), folder, *([] if shard is None else [shard]))
    return folder


def spoil(folder, tensors):
    """Put other tensors into the file: by name, an array, or what makes one of the old; None takes it out."""
    path = folder / "model.safetensors"
    state = load_state(path)
    for name, value in tensors.items():
        if value is None:
            del state[name]
        else:
            state[name] = value(state[name]) if callable(value) else value
    save_state(path, state, {"format": "pt"})


def config(folder, **fields):
    """Change fields of quantization_config."""
    path = folder / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"].update(fields)
    path.write_text(json.dumps(said))


def words(**fields):
    """A change of the words of a weight."""
    def changed(array):
        said = {**json.loads(array.tobytes()), **fields}
        return np.frombuffer(json.dumps({name: value for name, value in said.items() if value is not ...}).encode(), "uint8")
    return changed
