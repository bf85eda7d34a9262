"""Checkpoints that were damaged, or made to harm: a FormatError or a model that is whole; and saving that is killed."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import ARCHITECTURES, batch, write_vectors

from minilora import models
from minilora.errors import FileError, FormatError
from minilora.formats.tensors.reading import load_state
from minilora.formats.tensors.writing import save_state

ROOT = Path(__file__).resolve().parents[3]
VALUES = [None, True, False, 0, 1, -1, 2, 3, 8, 13, 1 << 40, 1 << 70, 0.0, 0.5, 1e-300, 1e400, -0.1, "", "gelu", "8", "float32",
          "\0", [], [1], ["BertModel"], [[]], {}, {"0": "a"}, {"a": {"b": []}}]
NAMES = ["rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "torch_dtype", "id2label", "problem_type"]
SHAPES = [(), (0,), (1,), (8,), (8, 8), (13, 8), (1 << 20, 0), (2, 2, 2)]


def mutate(folder, rng):
    """One to three changes, to fields, tensors or bytes."""
    fields, tensors = json.loads((folder / "config.json").read_text()), load_state(folder / "model.safetensors")
    for _ in range(rng.integers(1, 4)):
        kind, name = rng.integers(0, 7), str(rng.choice(list(tensors))) if tensors else "x"
        if kind < 2:
            fields[str(rng.choice([*fields, *NAMES]))] = VALUES[rng.integers(len(VALUES))]
        elif kind == 2:
            fields.pop(str(rng.choice(list(fields))), None)
        elif kind == 3:
            others = [name[1:], name + ".x", "module." + name, "\n", name.replace("weight", "gamma")]
            tensors[str(rng.choice(others))] = tensors.pop(name, np.zeros(1))
        elif kind == 4:
            dtype = str(rng.choice(["float32", "int64", "bool", "float16"]))
            tensors[name] = np.zeros(SHAPES[rng.integers(len(SHAPES))], dtype)
        else:
            tensors.pop(name, None)
    (folder / "config.json").write_text(json.dumps(fields).replace("Infinity", "1e400"))
    save_state(folder / "model.safetensors", tensors)
    if rng.random() < 0.2:
        path = folder / str(rng.choice(["config.json", "model.safetensors"]))
        data = bytearray(path.read_bytes())
        for at in rng.integers(0, len(data), 3):
            data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data[:int(rng.integers(len(data))) if rng.random() < 0.3 else None])


def try_it(folder, architecture):
    try:
        model = models.load(folder, rng=0)
    except (FormatError, FileError):
        return False
    ids, _ = batch(ARCHITECTURES[architecture][0], "none")
    if model.config.vocab_size >= 13:  # whatever the file says, what loads runs
        with np.errstate(all="ignore"):
            assert model(ids).shape[0] == 2
    return True


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_checkpoints(count, tmp_path):
    rng = np.random.default_rng(count)
    loaded = 0
    for i in range(count):
        architecture = str(rng.choice(list(ARCHITECTURES)))
        write_vectors(tmp_path, architecture, dtype="float32")
        mutate(tmp_path, rng)
        loaded += try_it(tmp_path, architecture)
    assert 0 < loaded < count  # neither all of them


SAVER = """
import sys
from minilora import models
folder, first, second = sys.argv[1:]
both = [models.load(first), models.load(second)]
print("ready", flush=True)
while True:
    for model, size in zip(both, (3000, 10 ** 9)):
        models.save(model, folder, max_shard_bytes=size)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_one_whole_checkpoint(tmp_path):
    for name, architecture in (("first", "BertForMaskedLM"), ("second", "GPT2LMHeadModel")):
        write_vectors(tmp_path / name, architecture, dtype="float32")
    expected = {type(model): {name: array.tobytes() for name, array in model.state_dict().items()}
                for model in (models.load(tmp_path / "first"), models.load(tmp_path / "second"))}
    target, rng = tmp_path / "saved" / "model", np.random.default_rng(0)
    (tmp_path / "saved").mkdir()
    models.save(models.load(tmp_path / "first"), target)
    (target / "tokenizer.json").write_text("mine")
    seen = set()
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "-c", SAVER, target, tmp_path / "first", tmp_path / "second"],
                                   stdout=subprocess.PIPE, cwd=ROOT)
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        model = models.load(target)
        seen.add(type(model))
        assert {name: array.tobytes() for name, array in model.state_dict().items()} == expected[type(model)]
        assert (target / "tokenizer.json").read_text() == "mine"
    assert len(seen) == 2
    models.save(model, target)
    assert os.listdir(tmp_path / "saved") == ["model"]
