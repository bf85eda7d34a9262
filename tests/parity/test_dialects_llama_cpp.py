"""llama.cpp itself computes with an adapter written here what it computes with merged weights: four small random models.

Run with -m parity, where gguf and xllamacpp (llama.cpp as a Python package) are installed. llama.cpp keeps keys and values in
half precision, so that two runs agree to about 2e-4 in a log-probability; the adapter moves them by about 1.
"""
import json

import numpy as np
import pytest

from minilora.formats import write_adapter
from minilora.formats.adapters.gguf.names import ARCHITECTURES, permuted
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.lora import Config

pytestmark = pytest.mark.parity
WIDTH, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY, END = 64, 2, 4, 2, 96, 300, 2
ROWS = KV_HEADS * WIDTH // HEADS
LLAMA = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (ROWS, WIDTH), "self_attn.v_proj": (ROWS, WIDTH),
         "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
         "mlp.down_proj": (WIDTH, INNER)}
GPT2 = {"attn.c_attn": (3 * WIDTH, WIDTH), "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (INNER, WIDTH),
        "mlp.c_proj": (WIDTH, INNER)}
BASE = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": False}


def drawn(rng, known, inner):
    """Weights of a whole model by transformers' paths, and an update of every one of them."""
    shapes = {f"{known.layers}.{i}.{name}": shape for i in range(LAYERS) for name, shape in inner.items()}
    embedding = next(path for path, name in known.outer.items() if name == "token_embd")
    weights = {path: rng.normal(size=shape) / np.sqrt(shape[1]) for path, shape in shapes.items()}
    weights |= {"lm_head": rng.normal(size=(VOCABULARY, WIDTH)) / 8, embedding: rng.normal(size=(VOCABULARY, WIDTH))}
    updates = {}
    for path, weight in weights.items():
        r, (out, into) = int(rng.integers(1, 4)), weight.shape[::-1] if path == embedding else weight.shape
        A, B = (rng.normal(size=shape).astype("float32") / 5 for shape in ((r, into), (out, r)))
        updates[path] = Update("embedding" if path == embedding else "linear", A, B, 3 / r)
    return weights, SavedAdapter(updates, Config(r=2, lora_alpha=3, target_modules=[*updates])), embedding


def write_model(path, architecture, weights):
    """A GGUF model of these weights, with norms of ones and biases of zeros."""
    gguf = pytest.importorskip("gguf")
    known, writer = ARCHITECTURES[architecture], gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    # No bytes beyond ASCII: the server keeps half a character, and its probabilities, to itself.
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(128)),
                           *(f"t{i}" for i in range(VOCABULARY - 131))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 128, *[1] * (VOCABULARY - 131)])
    ones, zeros = {"output_norm": WIDTH}, {}
    for i in range(LAYERS):
        ones |= {f"blk.{i}.attn_norm": WIDTH, f"blk.{i}.ffn_norm": WIDTH}
        if architecture == "qwen3":
            ones |= {f"blk.{i}.attn_q_norm": WIDTH // HEADS, f"blk.{i}.attn_k_norm": WIDTH // HEADS}
        if architecture == "qwen2":
            zeros |= {f"blk.{i}.attn_q": WIDTH, f"blk.{i}.attn_k": ROWS, f"blk.{i}.attn_v": ROWS}
        if architecture == "gpt2":
            zeros |= {f"blk.{i}.attn_qkv": 3 * WIDTH, f"blk.{i}.ffn_up": INNER}
            zeros |= {f"blk.{i}.{name}": WIDTH for name in ("attn_norm", "ffn_norm", "attn_output", "ffn_down")}
    if architecture == "gpt2":
        writer.add_layer_norm_eps(1e-5)
        zeros["output_norm"] = WIDTH
        writer.add_tensor("position_embd.weight", np.random.default_rng(1).normal(size=(128, WIDTH)).astype("float32"))
    else:
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(WIDTH // HEADS)
        writer.add_key_length(WIDTH // HEADS)
        writer.add_value_length(WIDTH // HEADS)
    for path, weight in weights.items():
        name, array = known.to_gguf(path), weight.astype("float32")
        if known.is_permuted(name):
            array = permuted(array, HEADS if name.endswith("attn_q") else KV_HEADS)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array))
    for name, size in ones.items():
        writer.add_tensor(f"{name}.weight", np.ones(size, "float32"))
    for name, size in zeros.items():
        writer.add_tensor(f"{name}.bias", np.zeros(size, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probabilities(model, adapter=None):
    """Of every token behind a prompt."""
    llama = pytest.importorskip("xllamacpp")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(model), 128, 1, False
    settings.cpuparams.n_threads = 1
    if adapter is not None:
        settings.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
    asked = {"prompt": [1, 270, 33, 281, 99, 265], "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0.0,
             "ignore_eos": True, "cache_prompt": False}
    answer = llama.Server(settings).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    found = {each["id"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return np.array([found[token] for token in range(VOCABULARY) if token != END])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_computes_what_the_merged_weights_do(tmp_path, architecture, dtype):
    pytest.importorskip("xllamacpp")
    weights, adapter, embedding = drawn(np.random.default_rng(0), ARCHITECTURES[architecture],
                                        GPT2 if architecture == "gpt2" else LLAMA)
    merged = {}
    for path, weight in weights.items():
        update = adapter.updates[path]
        D = update.s * update.B.astype("float64") @ update.A
        merged[path] = weight + (D.T if path == embedding else D)
    write_model(tmp_path / "base.gguf", architecture, weights)
    write_model(tmp_path / "merged.gguf", architecture, merged)
    write_adapter(adapter, tmp_path / "adapter.gguf", dialect="gguf", base={**BASE, "model_type": architecture}, dtype=dtype)
    base, by_hand = (log_probabilities(tmp_path / f"{name}.gguf") for name in ("base", "merged"))
    adapted = log_probabilities(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert abs(adapted - by_hand).max() < (2e-3 if dtype == "float32" else 2e-2)
    assert abs(base - by_hand).max() > 0.2
