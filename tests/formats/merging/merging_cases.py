"""Small bases and adapters for the tests of merging files; what is drawn is drawn by a seed."""
import json

import numpy as np

from minilora import formats, lora
from minilora.formats import SavedAdapter, TokenRows, Update

try:
    import ml_dtypes
    DTYPES = ["float32", "float16", "float64", "bfloat16"]
except ImportError:
    ml_dtypes = None
    DTYPES = ["float32", "float16", "float64"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


def drawn(rng, shape, dtype="float32", size=1.0):
    return (size * rng.standard_normal(shape)).astype(dtype_of(dtype))


# path: kind, shape of the weight
LAYERS = {"body.fc": ("linear", (12, 10)), "body.square": ("linear", (8, 8)), "body.emb": ("embedding", (20, 6)),
          "body.conv": ("convolution", (6, 4, 3)), "body.conv2": ("convolution", (6, 4, 3, 2)),
          "body.point": ("convolution", (6, 4, 1, 1))}


def base_tensors(dtype="float32", seed=0, layers=LAYERS):
    rng = np.random.default_rng(seed)
    tensors = {f"{path}.weight": drawn(rng, shape, dtype) for path, (_, shape) in layers.items()}
    tensors.update({f"{path}.bias": drawn(rng, shape[:1], dtype) for path, (kind, shape) in layers.items()
                    if kind != "embedding"})
    tensors["body.norm.weight"] = drawn(rng, (7,), dtype)
    tensors["body.ids"] = np.arange(5)
    tensors["body.empty"] = np.zeros((0, 3), dtype_of(dtype))
    return tensors


def write_base(folder, tensors, config=None, shard=None, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    formats.save_state(folder / name, tensors, {"format": "pt"}, max_shard_bytes=shard)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def update(rng, kind, shape, r=2, s=1.5, size=0.05, dtype="float32", dora=None, bias=False, groups=1):
    """An update for a weight (out, in, ...) as a model has it; with `dora`, that weight, lengths near its own."""
    if kind == "embedding":
        A, B = (r, shape[0]), (shape[1], r)
    elif kind == "convolution":
        A, B = (r, *shape[1:]), (shape[0], r // groups, *[1] * (len(shape) - 2))
    else:
        A, B = (r, shape[1]), (shape[0], r)
    A, B = drawn(rng, A, dtype), drawn(rng, B, dtype, size)
    magnitude = None
    if dora is not None:
        W = dora.astype("float64")
        W = W.T if kind == "embedding" else W.reshape(len(W), -1)
        magnitude = (np.sqrt((W * W).sum(axis=1)) * rng.uniform(0.8, 1.2, len(W))).astype(dtype)
    return Update(kind, A, B, s, drawn(rng, (len(B),), dtype, size) if bias else None, magnitude)


def adapter(updates, **parts):
    r = max((u.r for u in updates.values()), default=1)
    config = lora.Config(r=r, lora_alpha=2 * r, target_modules=list(updates) or ["none"],
                         use_dora=any(u.magnitude is not None for u in updates.values()),
                         lora_bias=any(u.bias is not None for u in updates.values()))
    return SavedAdapter(updates, config, **parts)


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


__all__ = ["DTYPES", "LAYERS", "TokenRows", "adapter", "base_tensors", "drawn", "dtype_of", "files_in", "update", "write_base"]
