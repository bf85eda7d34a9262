"""Merging into bases in 4 bits: refused with the gain, done in another dtype, and in 4 bits if the update is large."""
import re

import numpy as np
import pytest
from formats.quantised.four_bit_bases import gpt2, llama, write

from minilora import formats, lora, models
from minilora.errors import ConfigError, FormatError, StateError
from minilora.formats import merge_files

TARGETS = {llama: ["q_proj", "up_proj"], gpt2: ["c_attn", "c_proj"]}


def adapter(folder, base, make, size, name="adapter", **config):
    """An adapter of a base, and the logits of both together."""
    model = models.load(base)
    lora.inject(model, lora.Config(r=4, lora_alpha=8, target_modules=TARGETS[make], **config), rng=0)
    rng = np.random.default_rng(0)
    for path, p in model.named_parameters():
        if "lora_B" in path:
            p.data[...] += rng.normal(0.0, size, p.shape).astype("float32")
    formats.save_adapter(model, folder / name)
    return folder / name, model.eval()([[1, 2, 3]]).data


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_refused_with_the_gain(make, kind, tmp_path):
    base = write(tmp_path / "base", kind, make=make)
    path, _ = adapter(tmp_path, base, make, 0.002)
    with pytest.raises(StateError, match=f"(?s)it is in 4 bits .{kind}.*--dequantize bfloat16") as caught:
        merge_files(base, path, tmp_path / "out")
    gain, ratio = (float(re.search(pattern, str(caught.value))[1]) for pattern in (r"them, ([\d.]+)%", r"\|W\|\| = (\S+);"))
    assert 0.015 < ratio < 0.06 and gain < 25.0, (gain, ratio)
    assert not (tmp_path / "out").exists()
    with pytest.raises(StateError, match="Nothing was written"):
        merge_files(base, path, tmp_path / "out", requantize=True)
    with pytest.raises(StateError, match="Nothing was written"):
        merge_files(base, path, tmp_path / "out", force=True, dtype="bfloat16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_usual_update_leaves_a_twentieth_of_itself(tmp_path):
    base = write(tmp_path / "base", make=lambda: llama(hidden_size=256, intermediate_size=256))
    path, _ = adapter(tmp_path, base, llama, 0.001)
    with pytest.raises(StateError) as caught:
        merge_files(base, path, tmp_path / "out")
    assert float(re.search(r"them, ([\d.]+)%", str(caught.value))[1]) <= 5.0, str(caught.value)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dora", [False, True])
def test_decoded_it_is_the_same_function(make, dora, tmp_path):
    base = write(tmp_path / "base", make=make, shard=30_000)
    path, wanted = adapter(tmp_path, base, make, 0.01, use_dora=dora)
    report = merge_files(base, path, tmp_path / "out", dequantize="float32")
    np.testing.assert_allclose(models.load(tmp_path / "out")([[1, 2, 3]]).data, wanted, atol=2e-6)
    assert report.dequantized == "float32" and report.patch_nbytes == 0 and "the base is the one" in str(report)
    assert min(row.gain for row in report.rows) > 0.999 and "decoded from 4 bits to float32" in str(report)
    assert formats.verify_files(tmp_path / "out", base, path).sound
    half = merge_files(base, path, tmp_path / "half", dequantize="float16")
    assert max(row.relative_error for row in half.rows) < 0.05
    kinds = set(formats.open_state(tmp_path / "half" / "model.safetensors.index.json").dtypes.values())
    assert kinds == {"F16"} and formats.verify_files(tmp_path / "half", base, path).sound


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_large_update_may_go_back_into_four_bits(make, tmp_path):
    base = write(tmp_path / "base", make=make)
    path, wanted = adapter(tmp_path, base, make, 0.05)
    with pytest.raises(StateError, match="requantize=True"):
        merge_files(base, path, tmp_path / "out")
    report = merge_files(base, path, tmp_path / "out", requantize=True)
    out = models.load(tmp_path / "out")
    assert len(report.rows) and all(row.gain > 0.9 and row.dtype == "nf4" for row in report.rows)
    held = dict(out.named_parameters())
    for name, p in models.load(base).named_parameters():
        assert type(p.data) is type(held[name].data)
    before, after = models.load(base)([[1, 2, 3]]).data, out([[1, 2, 3]]).data
    assert np.linalg.norm(after - wanted) < 0.5 * np.linalg.norm(before - wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
    with pytest.raises(FormatError, match="in 4 bits"):
        formats.verify_files(tmp_path / "out", base, path)


def test_requantised_by_all_numbers(tmp_path, monkeypatch):
    base = write(tmp_path / "base")
    path, _ = adapter(tmp_path, base, llama, 0.05)
    from minilora.formats.merging import four_bits
    monkeypatch.setattr(four_bits, "sampled_gain", lambda work: (1.0, 1.0, 1))
    weak, _ = adapter(tmp_path, base, llama, 0.002, "weak")
    with pytest.raises(StateError, match="of the update arrived, and at least 90% are asked for; nothing was written"):
        merge_files(base, weak, tmp_path / "out", requantize=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "weak"]


def test_settings_that_do_not_go_together(tmp_path):
    base = write(tmp_path / "base")
    path, _ = adapter(tmp_path, base, llama, 0.01)
    models.dequantize_files(base, tmp_path / "plain", "float32")
    for given, text in [(dict(dequantize="int8"), "dtype must be"), (dict(dequantize="float16", dtype="float32"), "one dtype")]:
        with pytest.raises(ConfigError, match=text):
            merge_files(base, path, tmp_path / "out", **given)
    for given in (dict(dequantize="float16"), dict(requantize=True)):
        with pytest.raises(ConfigError, match="is not in 4 bits"):
            merge_files(tmp_path / "plain", path, tmp_path / "out", **given)
    for nothing in (None, []):
        with pytest.raises(ConfigError, match="there is none to merge"):
            merge_files(base, nothing, tmp_path / "out", dequantize="float16")


def test_a_module_that_is_replaced_as_a_whole(tmp_path):
    base = write(tmp_path / "base")
    model = models.load(base)
    lora.inject(model, lora.Config(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), rng=0)
    for path, p in model.named_parameters():
        if p.trainable:
            p.data[...] += 0.01
    formats.save_adapter(model, tmp_path / "adapter")
    merge_files(base, tmp_path / "adapter", tmp_path / "out", dequantize="float32")
    np.testing.assert_allclose(models.load(tmp_path / "out")([[1, 2]]).data, model.eval()([[1, 2]]).data, atol=2e-6)


def test_a_damaged_base(tmp_path):
    base = write(tmp_path / "base")
    path, _ = adapter(tmp_path, base, llama, 0.01)
    state = formats.load_state(base / "model.safetensors")
    state.pop("model.layers.0.mlp.up_proj.weight.absmax")
    formats.save_state(base / "model.safetensors", state)
    with pytest.raises(FormatError, match="up_proj.weight: .absmax is missing"):
        merge_files(base, path, tmp_path / "out", dequantize="float32")
