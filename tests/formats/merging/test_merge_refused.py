"""What cannot be merged is refused with the reason, before anything is written; what is damaged is not unmerged."""
import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from merging_cases import adapter, base_tensors, drawn, files_in, update, write_base

from minilora import formats, lora, nn
from minilora.errors import ConfigError, FileError, FormatError, StateError
from minilora.formats import TokenRows, load_state, merge_files, save_state, unmerge_files, verify_files
from minilora.formats.merging import places, sinks


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", base_tensors(), {"model_type": "odd"}, shard=900)


def fc(**options):
    return update(np.random.default_rng(0), "linear", (12, 10), **options)


def refused(base, one, match, error=FormatError, **options):
    before = sorted(path.name for path in base.parent.iterdir()), files_in(base)
    out = options.pop("out", base.parent / "out")
    with pytest.raises(error, match=match) as caught:
        merge_files(base, one, out, **options)
    assert (sorted(path.name for path in base.parent.iterdir()), files_in(base)) == before
    return str(caught.value)


def test_all_that_does_not_fit_is_in_one_message(base):
    one = adapter({"body.fc": update(np.random.default_rng(0), "linear", (12, 9)),
                   "body.square": update(np.random.default_rng(0), "linear", (7, 8))},
                  tokens={"body.emb": TokenRows((3, 20), drawn(np.random.default_rng(0), (2, 6)))})
    text = refused(base, one, "nothing was written")
    assert "body.fc.weight: body.fc of a value: expected A (2, 10)" in text
    assert "body.square.weight" in text and "body.emb.weight: expected rows" in text


@pytest.mark.parametrize("path", ["body.fd", "../../etc/fc", "/fc", "body.fc.weight", "body"])
def test_a_module_that_the_base_lacks(base, path):
    assert "nothing was written" in refused(base, adapter({path: fc()}), "mean no layer|no such tensor|no weight")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_an_adapter_file(base, tmp_path, value):
    u = fc()
    u.A[0, 0] = value
    formats.write_adapter(adapter({"body.fc": u}), tmp_path / "adapter")
    refused(base, tmp_path / "adapter", "NaN|inf")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_an_adapter_in_memory_or_in_the_base(base, tmp_path, value):
    u = fc()
    u.B[0, 0] = value
    refused(base, adapter({"body.fc": u}), "body.fc.weight: .*would hold NaN or inf .*lora_B", StateError)
    tensors = base_tensors()
    tensors["body.fc.weight"][0, 0] = value
    other = write_base(tmp_path / "sub" / "other", tensors)
    refused(other, adapter({"body.fc": fc()}), "body.fc.weight: .*would hold NaN or inf .*weight", StateError)


def test_an_index_that_leaves_the_folder(base):
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["body.fc.weight"] = "../" + index["weight_map"]["body.fc.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(base, adapter({"body.fc": fc()}), "is not the name of a file beside the index")


@pytest.mark.parametrize("said", [{"quant_method": "bitsandbytes"}, {"bits": 4}])
def test_a_quantised_base(base, said):
    (base / "config.json").write_text(json.dumps({"quantization_config": said}))
    refused(base, adapter({"body.fc": fc()}), "quantised .*the update would be gone")


def test_a_base_of_integers(tmp_path):
    base = write_base(tmp_path / "base", {"fc.weight": np.ones((12, 10), "int8")})
    refused(base, adapter({"fc": fc()}), "fc.weight: the base has I8 there")


def test_adapters_of_other_bases(tmp_path):
    layers = [nn.Sequential(nn.Linear(5, 4, rng=seed)) for seed in range(3)]
    (tmp_path / "base").mkdir()
    save_state(tmp_path / "base" / "model.safetensors", layers[0].state_dict())
    for i, layer in enumerate(layers):
        lora.inject(layer, lora.Config(r=1, target_modules=["0"]), rng=0)
        formats.save_adapter(layer, tmp_path / f"adapter{i}")
    both = [tmp_path / "adapter1", tmp_path / "adapter2"]
    text = refused(tmp_path / "base", both, "another base: .*adapter1: .*not the one")
    assert "adapter2: " in text and "--force" in text
    report = merge_files(tmp_path / "base", tmp_path / "adapter0", tmp_path / "right")
    assert "the base is the one" in str(report) and not report.forced
    report = merge_files(tmp_path / "base", both, tmp_path / "out", force=True)
    assert len(report.forced) == 2 and "is of another base" in str(report)
    assert len(json.loads((tmp_path / "out" / "minilora_merge.json").read_text())["forced"]) == 2
    assert verify_files(tmp_path / "out", tmp_path / "base", both).sound


def test_two_that_replace_the_same(base):
    rng = np.random.default_rng(0)
    wholes = [adapter({"body.fc": fc()}, saved={"body.norm.weight": drawn(rng, (7,))}) for _ in range(2)]
    refused(base, wholes, "two of the adapters would replace it")
    report = merge_files(base, [(wholes[0], 0.5)], base.parent / "out")
    assert any("whatever the weight 0.5" in note for note in report.notes)
    both = adapter({"body.fc": fc()}, saved={"body.fc.weight": drawn(rng, (12, 10))})
    refused(base, both, "it can be one", overwrite=True)
    refused(base, adapter({"body.fc": fc()}, saved={"body.square.weight": drawn(rng, (8, 9))}), "expected", overwrite=True)


def test_the_own_table_beside_its_update_is_noted(base):
    rng, table = np.random.default_rng(0), base_tensors()["body.emb.weight"]
    one = adapter({"body.emb": update(rng, "embedding", (20, 6))}, saved={"body.emb.weight": table})
    assert any("equals the base's own" in note for note in merge_files(base, one, base.parent / "out").notes)


def test_a_new_head_and_one_with_more_rows(base):
    rng = np.random.default_rng(0)
    one = adapter({"body.fc": fc()}, saved={"score.weight": drawn(rng, (2, 6)), "body.square.weight": drawn(rng, (9, 8))},
                  biases={"body.square.bias": drawn(rng, (9,))})
    report = merge_files(base, one, base.parent / "out")
    state = formats.open_state(base.parent / "out" / "model.safetensors.index.json")
    assert state["score.weight"].tobytes() == one.saved["score.weight"].tobytes()
    assert state["body.square.weight"].shape == (9, 8)
    assert any("score.weight" in note for note in report.notes) and any("9 rows" in note for note in report.notes)
    assert verify_files(base.parent / "out", base, one).sound
    assert unmerge_files(base.parent / "out", base.parent / "back").removed == ("score.weight",)
    assert files_in(base.parent / "back") == files_in(base)


def test_a_bias_without_a_bias(tmp_path):
    base = write_base(tmp_path / "base", {"fc.weight": np.ones((12, 10), "float32")})
    refused(base, adapter({"fc": fc(bias=True)}), "lora_bias.* none that could take it up", Exception)


@pytest.mark.parametrize("options, match", [
    (dict(dtype="int8"), "dtype must be"), (dict(rounding="up"), "rounding must be"), (dict(seed=-1), "seed must be"),
    (dict(memory=0), "memory must be"), (dict(mapping={"nobody.": ""}), "start of no path"),
])
def test_wrong_settings(base, options, match):
    refused(base, adapter({"body.fc": fc()}), match, ConfigError if "mapping" not in options else Exception, **options)


@pytest.mark.parametrize("weight", [0, np.nan, np.inf, True, "1"])
def test_wrong_weights(base, weight):
    refused(base, [(adapter({"body.fc": fc()}), weight)], "must be a finite number", ConfigError)
    refused(base, [], "there is none", ConfigError)


@pytest.mark.parametrize("what", ["missing", "empty", "adapter", "pickle", "two", "cut"])
def test_no_base(tmp_path, what):
    base = tmp_path / "base"
    base.mkdir()
    if what == "missing":
        base.rmdir()
    elif what == "adapter":
        formats.write_adapter(adapter({"fc": fc()}), base)
    elif what == "pickle":
        (base / "pytorch_model.bin").write_bytes(b"\x80\x02")
    elif what == "two":
        for name in "ab":
            save_state(base / f"{name}.safetensors", {})
    elif what == "cut":
        (base / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises((FileError, FormatError)):
        merge_files(base, adapter({"fc": fc()}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- where the result goes --------------------------------------------------------------------------------------------


def test_output_exists(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "old.safetensors").write_text("old")
    refused(base, adapter({"body.fc": fc()}), "it exists. To replace it: overwrite=True", FileError)
    merge_files(base, adapter({"body.fc": fc()}), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and not (tmp_path / "out" / "old.safetensors").exists()


@pytest.mark.parametrize("how", ["same", "link", "linked base", "inside", "around", "hard link", "adapter", "file"])
def test_output_is_an_input(base, tmp_path, how):
    one, source, out = adapter({"body.fc": fc()}), base, base
    if how == "link":
        out = tmp_path / "link"
        out.symlink_to(base)
    elif how == "linked base":
        source = tmp_path / "link"
        source.symlink_to(base)
    elif how == "inside":
        out = base / "out"
    elif how == "around":
        out = tmp_path
    elif how == "hard link":
        out = tmp_path / "out"
        out.mkdir()
        os.link(next(base.glob("model-*")), out / "linked.safetensors")
    elif how == "adapter":
        formats.write_adapter(one, tmp_path / "adapter")
        one = out = tmp_path / "adapter"
    elif how == "file":
        out = tmp_path / "out.safetensors"
    before = files_in(tmp_path)
    with pytest.raises((FileError, ConfigError), match="from which the result is made|the result is a folder"):
        merge_files(source, one, out, overwrite=True)
    assert files_in(tmp_path) == before


def test_too_little_room_is_said_before(base, monkeypatch):
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    text = refused(base, adapter({"body.fc": fc()}), "it needs .* GB, and the disk has", FileError)
    assert "free space" in text


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_a_disk_that_is_full_midway_leaves_nothing(base, monkeypatch, after):
    write, calls = os.pwrite, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(sinks.os, "pwrite", full)
    refused(base, adapter({"body.fc": fc(), "body.square": update(np.random.default_rng(0), "linear", (8, 8))}),
            "the disk is full", FileError)


def test_links_to_files_are_followed_and_the_base_may_be_a_file(tmp_path, base):
    """As in the cache of a hub: the folder holds links to files elsewhere, with other names."""
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for i, path in enumerate(sorted(base.iterdir())):
        shutil.copy(path, tmp_path / "cache" / "blobs" / str(i))
        (snapshot / path.name).symlink_to(tmp_path / "cache" / "blobs" / str(i))
    (snapshot / "loop").symlink_to(snapshot)
    one = adapter({"body.fc": fc()})
    merge_files(snapshot, one, tmp_path / "out")
    merge_files(base, one, tmp_path / "other")
    assert files_in(tmp_path / "out").keys() == files_in(tmp_path / "other").keys()
    merge_files(base / "model.safetensors.index.json", one, tmp_path / "third")
    assert not (tmp_path / "third" / "config.json").exists()
    assert load_state(tmp_path / "third" / "model.safetensors.index.json").keys() == base_tensors().keys()


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(base):
    rng = np.random.default_rng(0)
    one = adapter({"body.fc": fc(), "body.emb": update(rng, "embedding", (20, 6))},
                  saved={"body.norm.weight": drawn(rng, (9,))})
    merge_files(base, one, base.parent / "merged")
    return base.parent / "merged"


def not_unmerged(merged, match, error=(StateError, FormatError)):
    with pytest.raises(error, match=match):
        unmerge_files(merged, merged.parent / "back")
    assert not (merged.parent / "back").exists()


@pytest.mark.parametrize("name", ["body.fc.weight", "body.square.weight"])
def test_a_merged_file_that_was_changed(merged, name):
    part, entry = formats.open_state(merged / "model.safetensors.index.json").place(name)
    data = bytearray(part.path.read_bytes())
    data[part.header.start + entry.begin] ^= 1
    part.path.write_bytes(data)
    not_unmerged(merged, name)


def test_another_file_in_its_place(merged):
    path = next(merged.glob("model-*"))
    save_state(path, load_state(path), {"other": "metadata"})
    not_unmerged(merged, "not the file that the patch")


def test_a_damaged_patch_gives_an_error_or_the_base(base, merged):
    """Every byte of the header and some of the numbers, one after the other: never another result, never another exception."""
    path = merged / "minilora_patch.safetensors"
    data, expected = path.read_bytes(), files_in(base)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            unmerge_files(merged, merged.parent / "back")
        except (FormatError, StateError, FileError, ConfigError):
            assert not (merged.parent / "back").exists()
        else:
            weights = {name: text for name, text in files_in(merged.parent / "back").items() if name.startswith("model-0")}
            assert weights == {name: text for name, text in expected.items() if name.startswith("model-0")}
            shutil.rmtree(merged.parent / "back")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "files": {}, "tensors": {"x": {}}}'])
def test_no_patch_of_this_version(merged, text):
    path = merged / "minilora_patch.safetensors"
    save_state(path, load_state(path), {"minilora_patch": text})
    not_unmerged(merged, "no patch of version 1|not the file")


def test_verifying_names_what_differs(base, merged):
    one = adapter({"body.fc": fc(), "body.emb": update(np.random.default_rng(0), "embedding", (20, 6))},
                  saved={"body.norm.weight": drawn(np.random.default_rng(0), (9,))})
    other = adapter({"body.fc": dataclasses.replace(fc(), s=1.6)})
    report = verify_files(merged, base, other)
    assert set(report.different) == {"body.fc.weight", "body.emb.weight", "body.norm.weight"} and not report.sound
    assert "of 120 numbers" in report.different["body.fc.weight"]
    assert "expected F32 (7,)" in report.different["body.norm.weight"]
    part, entry = formats.open_state(merged / "model.safetensors.index.json").place("body.square.weight")
    data = bytearray(part.path.read_bytes())
    data[part.header.start + entry.begin + 9] ^= 1
    part.path.write_bytes(data)
    assert verify_files(merged, base, one).different.get("body.square.weight") == "1 of 64 numbers"
    (base.parent / "merged" / "minilora_merge.json").unlink()
    assert "no record" in str(verify_files(merged, base, one))
