"""`minilora check`: whether an adapter fits a base, and who can read it. The lines that it gives are run."""
import json
import shlex
import shutil

import example_folder
import numpy as np
import pytest

from minilora import formats, lora, models
from minilora.cli import check
from minilora.cli.main import main
from minilora.cli.reports.readers import READERS

KEYS = ["schema", "adapter", "base", "dialect", "layers", "fit", "readers", "notes"]
FIT_KEYS = ["fits", "problems", "notes", "fingerprint", "tensors"]
READER_KEYS = ["reader", "reads", "problems", "notes", "line"]


def reported(capsys, *words, status=0):
    assert main(["check", *map(str, words), "--json"]) == status, capsys.readouterr()
    return json.loads(capsys.readouterr().out)


def reads(capsys, *words, status=0):
    return {found["reader"]: found for found in reported(capsys, *words, status=status)["readers"]}


def saved(folder, **settings):
    """An adapter of the example's base, with another config."""
    model = example_folder.llama()
    lora.inject(model, lora.Config(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}), rng=0)
    for path, p in model.named_parameters():
        if p.trainable:
            p.data[...] = np.random.default_rng(0).normal(0.0, 0.1, p.shape) + (1.0 if "magnitude" in path else 0.0)
    formats.save_adapter(model, folder, with_fingerprint=False)
    return folder


def test_the_report(examples, capsys):
    report = reported(capsys, examples / "adapter", examples / "base")
    assert list(report) == KEYS and report["schema"] == "minilora.check/1"
    assert list(report["fit"]) == FIT_KEYS and report["fit"]["fits"] and len(report["fit"]["tensors"]) == 14
    assert "the base is the one" in report["fit"]["fingerprint"]
    assert [list(found) for found in report["readers"]] == [READER_KEYS] * 6
    assert {found["reader"]: found["reads"] for found in report["readers"]} == {
        "peft": "yes", "vllm": "yes", "sglang": "yes", "mlx": "converted", "diffusers": "no", "llama.cpp": "converted"}
    assert tuple(READERS) == check.NAMES


def test_the_text(examples, capsys):
    assert main(["check", str(examples / "adapter"), str(examples / "base")]) == 0
    out, err = capsys.readouterr()
    assert "base: yes" in out and "fingerprint: the base is the one" in out and err == ""
    assert main(["check", str(examples / "adapter"), str(examples / "tuned")]) == 3
    out, _ = capsys.readouterr()
    assert "tuned: NO" in out and "another base" in out and "and 2 lines more" in out and "--force" in out


def test_what_does_not_fit(examples, capsys, tmp_path):
    fit = reported(capsys, examples / "adapter", examples / "encoder", status=3)["fit"]
    assert not fit["fits"] and "do not fit" in fit["problems"][0]
    model = models.Llama(models.LlamaConfig(vocab_size=11, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                            num_key_value_heads=1, intermediate_size=24), rng=0)
    models.save(model, tmp_path / "wider")
    assert not reported(capsys, examples / "adapter", tmp_path / "wider", status=3)["fit"]["fits"]
    assert main(["check", str(examples / "adapter"), str(tmp_path / "wider")]) == 3
    assert "NO" in capsys.readouterr().out


def test_a_base_of_an_unknown_family(examples, capsys, tmp_path):
    shutil.copytree(examples / "base", tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["X"]}))
    assert reported(capsys, examples / "adapter", tmp_path / "base")["fit"]["fits"]
    assert reported(capsys, examples / "adapter", tmp_path / "base" / "model.safetensors")["fit"]["fits"]


@pytest.mark.parametrize(("settings", "refusing", "said"), [
    ({"use_dora": True}, {"vllm"}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, {"vllm", "sglang"}, "modules saved whole"),
    ({"alpha_pattern": {"v_proj": 2}}, {"vllm"}, "s differs"),
    ({"lora_bias": True}, {"vllm", "sglang"}, "lora_bias"),
    ({"use_rslora": True}, set(), ""),
])
def test_servers(settings, refusing, said, tmp_path, capsys):
    found = reads(capsys, saved(tmp_path / "a", **settings))
    assert {name for name in ("vllm", "sglang") if found[name]["reads"] == "no"} == refusing and found["peft"]["reads"] == "yes"
    for name in refusing:
        assert said in " ".join(found[name]["problems"]) and found[name]["line"].startswith("minilora merge BASE ")
        assert reads(capsys, tmp_path / "a", "--for", name, status=3)[name]["reads"] == "no"


def test_a_start_that_is_in_the_weight(tmp_path, capsys):
    folder = saved(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    found = reads(capsys, folder)
    assert found["vllm"]["reads"] == found["sglang"]["reads"] == "no" and found["peft"]["reads"] == "yes"


def test_a_high_rank(tmp_path, capsys):
    found = reads(capsys, saved(tmp_path / "a", r=24), "--for", "vllm")["vllm"]
    assert found["reads"] == "yes" and "--max-lora-rank 24" in found["notes"][0] and "resize" in found["notes"][0]


def test_diffusers_and_a_unet(tmp_path, capsys):
    update = formats.Update("linear", np.ones((1, 3), "float32"), np.ones((2, 1), "float32"), 1.0)
    config = lora.Config(r=1, lora_alpha=1, target_modules=["to_q"])
    adapter = formats.SavedAdapter({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": update}, config)
    formats.write_adapter(adapter, tmp_path / "a", "peft")
    found = reads(capsys, tmp_path / "a")["diffusers"]
    assert found["reads"] == "converted" and "--write component=unet" in found["line"]


def test_without_gguf_nothing_is_claimed(examples, capsys, monkeypatch):
    monkeypatch.setattr("minilora.cli.reports.readers.find_spec", lambda name: None)
    found = reads(capsys, examples / "adapter", examples / "base")["llama.cpp"]
    assert found["reads"] == "converted" and "pip install 'minilora[gguf]'" in found["notes"][0]
    assert f"--base {examples / 'base'} " in found["line"]  # a line that can be typed
    assert "--base BASE " in reads(capsys, examples / "adapter")["llama.cpp"]["line"]


def test_the_lines_that_are_given_can_be_typed(there, capsys):
    found = reads(capsys, "adapter", "base")
    lines = [one["line"] for one in found.values() if one["reads"] == "converted"]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)
        if "gguf" in words:
            pytest.importorskip("gguf")
        assert main(words[1:]) == 0, (line, capsys.readouterr())
    capsys.readouterr()
    assert reads(capsys, "adapter-mlx", "--for", "mlx")["mlx"]["reads"] == "yes"
    assert reads(capsys, "adapter-mlx", "--for", "peft", status=3)["peft"]["reads"] == "converted"


@pytest.mark.parametrize(("words", "status", "said"), [
    (["nothing"], 1, "there is no such"), (["adapter", "nothing"], 1, "nothing"), (["base"], 1, "no adapter"),
    ([], 2, "missing: ADAPTER"), (["adapter", "--for", "pefd"], 2, "invalid choice"),
])
def test_wrong_words(words, status, said, there, capsys):
    assert main(["check", *words]) == status
    out, err = capsys.readouterr()
    assert out == "" and said in err
