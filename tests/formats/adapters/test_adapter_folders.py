"""What lies at a path: folders, single files, several adapters, damage; and writing that is whole or not at all."""
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from formats.hostile import JUNK, LFS, mutated, packed

from minilora.errors import ConfigError, FileError, FormatError, MiniloraError
from minilora.formats.adapters.reading import read_adapter
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.adapters.writing import write_adapter
from minilora.formats.tensors.writing import save_state
from minilora.lora import Config

KEY = "base_model.model.lin.lora_{}.weight"


def adapter(value=1.0, s=2.0):
    A, B = np.full((1, 3), value, "float32"), np.full((2, 1), value, "float32")
    return SavedAdapter({"lin": Update("linear", A, B, s)}, Config(r=1, lora_alpha=2, target_modules=["lin"]))


def write(folder, value=1.0):
    write_adapter(adapter(value), folder)
    return folder


def value_in(path, **options):
    return float(read_adapter(path, **options).updates["lin"].A[0, 0])


def refused(path, **options):
    with pytest.raises(FormatError) as caught:
        read_adapter(path, **options)
    return str(caught.value)


def test_a_folder_there_and_back(tmp_path):
    folder = write(tmp_path / "new" / "adapter", 3.0)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    got = read_adapter(folder)
    assert value_in(folder) == 3.0 and got.updates["lin"].s == 2.0 and got.metadata == {"format": "pt"}
    assert not got.updates["lin"].A.flags.writeable and got.notes == ()
    text = (folder / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    assert value_in(str(folder)) == 3.0 and value_in(folder / "adapter_model.safetensors") == 3.0


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_writing_over_an_adapter_that_is_being_read(tmp_path):
    folder = write(tmp_path / "a", 1.0)
    (folder / "README.md").write_text("kept")
    (folder / "adapter_model.bin").write_text("the adapter of before, as a pickle")
    before = read_adapter(folder)
    write(folder, 2.0)
    assert value_in(folder) == 2.0 and before.updates["lin"].A[0, 0] == 1.0
    assert (folder / "README.md").read_text() == "kept" and not (folder / "adapter_model.bin").exists()
    write_adapter(before, folder)
    assert value_in(folder) == 1.0


def test_a_write_that_fails_leaves_what_was(tmp_path):
    folder = write(tmp_path / "a")
    files = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    odd = Update("linear", np.ones((1, 3), "complex128"), np.ones((2, 1), "complex128"), 1.0)
    with pytest.raises(MiniloraError):
        write_adapter(SavedAdapter({"lin": odd}, Config(r=1, lora_alpha=1)), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(ConfigError, match="give a folder"):
        write_adapter(adapter(), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="dialect: expected one of"):
        write_adapter(adapter(), tmp_path / "x", "petf")
    with pytest.raises(ConfigError, match="'peft' has no option 'rank' to write: it takes none"):
        write_adapter(adapter(), tmp_path / "x", rank=3)
    assert os.listdir(tmp_path) == ["a"]


def test_several_adapters(tmp_path):
    write(tmp_path / "many" / "first", 1.0)
    write(tmp_path / "many" / "second", 2.0)
    (tmp_path / "many" / "logs").mkdir()
    text = refused(tmp_path / "many")
    assert "first, second" in text and f"read_adapter({str(tmp_path / 'many')!r}, name='first')" in text
    assert value_in(tmp_path / "many", name="second") == 2.0
    assert "no adapter 'third' in it; there are first, second" in refused(tmp_path / "many", name="third")
    write(tmp_path / "many", 3.0)  # "default" lies in the folder itself, as PEFT saves it
    assert value_in(tmp_path / "many") == 3.0 and value_in(tmp_path / "many", name="default") == 3.0
    assert value_in(tmp_path / "many", name="first") == 1.0
    assert "there is default" in refused(write(tmp_path / "one"), name="x")
    with pytest.raises(ConfigError, match="name: "):
        read_adapter(tmp_path / "many" / "adapter_model.safetensors", name="first")
    for name in ("..", "../one", "/", ".", ""):
        assert "there is no adapter" in refused(tmp_path / "many", name=name)


def test_nothing_there(tmp_path):
    with pytest.raises(FileError, match="there is no such file or folder"):
        read_adapter(tmp_path / "nowhere")
    assert "no adapter (there is nothing)" in refused(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    assert "no adapter (there is x.txt)" in refused(tmp_path)


def test_half_a_folder(tmp_path):
    folder = write(tmp_path / "a")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_config.json without weights: adapter_model.safetensors is missing" in refused(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    text = refused(folder)
    assert "no adapter_config.json beside them" in text and "lora_alpha" in text
    given = read_adapter(folder, config=Config(r=1, lora_alpha=5, target_modules=["lin"]))
    assert given.updates["lin"].s == 5.0


def test_pickles_are_refused_with_the_way_out(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02}q\0X\1\0\0\0aq\1K\1s.")
    text = refused(folder)
    assert "pickle" in text and "adapter_model.safetensors" in text


@pytest.mark.parametrize("data", [b"", LFS, b"<!DOCTYPE html><html>", b"{}", b"\0" * 300], ids=str)
def test_files_that_are_something_else(tmp_path, data):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(data)
    assert "adapter_model.safetensors" in refused(folder)


CONFIGS = {
    "empty": (b"", "the file is empty"), "spaces": (b"  ", "the file is empty"), "no JSON": (b"r: 8", "no JSON"),
    "a list": (b"[]", "expected a JSON object, got a list"), "a number": (b"3", "got a int"),
    "twice": (b'{"r": 1, "r": 2}', "the name 'r' comes twice"), "twice inside": (b'{"a": [{"b": 1, "b": 1}]}', "'b' comes"),
    "deep": (b'{"a":' * 40 + b"1" + b"}" * 40, "more than 16 deep"), "very deep": (b"[" * 40_000, "no JSON"),
    "deep lists": (b'{"a":' + b"[" * 20 + b"]" * 20 + b"}", "more than 16 deep"),
    "no text": (b"\xff\xfe{}", "no text in UTF-8"),
    "large": (b'{"a": "' + b"x" * (1 << 21) + b'"}', "far more than a config has"),
    "many values": (b'{"a": [' + b"[]," * 60_000 + b"1]}", "more than 50,000 values"),
    "digits": (b'{"r": ' + b"1" * 9999 + b"}", "no JSON"),
    "open": (b'{"r": 1', "no JSON"), "LFS": (LFS, "no JSON"),
}


@pytest.mark.parametrize("data, message", [*CONFIGS.values()], ids=CONFIGS)
def test_configs_that_are_none(tmp_path, data, message):
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(data)
    assert message in refused(folder) and "adapter_config.json" in refused(folder)


def test_a_mark_of_utf8_is_no_fault(tmp_path):
    folder = write(tmp_path / "a", 4.0)
    text = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert value_in(folder) == 4.0


def test_a_folder_where_a_file_should_be(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    assert "is missing" in refused(folder)


def test_one_file_of_another_name(tmp_path):
    tensors = {KEY.format("A"): np.ones((1, 3)), KEY.format("B"): np.ones((2, 1))}
    save_state(tmp_path / "mine.safetensors", tensors)
    config = Config(r=1, lora_alpha=2, target_modules=["lin"])
    assert value_in(tmp_path, config=config) == value_in(tmp_path / "mine.safetensors", config=config) == 1.0
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    assert value_in(tmp_path) == 1.0
    assert "no adapter_config.json" in refused(tmp_path / "mine.safetensors")  # nobody says that it belongs to this one
    save_state(tmp_path / "other.safetensors", tensors)
    assert "which of mine.safetensors, other.safetensors" in refused(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    folder = write(tmp_path / "a")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(FileError, match="adapter_config.json: Permission denied"):
        read_adapter(folder)


# -- drawn damage ------------------------------------------------------------------------------------------------

VALUES = [*(junk.decode() for junk in JUNK if junk.isascii()),
          '["lin"]', '{"lin": 1}', '"all-linear"', "[[1]]", "16.0"]


WORDS = ["", "lora_A", "lora_embedding_B", "default", "base_layer", "weight", "module", "modules_to_save"]


def pack(tensors):
    """The bytes of a safetensors file, without the way over a durable disk."""
    names = {"float32": "F32", "int64": "I64", "bool": "BOOL", "float16": "F16", "complex64": "C64"}
    header, data = {}, b""
    for key, array in tensors.items():
        end = len(data) + array.nbytes
        header[key] = {"dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    return packed(header, data)


def spoiled(folder, random):
    """Spoil a folder: a value of the config, its text, a tensor's name, shape or dtype, bytes of the file, or a whole file."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings = json.loads(config.read_text())
    tensors = {KEY.format("A"): np.ones((1, 3), "float32"), KEY.format("B"): np.ones((2, 1), "float32"),
               "base_model.model.head.weight": np.ones((2, 2), "float32")}
    names = [*settings]
    for _ in range(random.integers(1, 4)):
        kind = random.integers(6)
        if kind == 0:
            name = names[random.integers(len(names))]
            lines = [f'"{key}": {json.dumps(value)}' for key, value in settings.items() if key != name]
            config.write_text("{" + ", ".join([*lines, f'"{name}": {VALUES[random.integers(len(VALUES))]}']) + "}")
        elif kind == 1:
            config.write_bytes(mutated(config.read_bytes(), random))
        elif kind == 2:
            weights.write_bytes(mutated(weights.read_bytes(), random))
        elif kind == 3:
            key = [*tensors][random.integers(len(tensors))]
            words = key.split(".")
            words[random.integers(len(words))] = WORDS[random.integers(len(WORDS))]
            tensors[".".join(words)] = tensors.pop(key)
            weights.write_bytes(pack(tensors))
        elif kind == 4:
            key = [*tensors][random.integers(len(tensors))]
            shape = tuple(int(n) for n in random.integers(0, 4, random.integers(0, 5)))
            tensors[key] = np.ones(shape, ["float32", "int64", "bool", "float16", "complex64"][random.integers(5)])
            weights.write_bytes(pack(tensors))
        else:
            (config, weights)[random.integers(2)].write_bytes(b"" if random.integers(2) else LFS)


def survive(tmp_path, seeds):
    good, folder = write(tmp_path / "good"), tmp_path / "a"
    for seed in seeds:
        shutil.copytree(good, folder, dirs_exist_ok=True)
        spoiled(folder, np.random.default_rng(seed))
        try:
            got = read_adapter(folder)
        except (FormatError, ConfigError) as error:
            assert len(str(error)) < 20_000, seed
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        else:
            assert got.updates or got.saved, seed


def test_a_spoiled_folder_is_read_or_refused(tmp_path):
    survive(tmp_path, range(300))


@pytest.mark.slow
def test_ten_thousand_spoiled_folders_are_read_or_refused(tmp_path):
    survive(tmp_path, range(300, 10_300))
