"""Adapter files in PEFT's dialect, drawn: every way to spell keys and settings, loaded, written back and merged into files.

What must come out is computed here from the arrays of the file, in float64.
"""
import json

import numpy as np
import pytest
from conftest import fetch

from minilora import formats, lora, nn
from minilora.errors import FormatError

LINEAR = {"layers.0.q": (6, 6), "layers.0.v": (4, 6), "layers.1.q": (6, 6), "layers.1.v": (4, 6), "head": (5, 6)}
PREFIXES = ["base_model.model.", "", "module.base_model.model.", "_orig_mod.base_model.model.", "base_model.model._orig_mod."]
NAMES = ["", ".default", ".poems", ".default.default"]
OFF = {"enable_lora": None, "merge_weights": False, "loftq_config": {}, "megatron_config": None,
       "megatron_core": "megatron.core",
       "layer_replication": None, "something_new": None, "another": False, "eva_config": None, "qalora_group_size": 16,
       "trainable_token_indices": None, "layers_pattern": None, "layers_to_transform": None, "exclude_modules": None,
       "auto_mapping": None, "revision": None, "peft_version": "0.21.2", "runtime_config": {"ephemeral_gpu_offload": False}}
DTYPES = ["float16", "float32", "float64"]


class Block(nn.Module):
    def __init__(self, rng):
        self.q, self.v = nn.Linear(6, 6, rng=rng), nn.Linear(6, 4, bias=False, rng=rng)


class Net(nn.Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.emb, self.layers = nn.Embedding(9, 6, rng=rng), [Block(rng), Block(rng)]
        self.conv, self.head = nn.Conv2d(3, 4, 3, rng=rng), nn.Linear(6, 5, rng=rng)


def numbers(model):
    return {name: fetch(p) for name, p in model.named_parameters()}


class Drawn:
    """A config, the tensors of a file, and the parameters that a model has with it: `expected`, in float64."""

    def __init__(self, rng, prefix, name, dtypes):
        self.rng, self.prefix, self.name, self.dtypes = rng, prefix, name, dtypes
        self.base, self.tensors, self.expected = numbers(Net()), {}, {}
        layers = [path for path in [*LINEAR, "emb", "conv"] if rng.random() < 0.5] or ["head"]
        self.config = {
            "peft_type": "LORA", "r": int(rng.choice([1, 2, 4])), "lora_alpha": [8, 16.0, 3, 0.5][rng.integers(4)],
            "use_rslora": bool(rng.random() < 0.3), "use_dora": bool(rng.random() < 0.3),
            "rank_pattern": {}, "alpha_pattern": {},
            "target_modules": [layers, "|".join(path.replace(".", r"\.") for path in layers)][rng.integers(2)],
            "bias": str(rng.choice(["none", "lora_only"])), **{key: OFF[key] for key in OFF if rng.random() < 0.3}}
        patterns = [("rank_pattern", [1, 3]), ("alpha_pattern", [2, 5.0])]
        hits = {field: self.pattern(field, layers, values) for field, values in patterns if rng.random() < 0.5}
        for path in layers:
            r = hits.get("rank_pattern", {}).get(path, self.config["r"])
            alpha = hits.get("alpha_pattern", {}).get(path, self.config["lora_alpha"])
            self.update(path, r, alpha / (r ** 0.5 if self.config["use_rslora"] else r))
        if "head" not in layers and rng.random() < 0.5:
            self.config["modules_to_save"] = ["head"]
            own = str(rng.choice(["", "modules_to_save.", f"modules_to_save{name or '.default'}."]))
            for part, shape in (("weight", (5, 6)), ("bias", (5,))):
                self.expected[f"head.{part}"] = self.put(f"head.{own}{part}", self.draw(*shape))

    def pattern(self, field, layers, values):
        """Settings for one module by its path, an anchored path or its last name; which layers it hits."""
        path, value = str(self.rng.choice(layers)), values[self.rng.integers(2)]
        key = [path, "^" + path.replace(".", r"\.") + "$", path.split(".")[-1]][self.rng.integers(3)]
        self.config[field] = {key: value}
        return {one: value for one in layers if key in (one, one.split(".")[-1]) or key.startswith("^") and one == path}

    def draw(self, *shape):
        return self.rng.standard_normal(shape).astype(self.dtypes[self.rng.integers(len(self.dtypes))])

    def put(self, key, array):
        self.tensors[self.prefix + key] = array
        return array.astype("float64")

    def update(self, path, r, s):
        W = self.base[f"{path}.weight"].astype("float64")
        if path == "emb":
            A, B = (self.put(f"{path}.lora_embedding_{part}{self.name}", self.draw(*shape))
                    for part, shape in (("A", (r, 9)), ("B", (6, r))))
            W = (W.T + s * B @ A).T
        else:
            A = self.put(f"{path}.lora_A{self.name}.weight", self.draw(r, *W.shape[1:]))
            B = self.put(f"{path}.lora_B{self.name}.weight", self.draw(len(W), r, *[1] * (W.ndim - 2)))
            W = W + s * (B.reshape(-1, r) @ A.reshape(r, -1)).reshape(W.shape)
        if self.config["use_dora"]:
            own = "" if self.name == ".default.default" else self.name
            shape = {"emb": (6,), "conv": (1, 4, 1, 1)}.get(path, W.shape[:1])
            key = f"{path}.lora_magnitude_vector{own}{self.rng.choice(['', '.weight'])}"
            m = self.put(key, abs(self.draw(*shape)) + self.dtypes_of(1)).reshape(-1)
            rows = W.T if path == "emb" else W.reshape(len(W), -1)
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) * m[:, None]
            W = rows.T if path == "emb" else rows.reshape(W.shape)
        self.expected[f"{path}.weight"] = W
        if self.config["bias"] == "lora_only" and f"{path}.bias" in self.base:
            own = str(self.rng.choice([".base_layer", ""]))
            self.expected[f"{path}.bias"] = self.put(f"{path}{own}.bias", self.draw(len(W)))

    def dtypes_of(self, number):
        return np.float16(number)  # promotes none of the dtypes

    def check(self, found):
        assert found.keys() == self.base.keys()
        for name, value in found.items():
            expected = self.expected.get(name, self.base[name])
            assert (abs(value.astype("float64") - expected) <= 3e-6 * (1 + abs(expected))).all(), name


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    formats.save_state(folder / "adapter_model.safetensors", tensors)


def merged(folder):
    model = Net()
    formats.load_adapter(model, folder)
    lora.bake(model)
    return numbers(model)


SEEDS = [*range(8), *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 300)]]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_file_is_what_it_says(tmp_path, seed):
    rng, folder = np.random.default_rng(seed), tmp_path
    drawn = Drawn(rng, str(rng.choice(PREFIXES)), str(rng.choice(NAMES)), [["float32"], ["float16"], DTYPES][rng.integers(3)])
    write(folder / "adapter", drawn.config, drawn.tensors)
    drawn.check(merged(folder / "adapter"))
    model = Net()
    formats.load_adapter(model, folder / "adapter")
    formats.save_adapter(model, folder / "again")
    drawn.check(merged(folder / "again"))
    formats.save_state(folder / "base.safetensors", drawn.base)
    formats.merge_files(folder / "base.safetensors", folder / "adapter", folder / "out")
    found = formats.load_state(folder / "out" / "base.safetensors")
    drawn.check({key: np.array(found[key]) for key in drawn.base})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_part_that_is_missing_is_named_and_nothing_changes(tmp_path, seed):
    rng, folder = np.random.default_rng(seed), tmp_path
    drawn = Drawn(rng, PREFIXES[0], "", ["float32"])
    gone = str(rng.choice([key for key in drawn.tensors if "lora_" in key]))
    del drawn.tensors[gone]
    write(folder / "adapter", drawn.config, drawn.tensors)
    model, path = Net(), gone[len(PREFIXES[0]):].rsplit(".lora_", 1)[0]
    with pytest.raises(FormatError, match=path.replace(".", r"\.")):
        formats.load_adapter(model, folder / "adapter")
    now = numbers(model)
    assert now.keys() == drawn.base.keys() and all(np.array_equal(now[key], drawn.base[key]) for key in now)
