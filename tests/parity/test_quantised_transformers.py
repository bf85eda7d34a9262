"""Folders in 4 bits against transformers and bitsandbytes: the same bytes, and the same logits in both directions."""
import json

import numpy as np
import pytest

from minilora import models, nn
from minilora.quant import FourBit

# transformers warns of itself when PEFT walks through a model's attributes
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """What the tests compare with: asked for where they run, so that no other run has a file that it skips."""
    global torch, transformers
    torch, transformers, *_ = (pytest.importorskip(name) for name in ("torch", "transformers", "bitsandbytes", "accelerate"))


SIZES = dict(vocab_size=97, num_hidden_layers=2, num_attention_heads=4, hidden_size=64, intermediate_size=96,
             max_position_embeddings=40)
GPT2 = dict(vocab_size=97, n_positions=40, n_embd=64, n_layer=1, n_head=4)
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(num_key_value_heads=2, **SIZES)),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True, **SIZES)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(num_key_value_heads=2, **SIZES)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 classes": ("GPT2ForSequenceClassification", "GPT2Config", dict(num_labels=2, pad_token_id=0, **GPT2)),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "bert words": ("BertForMaskedLM", "BertConfig", SIZES),
    "bert body": ("BertModel", "BertConfig", SIZES),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", dict(
        vocab_size=97, dim=64, hidden_dim=96, n_layers=1, n_heads=4, max_position_embeddings=40)),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", dict(
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8, **SIZES)),
}
IDS = np.arange(1, 11)[None]


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)


def made(name, folder, kind="nf4", double=True, dtype="float32"):
    """Folders of a drawn model: as it is, and in 4 bits as transformers writes it."""
    kind_of_model, kind_of_config, fields = CASES[name]
    cls = getattr(transformers, kind_of_model)
    cls(getattr(transformers, kind_of_config)(**fields)).to(getattr(torch, dtype)).save_pretrained(folder / "plain")
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    cls.from_pretrained(folder / "plain", quantization_config=four).save_pretrained(folder / "four")
    return cls


def logits(model):
    with torch.no_grad():
        given = model(torch.tensor(IDS))
    return (given.last_hidden_state if hasattr(given, "last_hidden_state") else given.logits).numpy()


def own(model):
    given = model(IDS)
    return np.asarray((given[0] if isinstance(given, tuple) else given).data)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1.0, np.abs(a).max()))


def bytes_and_config(folder):
    return (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name, kind, double", [(name, "nf4", True) for name in CASES] + [
    ("llama", "nf4", False), ("llama", "fp4", True), ("gpt2", "fp4", False)])
def test_a_folder_of_transformers_is_read_and_written_again_byte_for_byte(name, kind, double, tmp_path):
    cls = made(name, tmp_path, kind, double)
    model = models.load(tmp_path / "four")
    close(logits(cls.from_pretrained(tmp_path / "four")), own(model))
    models.save(model, tmp_path / "again")
    assert bytes_and_config(tmp_path / "again") == bytes_and_config(tmp_path / "four")


@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "distilbert"])
def test_what_is_quantised_here_is_what_transformers_would_write_and_reads(name, kind, double, tmp_path):
    cls = made(name, tmp_path, kind, double)
    there = models.load(tmp_path / "four")
    model = models.load(tmp_path / "plain")
    held = {path: p.data for path, p in there.named_parameters()}
    for path, p in model.named_parameters():
        if isinstance(held[path], FourBit):
            p.data = FourBit.of(np.ascontiguousarray(p.data), kind, double=double)
    models.save(model, tmp_path / "ours")
    assert bytes_and_config(tmp_path / "ours") == bytes_and_config(tmp_path / "four")
    close(logits(cls.from_pretrained(tmp_path / "ours")), own(model))


@pytest.mark.parametrize("name, left", [("llama", ["model.layers.1.mlp.down_proj"]), ("distilbert", ["classifier"]),
                                        ("bert", ["classifier"]), ("llama tied", ["model.layers.0.self_attn.q_proj"])])
def test_transformers_leaves_what_is_left_here(name, left, tmp_path):
    cls = made(name, tmp_path)
    model = models.load(tmp_path / "plain")
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in (*left, "lm_head"):
            module.weight.data = FourBit.of(np.ascontiguousarray(module.weight.data))
    models.save(model, tmp_path / "ours")
    theirs = cls.from_pretrained(tmp_path / "ours")
    whole = {path for path, module in theirs.named_modules() if type(module) is torch.nn.Linear}
    assert whole == {*left, *(["lm_head"] if "llama" in name else [])}
    close(logits(theirs), own(model))


def test_a_base_in_bfloat16(tmp_path):
    pytest.importorskip("ml_dtypes")
    cls = made("llama", tmp_path, dtype="bfloat16")
    ours = models.load(tmp_path / "four")
    with torch.no_grad():
        theirs = cls.from_pretrained(tmp_path / "four", dtype=torch.bfloat16)(torch.tensor(IDS)).logits.float().numpy()
    np.testing.assert_allclose(theirs, own(ours), rtol=0, atol=0.03 * np.abs(theirs).max())  # it computes in bfloat16
    plain = dict(models.load(tmp_path / "plain").named_parameters())
    for path, p in ours.named_parameters():
        if isinstance(p.data, FourBit):
            for ending, array in FourBit.of(np.ascontiguousarray(plain[path].data)).arrays().items():
                np.testing.assert_array_equal(p.data.arrays()[ending], array, path)


@pytest.mark.parametrize("name, targets", [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn"])])
def test_peft_loads_the_adapter_beside_the_same_base(name, targets, tmp_path):
    peft = pytest.importorskip("peft")
    from minilora import formats, lora
    cls = made(name, tmp_path)
    models.quantize_files(tmp_path / "plain", tmp_path / "ours")
    assert bytes_and_config(tmp_path / "ours") == bytes_and_config(tmp_path / "four")
    model = models.load(tmp_path / "ours")
    lora.inject(model, lora.Config(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"), rng=0)
    rng = np.random.default_rng(1)
    for path, p in model.named_parameters():
        if p.trainable:
            p.data[...] += rng.normal(0.0, 0.05, p.shape).astype("float32")
    formats.save_adapter(model, tmp_path / "adapter")
    base = cls.from_pretrained(tmp_path / "ours")
    before = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    close(logits(theirs), own(model.eval()))
    assert np.abs(logits(theirs) - before).max() > 1e-2
    theirs.save_pretrained(tmp_path / "back")
    again = models.load(tmp_path / "four")
    formats.load_adapter(again, tmp_path / "back")
    np.testing.assert_allclose(own(again.eval()), own(model), atol=1e-6)


def test_what_is_merged_and_decoded_is_what_transformers_computes(tmp_path):
    from minilora import formats, lora
    cls = made("gpt2", tmp_path)
    model = models.load(tmp_path / "four")
    lora.inject(model, lora.Config(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"]), rng=0)
    for path, p in model.named_parameters():
        if "lora_B" in path:
            p.data[...] += 0.01
    formats.save_adapter(model, tmp_path / "adapter")
    formats.merge_files(tmp_path / "four", tmp_path / "adapter", tmp_path / "merged", dequantize="float32")
    close(logits(cls.from_pretrained(tmp_path / "merged")), own(model.eval()))
