"""Transformers, whole: GPT-2, the Llama family, BERT, RoBERTa, DistilBERT, DeBERTa, with the module names of their files;
and a small diffusion model of images.

`load` reads a checkpoint, `save` writes one. Everything here is read when it is used: `import minilora` reads none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..calls import answered_value

if TYPE_CHECKING:
    from .bodies.bert import Bert, BertConfig, BertLayer
    from .bodies.deberta import DebertaV2, DebertaV2Layer
    from .bodies.deberta_config import DebertaV2Config
    from .bodies.distilbert import DistilBert, DistilBertConfig, DistilBertLayer
    from .bodies.gpt2 import GPT2, GPT2Block, GPT2Body, GPT2Config
    from .bodies.llama import Llama, LlamaBody, LlamaLayer
    from .bodies.llama_configs import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
    from .bodies.roberta import Roberta, RobertaConfig, XLMRobertaConfig
    from .causal import CausalLM
    from .checkpoints.reading import Origin, load
    from .checkpoints.writing import save
    from .decoding.cache import Cache
    from .decoding.generation import Generated, generate
    from .diffusion.ddim import ddim
    from .diffusion.ddpm import NoisedRow, noise_loss
    from .diffusion.schedule import NoiseSchedule
    from .diffusion.unet import UNet, UNetConfig
    from .group import Group
    from .heads.bert import BertClassifier, BertMaskedLM, BertTokenClassifier
    from .heads.deberta import DebertaV2Classifier, DebertaV2MaskedLM, DebertaV2TokenClassifier
    from .heads.distilbert import DistilBertClassifier, DistilBertMaskedLM, DistilBertTokenClassifier
    from .heads.gpt2 import GPT2Classifier, GPT2TokenClassifier
    from .heads.labels import Labels
    from .heads.llama import LlamaClassifier, LlamaTokenClassifier
    from .heads.pooled import SentenceClassifier
    from .heads.roberta import RobertaClassifier, RobertaMaskedLM, RobertaTokenClassifier
    from .heads.sentences import SentenceEncoder
    from .text.tokenizer import Encoded, Tokenizer

# Where what is public lives.
HOMES = {
    "bodies.bert": "Bert BertConfig BertLayer",
    "bodies.deberta": "DebertaV2 DebertaV2Layer",
    "bodies.deberta_config": "DebertaV2Config",
    "bodies.distilbert": "DistilBert DistilBertConfig DistilBertLayer",
    "bodies.gpt2": "GPT2 GPT2Block GPT2Body GPT2Config",
    "bodies.llama": "Llama LlamaBody LlamaLayer",
    "bodies.llama_configs": "LlamaConfig MistralConfig Qwen2Config Qwen3Config",
    "bodies.roberta": "Roberta RobertaConfig XLMRobertaConfig",
    "causal": "CausalLM",
    "checkpoints.quantising": "dequantize_files quantize_files",
    "checkpoints.reading": "Origin load",
    "checkpoints.writing": "save",
    "decoding.cache": "Cache",
    "decoding.generation": "Generated generate",
    "diffusion.ddim": "ddim",
    "diffusion.ddpm": "NoisedRow noise_loss",
    "diffusion.schedule": "NoiseSchedule",
    "diffusion.unet": "UNet UNetConfig",
    "group": "Group",
    "heads.bert": "BertClassifier BertMaskedLM BertTokenClassifier",
    "heads.deberta": "DebertaV2Classifier DebertaV2MaskedLM DebertaV2TokenClassifier",
    "heads.distilbert": "DistilBertClassifier DistilBertMaskedLM DistilBertTokenClassifier",
    "heads.gpt2": "GPT2Classifier GPT2TokenClassifier",
    "heads.labels": "Labels",
    "heads.llama": "LlamaClassifier LlamaTokenClassifier",
    "heads.pooled": "SentenceClassifier",
    "heads.roberta": "RobertaClassifier RobertaMaskedLM RobertaTokenClassifier",
    "heads.sentences": "SentenceEncoder",
    "text.tokenizer": "Encoded Tokenizer",
}

__all__ = [
    "Bert", "BertConfig", "BertLayer",
    "Cache",
    "CausalLM",
    "dequantize_files", "quantize_files",
    "Origin", "load",
    "save",
    "DebertaV2", "DebertaV2Layer",
    "DebertaV2Config",
    "ddim",
    "NoisedRow", "noise_loss",
    "NoiseSchedule",
    "UNet", "UNetConfig",
    "DistilBert", "DistilBertConfig", "DistilBertLayer",
    "Generated", "generate",
    "GPT2", "GPT2Block", "GPT2Body", "GPT2Config",
    "Group",
    "BertClassifier", "BertMaskedLM", "BertTokenClassifier",
    "DebertaV2Classifier", "DebertaV2MaskedLM", "DebertaV2TokenClassifier",
    "DistilBertClassifier", "DistilBertMaskedLM", "DistilBertTokenClassifier",
    "GPT2Classifier", "GPT2TokenClassifier",
    "Labels",
    "LlamaClassifier", "LlamaTokenClassifier",
    "RobertaClassifier", "RobertaMaskedLM", "RobertaTokenClassifier",
    "SentenceClassifier",
    "SentenceEncoder",
    "Llama", "LlamaBody", "LlamaLayer",
    "LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config",
    "Roberta", "RobertaConfig", "XLMRobertaConfig",
    "Encoded", "Tokenizer",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in HOMES.items() if name in names.split()), None)
    if home is None:
        from ..unsupported import no_such_name

        raise no_such_name(__name__, name)
    value = globals()[name] = answered_value(getattr(import_module(f".{home}", __name__), name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
