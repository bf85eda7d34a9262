"""All dialects side by side, on the disk: who takes which file, and what is left of an adapter that goes through several."""
import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_oracle import D, adapter, source, update

from minilora.errors import ConfigError, FormatError
from minilora.formats.adapters.found import find
from minilora.formats.adapters.reading import read_adapter, read_source
from minilora.formats.adapters.registry import DIALECTS, dialect_named
from minilora.formats.adapters.writing import write_adapter

RNG = np.random.default_rng(0)
PATHS = [f"model.layers.{i}.{name}" for i in (0, 2) for name in ("self_attn.v_proj", "mlp.up_proj")]
# What each needs to be told when it writes and when it reads; and the paths that come back.
WRITE = {"diffusers": dict(component=""), "gguf": dict(architecture="qwen2"), "kohya": {}, "loralib": {}, "mlx": {}, "peft": {}}
READ = {"loralib": dict(lora_alpha=6), "kohya": dict(modules=PATHS)}


def one(rng=RNG, s=3.0, **made):
    return adapter({path: update(rng, s=s, **made) for path in PATHS})


def there(value, folder, dialect, **options):
    write_adapter(value, folder, dialect, **{**WRITE[dialect], **options})
    return folder


def back(folder, dialect):
    return read_adapter(folder, **READ.get(dialect, {}))


def need(*dialects):
    if "gguf" in dialects:
        pytest.importorskip("gguf")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_exactly_one_dialect_takes_a_file(tmp_path, dialect):
    need(dialect)
    source = find(there(one(), tmp_path / "a", dialect))
    assert [name for name in DIALECTS if dialect_named(name).recognise(source)] == [dialect]
    assert [name for name in DIALECTS if dialect_named(name).recognise(source._replace(tensors={}, metadata={}))] == (
        [dialect] if dialect in ("peft", "mlx") else [])


@pytest.mark.parametrize("first, second", [*itertools.permutations(DIALECTS, 2)])
def test_from_any_dialect_to_any_other(tmp_path, first, second):
    need(first, second)
    before = one()
    half = back(there(before, tmp_path / "a", first), first)
    assert half.dialect == first
    after = back(there(half, tmp_path / "b", second), second)
    assert after.updates.keys() == before.updates.keys()
    for path, u in after.updates.items():
        assert np.array_equal(D(u), D(before.updates[path])), path


@pytest.mark.parametrize("dialect", ["mlx", "kohya", "diffusers", "peft"])
def test_dora_goes_through_those_that_have_it(tmp_path, dialect):
    before = one(dora=True)
    after = back(there(before, tmp_path / "a", dialect), dialect)
    for path, u in after.updates.items():
        assert np.array_equal(D(u), D(before.updates[path])) and np.array_equal(u.magnitude, before.updates[path].magnitude)


@settings(max_examples=8)
@given(st.integers(0, 2 ** 32), st.lists(st.sampled_from([*DIALECTS]), min_size=2, max_size=4))
def test_a_walk_through_dialects_keeps_the_function(tmp_path_factory, seed, walk):
    need(*walk)
    rng = np.random.default_rng(seed)
    value = before = adapter({path: update(rng, s=float(3 * 2.0 ** rng.integers(-3, 3))) for path in PATHS})
    folder = tmp_path_factory.mktemp("walk")
    for i, dialect in enumerate(walk):
        options = dict(lora_alpha=6) if dialect == "loralib" else {}
        value = back(there(value, folder / str(i), dialect, **options), dialect)
    for path, u in value.updates.items():
        assert np.array_equal(D(u), D(before.updates[path])), path


@pytest.mark.parametrize("first, second", [*itertools.permutations(DIALECTS, 2)])
def test_a_folder_that_another_dialect_is_written_over(tmp_path, first, second):
    need(first, second)
    there(one(), tmp_path / "a", first)
    (tmp_path / "a" / "README.md").write_text("kept")
    new = one(np.random.default_rng(1))
    after = back(there(new, tmp_path / "a", second), second)
    assert after.dialect == second and (tmp_path / "a" / "README.md").exists()
    assert all(np.array_equal(D(u), D(new.updates[path])) for path, u in after.updates.items())


@pytest.mark.parametrize("dialect, name", [("kohya", "x.safetensors"), ("loralib", "x.safetensors"), ("gguf", "x.gguf"),
                                           ("diffusers", "x.safetensors")])
def test_a_single_file(tmp_path, dialect, name):
    need(dialect)
    before = one()
    after = back(there(before, tmp_path / name, dialect), dialect)
    assert (tmp_path / name).is_file()
    assert all(np.array_equal(D(u), D(before.updates[path])) for path, u in after.updates.items())


def test_notes_of_writing_are_returned(tmp_path):
    notes = write_adapter(one(), tmp_path / "a", "mlx")
    assert "num_layers is -1" in notes[0]


def test_options_that_a_dialect_does_not_have(tmp_path):
    there(one(), tmp_path / "a", "mlx")
    with pytest.raises(ConfigError, match="mlx.*modules"):
        read_adapter(tmp_path / "a", modules=PATHS)
    assert read_adapter(tmp_path / "a", embeddings=()).dialect == "mlx"


def test_two_dialects_in_one_file(tmp_path):
    from minilora.formats.tensors.writing import save_state
    tensors = {**dialect_named("kohya").write(one()).tensors, **dialect_named("loralib").write(one()).tensors}
    save_state(tmp_path / "x.safetensors", tensors)
    with pytest.raises(FormatError, match="two dialects in one file: loralib .* and kohya"):
        read_adapter(tmp_path / "x.safetensors")
    for dialect in ("kohya", "loralib"):  # saying which one does not make the other's keys vanish
        with pytest.raises(FormatError, match="not understood"):
            read_adapter(tmp_path / "x.safetensors", dialect=dialect, **({"lora_alpha": 1} if dialect == "loralib" else {}))


@pytest.mark.parametrize("dialect", ["mlx", "kohya", "diffusers", "loralib"])
def test_a_fingerprint_goes_along_with_the_scalings_of_the_new_file(tmp_path, dialect):
    said = {"version": 1, "base": "ab", "tensors": {}, "rule": "alpha / r", "s": {path: 9.0 for path in PATHS}}
    before = dataclasses.replace(one(s=0.1), metadata={"minilora": json.dumps(said), "alpha": "9", "other": "kept"})
    write_adapter(before, tmp_path / "a", dialect, **WRITE[dialect])
    metadata = find(tmp_path / "a").metadata
    assert metadata["other"] == "kept" and "alpha" not in metadata
    told = json.loads(metadata["minilora"])
    after = read_adapter(tmp_path / "a", **{**READ, "loralib": dict(lora_alpha=0.2)}.get(dialect, {}))
    assert told["base"] == "ab" and told["s"].keys() == after.updates.keys()
    assert all(told["s"][path] == pytest.approx(u.s, rel=1e-15) for path, u in after.updates.items())
    broken = dataclasses.replace(before, metadata={"minilora": "{"})
    assert "minilora" not in dialect_named(dialect).write(broken, **WRITE[dialect]).metadata


def test_bfloat16_goes_through_every_dialect(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    need("gguf")
    value = before = one(dtype=ml_dtypes.bfloat16)
    for i, dialect in enumerate(DIALECTS):
        value = back(there(value, tmp_path / str(i), dialect), dialect)
        for path, u in value.updates.items():
            assert u.A.dtype == ml_dtypes.bfloat16 and np.array_equal(D(u), D(before.updates[path])), (dialect, path)


def test_a_file_that_only_seems_to_be_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="ends too early"):
        read_adapter(tmp_path / "x.gguf")


def test_weights_without_a_config_are_not_diffusers(tmp_path):
    from minilora.formats.tensors.writing import save_state
    pair = {"transformer.h.0.attn.c_attn.lora_A.weight": np.ones((2, 3), "float32"),
            "transformer.h.0.attn.c_attn.lora_B.weight": np.ones((5, 2), "float32")}
    save_state(tmp_path / "x.safetensors", pair)
    with pytest.raises(FormatError, match="no adapter_config.json beside them"):
        read_adapter(tmp_path / "x.safetensors")


SHAPES = [(), (0,), (1,), (2,), (2, 0), (2, 2), (3, 2), (1, 2, 2), (2, 3, 3, 3), (2, 2, 1, 1)]
VALUES = [None, True, 0, -1, 2, 10 ** 400, 1e-320, float("nan"), "", "x", "8", [], [1], {}, {"r": 2}, {"unet.r": 2}]
TEXTS = ["", "x", "8", "-8", "nan", "1e999", "{}", "[]", '{"r": 2}', '{"unet.r": 0}', '{"r": 2, "rank_pattern": {"(a+)+": 3}}',
         '{"lora_alpha": 1e308}', "[" * 5000, "an array of 3 values"]


@st.composite
def hostile(draw):
    """What a dialect wrote, and then somebody changed: names, shapes, types, numbers, metadata, config."""
    dialect = draw(st.sampled_from([name for name in DIALECTS if name != "gguf"]))
    written = dialect_named(dialect).write(one(), **WRITE[dialect])
    tensors, metadata, config = dict(written.tensors), dict(written.metadata), written.config
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(tensors) or ["x"]))
        what = draw(st.sampled_from(["drop", "shape", "type", "name", "copy", "number", "metadata", "config", "parameter"]))
        if what == "drop":
            tensors.pop(key, None)
        elif what == "shape":
            tensors[key] = np.ones(draw(st.sampled_from(SHAPES)), "float32")
        elif what == "type":
            tensors[key] = np.ones((2, 2), draw(st.sampled_from(["int8", "bool", "float64", "float16", "int64", "uint16"])))
        elif what == "number":
            tensors[key] = np.full((2, 2), draw(st.sampled_from([1e30, -1.0, 0.0])), "float32")
        elif what in ("name", "copy"):
            other = draw(st.sampled_from([key + ".x", "." + key, key[1:], key.upper(), key.replace(".", "..", 1), "x" * 300,
                                          key.replace("lora", "lor\u00e0"), key.replace("0", "9" * 30), "\n" + key,
                                          "base." + key]))
            tensors[other] = tensors[key] if what == "copy" else tensors.pop(key)
        elif what == "metadata":
            metadata[draw(st.sampled_from(["alpha", "lora_adapter_metadata", "minilora", "general.architecture"]))] = draw(
                st.sampled_from(TEXTS))
        elif what == "config" and config is not None:
            config = {**config, draw(st.sampled_from(sorted(config))): draw(st.sampled_from(VALUES))}
        elif config is not None and isinstance(config.get("lora_parameters"), dict):
            name = draw(st.sampled_from(sorted(config["lora_parameters"]) + ["alpha", "x"]))
            config = {**config, "lora_parameters": {**config["lora_parameters"], name: draw(st.sampled_from(VALUES))}}
    return dialect, source(tensors, config, metadata)


def check_hostile(drawn):
    dialect, given_source = drawn
    for named in (None, dialect):
        try:
            found = read_source(given_source, dialect=named, **(READ.get(dialect, {}) if named else {}))
        except (FormatError, ConfigError) as error:
            # An option that another dialect lacks is the caller's mistake; all else is the file's.
            assert isinstance(error, FormatError) and len(str(error)) < 20_000
        else:
            assert all(np.isfinite(u.s * u.r) and u.s for u in found.updates.values())


@settings(max_examples=60)
@given(hostile())
def test_hostile_files_are_refused_or_read(drawn):
    check_hostile(drawn)


@pytest.mark.slow
@settings(max_examples=2000)
@given(hostile())
def test_many_hostile_files_are_refused_or_read(drawn):
    check_hostile(drawn)
