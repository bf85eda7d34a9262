"""Prefix and prompt tuning between PEFT and here: logits from each other's folders. Run with -m parity."""
import numpy as np
import pytest
from in_double import import_transformers
from test_torch import torch  # noqa: F401  (a fixture)

from minilora import formats, models, tuners

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # those of the libraries

SIZES = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
             max_position_embeddings=40)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=31, n_positions=40, n_embd=16, n_layer=2, n_head=4), "CAUSAL_LM"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(SIZES, num_key_value_heads=2), "CAUSAL_LM"),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(SIZES, num_key_value_heads=2, sliding_window=5), "CAUSAL_LM"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(SIZES, num_key_value_heads=2, head_dim=8), "CAUSAL_LM"),
    "bert": ("BertModel", "BertConfig", SIZES, "FEATURE_EXTRACTION"),
    "roberta": ("RobertaModel", "RobertaConfig", SIZES, "FEATURE_EXTRACTION"),
    "tokens": ("BertForTokenClassification", "BertConfig", SIZES, "TOKEN_CLS"),
    "gpt2 classes": ("GPT2ForSequenceClassification", "GPT2Config",
                     dict(vocab_size=31, n_positions=40, n_embd=16, n_layer=2, n_head=4, pad_token_id=0), "SEQ_CLS"),
}
PREFIXED = ["gpt2", "llama", "mistral", "qwen3", "bert", "roberta"]
N = 3


@pytest.fixture(scope="module")
def transformers(torch):  # noqa: F811
    return import_transformers()


def base(torch, transformers, case, folder):  # noqa: F811
    architecture, config, settings, task = MODELS[case]
    torch.manual_seed(1)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**settings, attn_implementation="eager")).eval()
    if not (folder / "base").exists():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(folder / "base")
    return getattr(transformers, architecture).from_pretrained(folder / "base", attn_implementation="eager").eval(), task


def theirs(torch, model, ids, mask, rows):  # noqa: F811
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask))
    y = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return y.numpy()[:, rows:] if y.ndim == 3 else y.numpy()


def compare(torch, peft_model, ours, rows, sides):  # noqa: F811
    ids = np.random.default_rng(0).integers(2, 31, (3, 8))
    masks = {"none": None, "right": np.ones((3, 8), int), "left": np.ones((3, 8), int)}
    masks["right"][1, 5:] = 0
    masks["left"][1, :3] = 0
    for side in sides:
        mask = masks[side]
        got = ours(ids, key_padding=mask).numpy()
        expected = theirs(torch, peft_model, ids, mask, rows)
        seen = np.ones((3, 8), bool) if mask is None else mask.astype(bool)
        seen = seen if got.ndim == 3 else np.ones(3, bool)
        np.testing.assert_allclose(got[seen], expected[seen], rtol=0, atol=3e-5, err_msg=side)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("case", PREFIXED)
def test_prefix(torch, transformers, tmp_path, case, projection):  # noqa: F811
    peft = pytest.importorskip("peft")
    model, task = base(torch, transformers, case, tmp_path)
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N, prefix_projection=projection, encoder_hidden_size=5)
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    ours = models.load(tmp_path / "base").eval()
    formats.load_prefix(ours, tmp_path / "theirs")
    sides = ["none", "right"] + ["left"] * (case != "roberta")
    compare(torch, wrapped, ours, 0, sides)
    tuners.remove(ours, "default")
    own = tuners.inject(ours, tuners.PrefixConfig(num_virtual_tokens=N, prefix_projection=projection), rng=3)
    assert own.config.token_dim == wrapped.peft_config["default"].token_dim
    formats.save_prefix(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(torch, transformers, case, tmp_path)[0], tmp_path / "ours").eval()
    compare(torch, again, ours, 0, sides)


@pytest.mark.parametrize("case", ["gpt2", "llama", "mistral", "bert", "tokens", "gpt2 classes"])
def test_prompt(torch, transformers, tmp_path, case):  # noqa: F811
    peft = pytest.importorskip("peft")
    model, task = base(torch, transformers, case, tmp_path)
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N)).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    ours = models.load(tmp_path / "base").eval()
    formats.load_prefix(ours, tmp_path / "theirs")
    sides = ["none"] if case == "gpt2 classes" else ["none", "right", "left"]  # their classifier takes the last row, pad or not
    compare(torch, wrapped, ours, N, sides)
    tuners.remove(ours, "default")
    tuners.inject(ours, tuners.PromptConfig(num_virtual_tokens=N, task_type=task), rng=3)
    formats.save_prefix(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(torch, transformers, case, tmp_path)[0], tmp_path / "ours").eval()
    compare(torch, again, ours, N, sides)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_generation(torch, transformers, tmp_path, case):  # noqa: F811
    """Greedy. (PEFT's own generate of 0.21 with transformers 5 gives other tokens than its forward pass.)"""
    peft = pytest.importorskip("peft")
    model, task = base(torch, transformers, case, tmp_path)
    wrapped = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N)).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    ours = models.load(tmp_path / "base").eval()
    formats.load_prefix(ours, tmp_path / "theirs")
    ids = made = np.random.default_rng(4).integers(2, 31, (2, 5))
    for _ in range(6):  # by their forward pass
        made = np.concatenate([made, theirs(torch, wrapped, made, None, 0)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(models.generate(ours, ids, 6).ids, made[:, 5:])
