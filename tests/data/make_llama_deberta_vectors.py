"""What transformers computes with tiny models of the Llama family and DeBERTa.

Made by `PYTHONPATH=. python tests/data/make_llama_deberta_vectors.py`.

For each case: config.json, the output, the loss, and of each gradient g the number sum(g * numbers("gradient", shape)). The
weights are `checkpoint_cases.numbers`. All in float64, also where transformers' code says float32.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "parity")]
from checkpoint_cases import numbers  # noqa: E402
from in_double import in_double  # noqa: E402

WHERE = HERE / "llama_deberta_vectors.json"
V, T = 13, 9
LLAMA = dict(vocab_size=V, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=6, pad_token_id=0, bos_token_id=None, eos_token_id=None)
DEBERTA = dict(vocab_size=V, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
               max_position_embeddings=16, relative_attention=True, position_buckets=4, max_relative_positions=7,
               pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", position_biased_input=False, hidden_dropout_prob=0.0,
               attention_probs_dropout_prob=0.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24,
              rope_theta=30.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1000.0)
CASES = {
    "LlamaForCausalLM": dict(LLAMA, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "LlamaForSequenceClassification": dict(LLAMA, num_labels=3, rope_parameters=YARN),
    "LlamaModel": dict(LLAMA, rope_parameters=dict(rope_type="dynamic", factor=2.0)),
    "MistralForCausalLM": dict(LLAMA, sliding_window=4, head_dim=4),
    "Qwen2ForCausalLM": dict(LLAMA, use_sliding_window=True, sliding_window=3, max_window_layers=1, tie_word_embeddings=True),
    "Qwen3ForTokenClassification": dict(LLAMA, num_labels=3, head_dim=4,
                                        rope_parameters=dict(rope_type="linear", factor=3.0)),
    "DebertaV2Model": dict(DEBERTA, conv_kernel_size=3, conv_act="gelu", type_vocab_size=2),
    "DebertaV2ForMaskedLM": dict(DEBERTA, share_att_key=True),
    "DebertaV2ForSequenceClassification": dict(DEBERTA, num_labels=3, pos_att_type=["p2c"], cls_dropout=0.0),
    "DebertaV2ForTokenClassification": dict(DEBERTA, num_labels=3, position_buckets=-1, max_relative_positions=5),
}


def batch():
    """(ids (2, T), mask): the second text is padded at its right."""
    ids = np.random.default_rng(1).integers(1, V, (2, T))
    mask = np.ones((2, T), int)
    mask[1, 6:] = 0
    return ids * mask, mask


def labels_of(architecture, ids, mask):
    if architecture.endswith("Model"):
        return None
    if architecture.endswith("ForSequenceClassification"):
        return np.array([2, 0])
    return np.where(mask == 1, ids % 3 if architecture.endswith("ForTokenClassification") else ids, -100)


def vectors(architecture):
    family = architecture.partition("For")[0].removesuffix("Model")
    model = getattr(transformers, architecture)(getattr(transformers, family + "Config")(**CASES[architecture])).eval()
    model.config.architectures, model.config.dtype = [architecture], "float64"
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(numbers(name, tuple(p.shape))))
    ids, mask = batch()
    labels = labels_of(architecture, ids, mask)
    result = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    output = result.last_hidden_state if labels is None else result.logits
    if labels is None:
        loss = ((output * torch.tensor(mask)[..., None]) ** 2).mean()
    else:
        logits, targets = output, torch.tensor(labels)
        if architecture.endswith("ForCausalLM"):
            logits, targets = logits[:, :-1], targets[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    loss.backward()
    gradients = {name: float((p.grad.numpy() * numbers("gradient", tuple(p.shape))).sum())
                 for name, p in model.named_parameters() if p.grad is not None}
    output = output.detach().numpy()
    if not architecture.endswith("ForSequenceClassification"):
        output = np.where(mask[..., None] == 1, output, 0.0)  # nobody reads what stands at padding
    return {"config": json.loads(model.config.to_json_string(use_diff=False)), "output": output.tolist(), "loss": loss.item(),
            "tensors": {name: [*p.shape] for name, p in model.named_parameters()}, "gradients": gradients}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    with in_double(torch):
        made = {name: vectors(name) for name in CASES}
    made["made with"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    WHERE.write_text(json.dumps(made, separators=(",", ":")) + "\n")
