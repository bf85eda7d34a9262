"""Other methods, and dialects that are not read: named."""
import numpy as np
import pytest
from saved_oracle import source

from minilora.formats.adapters.foreign import METHODS, foreign

KEYS = {
    "lora_unet_x.hada_w1_a": "LoHa", "lora_unet_x.hada_t2": "LoHa", "x.lokr_w1": "LoKr", "x.lokr_w2_b": "LoKr",
    "x.lokr_t2": "LoKr",
    "base_model.model.x.lora_E": "AdaLoRA", "base_model.model.x.vera_lambda_b": "VeRA", "base_model.vera_A": "VeRA",
    "base_model.model.x.ia3_l": "IA3", "x.on_input": "IA3", "base_model.model.x.boft_R": "BOFT",
    "base_model.model.x.oft_R.weight": "OFT", "lora_unet_x.oft_blocks": "OFT", "x.oft_diag": "OFT",
    "x.fourierft_spectrum": "FourierFT", "prompt_embeddings": "prefix tuning", "x.a1.weight": "GLoRA", "x.diff": "differences",
    "x.diff_b": "differences", "text_encoder:0:down": "cloneofsimo", "unet:9:up": "cloneofsimo",
    "x.lora_a_scales": "quantised factors", "x.lora_a.weight": "torchtune", "x.parametrizations.weight.0.lora_A": "minLoRA",
    "lora_unet_x.lora_mid.weight": "Tucker",
}


@pytest.mark.parametrize("key", KEYS)
def test_each_method_is_named_with_a_cure(key):
    text = foreign(source({"y.lora_down.weight": np.ones(1), key: np.ones(1)}))
    assert KEYS[key] in text and key in text and "minilora does not read it" in text and len(text) < 300


def test_every_entry_is_met():
    met = {next(method for _, method, _ in METHODS if method in foreign(source({key: 1}))) for key in KEYS}
    assert len(met) == len(METHODS)


@pytest.mark.parametrize("key", [
    "base_model.model.x.lora_A.weight", "x.lora_A", "x.lora_B", "x.lora_a", "x.lora_b", "x.m", "x.lora_down.weight", "x.alpha",
    "x.dora_scale", "unet.x.lora_A.weight", "x.to_q_lora.down.weight", "x.lora.up.weight", "x.lora_embedding_A",
    "x.lora_magnitude_vector", "x.bias", "x.weight", "x.base_layer.bias", "x.a.weight", "x.lora_B.bias",
    "x.token_adapter.trainable_tokens_delta",
])
def test_what_is_read_is_not_named(key):
    assert foreign(source({key: np.ones(1)})) is None
    assert foreign(source({})) is None
