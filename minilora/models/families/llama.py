"""The checkpoints of the Llama family: Llama, Mistral, Qwen2 and Qwen3, with rotary positions in either spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..bodies.llama import Llama, LlamaBody
from ..bodies.llama_configs import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from ..heads.llama import LlamaClassifier, LlamaTokenClassifier
from .contract import Family, Head

__all__ = ["LLAMA_FAMILY", "MISTRAL_FAMILY", "QWEN2_FAMILY", "QWEN3_FAMILY", "RotaryFamily"]

LENGTHS = ("llama3", "yarn")  # kinds that count from the length of the first training
IGNORED = ("finetuned",)  # says how a model was trained, and changes nothing


@dataclasses.dataclass(frozen=True)
class RotaryFamily(Family):
    """rope_parameters of config.json are rope_theta and rope_scaling of the config."""

    def read(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        read = super().read(fields)
        rope = {name: value for name, value in (fields.get("rope_parameters") or {}).items()
                if value is not None and name not in IGNORED}
        nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            raise ConfigError(f"rope_parameters says something else for {' and '.join(nested)}: one kind for all layers is "
                              "computed here")
        for place in (rope, fields):
            if place.get("partial_rotary_factor") not in (None, 1):
                raise ConfigError(f"partial_rotary_factor is {place['partial_rotary_factor']!r}: heads are turned as a whole "
                                  "here")
        rope.pop("partial_rotary_factor", None)
        length = fields.get("original_max_position_embeddings")
        if length is not None and rope.get("rope_type") in LENGTHS:
            if rope.setdefault("original_max_position_embeddings", length) != length:
                raise ConfigError(f"original_max_position_embeddings is {length!r} and, in rope_parameters, "
                                  f"{rope['original_max_position_embeddings']!r}: two places of one thing")
        theta = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
        return {**read, **theta, "rope_scaling": rope or None}

    def write(self, config: Any) -> dict[str, Any]:
        fields = super().write(config)
        rope = fields.pop("rope_scaling") or {"rope_type": "default"}
        fields["rope_parameters"] = {**rope, "rope_theta": fields.pop("rope_theta")}
        usual, (_, KV, hd) = self.config(), config.heads
        for name, value in (("num_key_value_heads", KV), ("head_dim", hd)):
            if fields[name] is None and getattr(usual, name) is not None:  # then leaving it out would mean something else
                fields[name] = value
        if fields.get("layer_types") is not None:
            fields["layer_types"] = list(fields["layer_types"])
        meant = "sliding_window", "pad_token_id"  # where None says something
        return {name: value for name, value in fields.items() if value is not None or name in meant}


def heads(name: str) -> dict[str, Head]:
    """The four of a member: its classes are named alike."""
    return {
        "base": Head(f"{name}Model", LlamaBody),
        "causal_lm": Head(f"{name}ForCausalLM", Llama, body="model.", tied={"lm_head.weight": "model.embed_tokens.weight"}),
        "sequence_classification": Head(f"{name}ForSequenceClassification", LlamaClassifier, labelled=True, body="model."),
        "token_classification": Head(f"{name}ForTokenClassification", LlamaTokenClassifier, labelled=True, body="model."),
    }


LLAMA_FAMILY = RotaryFamily(
    model_type="llama",
    config=LlamaConfig,
    prefix="model.",
    heads=heads("Llama"),
    others=("lm_head.", "score.", "qa_outputs."),
    defaults={"classifier_dropout": 0.1},
    fixed={"use_mrope": (False,)},
    lacking=("attention_dropout",),
    buffers=((r"\brotary_emb\.inv_freq", r"(F32|F16|BF16) \(\d+,\)"),),
)
MISTRAL_FAMILY = dataclasses.replace(LLAMA_FAMILY, model_type="mistral", config=MistralConfig, heads=heads("Mistral"))
QWEN2_FAMILY = dataclasses.replace(LLAMA_FAMILY, model_type="qwen2", config=Qwen2Config, heads=heads("Qwen2"))
QWEN3_FAMILY = dataclasses.replace(LLAMA_FAMILY, model_type="qwen3", config=Qwen3Config, heads=heads("Qwen3"))
