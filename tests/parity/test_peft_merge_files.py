"""merge_files beside PEFT: from_pretrained, merge_and_unload, save_pretrained on the same folders. Run with -m parity.

Equal to rounding: PEFT computes s B A with BLAS and adds it, in the dtype of the weight or in float32; here the sum is taken in
float32 and rounded once.
"""
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.formats import load_state, merge_files, open_state, unmerge_files, verify_files

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"),
                               transformers=pytest.importorskip("transformers"))


def config_of(libraries, family, tied):
    t = libraries.transformers
    if family == "llama":
        return t.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied)
    if family == "gpt2":
        return t.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied)
    return t.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                        max_position_embeddings=16, num_labels=3)


def built(libraries, family, dtype, tied, seed):
    torch, t = libraries.torch, libraries.transformers
    torch.manual_seed(seed)
    kind = t.BertForSequenceClassification if family == "bert" else t.AutoModelForCausalLM
    config = config_of(libraries, family, tied)
    model = kind(config) if family == "bert" else kind.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    return model.to(getattr(torch, dtype)), kind


TARGETS = {"llama": ["q_proj", "v_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"],
           "bert": ["query", "value", "dense"]}
CASES = [
    ("llama", False, {}), ("llama", True, {}), ("gpt2", True, {}), ("gpt2", False, {}), ("bert", False, {}),
    ("llama", False, dict(use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5.0})),
    ("llama", False, dict(use_dora=True)), ("gpt2", True, dict(use_dora=True)), ("bert", False, dict(use_dora=True)),
    ("llama", False, dict(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    ("llama", False, dict(modules_to_save=["lm_head", "embed_tokens"])),
    ("llama", True, dict(trainable_token_indices=[1, 5, 31])), ("gpt2", True, dict(trainable_token_indices=[1, 5, 31])),
    ("bert", False, dict(task_type="SEQ_CLS", bias="all")), ("bert", False, dict(task_type="SEQ_CLS", bias="lora_only")),
    ("bert", False, dict(lora_bias=True)), ("llama", False, dict(init_lora_weights="gaussian")),
]


def adapted(libraries, model, family, settings, seed):
    """PEFT's model with all that it trains drawn anew."""
    torch = libraries.torch
    config = libraries.peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS[family], **settings})
    wrapped = libraries.peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p.add_(torch.empty_like(p).normal_(0.0, 0.05))
    return wrapped


@pytest.mark.parametrize("family, tied, settings", CASES, ids=[f"{f}-{t}-{'-'.join(s) or 'plain'}" for f, t, s in CASES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_files_are_pefts(libraries, tmp_path, family, tied, settings, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, kind = built(libraries, family, dtype, tied, 0)
        model.save_pretrained(tmp_path / "base")
        adapted(libraries, model, family, settings, 1).save_pretrained(tmp_path / "adapter")
        fresh = kind.from_pretrained(tmp_path / "base", dtype=getattr(libraries.torch, dtype))
        libraries.peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).merge_and_unload().save_pretrained(
            tmp_path / "peft")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got, expected, base = (load_state(tmp_path / name / "model.safetensors") for name in ("out", "peft", "base"))
    assert got.keys() == expected.keys()
    changed = 0
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        eps = 2e-6 if dtype == "float32" else 2.0 ** -7  # of bfloat16: one unit in the last place, where PEFT rounds twice
        np.testing.assert_allclose(got[name].astype("float64"), array.astype("float64"), rtol=eps, atol=eps, err_msg=name)
        changed += got[name].tobytes() != base[name].tobytes()
    assert changed
    logits = [outputs(libraries, kind, tmp_path / name) for name in ("out", "peft")]
    np.testing.assert_allclose(*logits, atol=2e-4 if dtype == "float32" else 1.0)
    unmerge_files(tmp_path / "out", tmp_path / "back")
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert verify_files(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").sound


def outputs(libraries, kind, folder):
    torch = libraries.torch
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 31, 2]])).logits.numpy()


def test_several_adapters_with_weights(libraries, tmp_path):
    """The exact sum of the updates; PEFT's way to it is a second adapter merged after the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, kind = built(libraries, "llama", "float32", False, 0)
        model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
        for i in (1, 2):
            fresh = kind.from_pretrained(tmp_path / "base")
            adapted(libraries, fresh, "llama", dict(r=i), i).save_pretrained(tmp_path / f"adapter{i}")
        merged = kind.from_pretrained(tmp_path / "base")
        for i in (1, 2):
            merged = libraries.peft.PeftModel.from_pretrained(merged, str(tmp_path / f"adapter{i}"))
            for module in merged.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", 0.5 * i)
            merged = merged.merge_and_unload()
        merged.save_pretrained(tmp_path / "peft")
    merge_files(tmp_path / "base", {tmp_path / "adapter1": 0.5, tmp_path / "adapter2": 1.0}, tmp_path / "out")
    got = open_state(tmp_path / "out" / "model.safetensors.index.json")
    expected = load_state(tmp_path / "peft" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=2e-6, atol=2e-6, err_msg=name)


def test_one_side_of_a_tied_table(libraries, tmp_path):
    """In PEFT an update of the tied table is not in the logits: with a head written apart, the merged model computes that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, kind = built(libraries, "llama", "float32", True, 0)
        model.save_pretrained(tmp_path / "base")
        wrapped = adapted(libraries, model, "llama", dict(target_modules=["embed_tokens", "q_proj"]), 1)
        wrapped.save_pretrained(tmp_path / "adapter")
        with libraries.torch.no_grad():
            expected = wrapped.eval()(libraries.torch.tensor([[1, 5, 31, 2]])).logits.numpy()
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", untie=True)
        np.testing.assert_allclose(outputs(libraries, kind, tmp_path / "out"), expected, atol=2e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
