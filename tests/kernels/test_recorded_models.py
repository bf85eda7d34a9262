"""Whole models in recorded steps give the bits of steps that are called: grouped heads, windows, prefixes, distances."""
import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import lora, models, nn, ops, optim, tuners

SIZES = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(SIZES, num_key_value_heads=2)


def gpt2(rng=0):
    return nn.GPT2(nn.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2), rng=rng)


def deberta(rng=0):
    config = dict(SIZES, max_position_embeddings=16, position_buckets=4, relative_attention=True, pos_att_type=("c2p", "p2c"),
                  type_vocab_size=0, norm_rel_ebd="layer_norm")
    return models.DebertaV2(models.DebertaV2Config(**config), rng=rng)


def frozen_tables(model):
    for name, p in model.named_parameters():
        p.trainable = not any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
    return model


def adapted(model, *names):
    model.requires_grad(False)
    lora.inject(model, lora.Config(r=2, lora_alpha=4, target_modules=list(names)), rng=0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B.default") or "lora_B" in name:
            p.data[...] = 0.125
    return model


def with_updates(model, **options):
    """GPT-2 with an adapter on every fused projection of queries, keys and values; B not 0."""
    model.requires_grad(False)
    for block in model.h:
        block.attn.c_attn = lora.adapt(block.attn.c_attn, r=2, lora_alpha=4, rng=0, **options)
        block.attn.c_attn.lora_B.data[...] = 0.125
    return model


def prefixed(model, task="CAUSAL_LM"):
    tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=3, task_type=task), rng=0)
    return model


def prompted(model):
    tuners.inject(model, tuners.PromptConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), rng=0)
    return model


MODELS = {
    "Llama": lambda: frozen_tables(nn.Llama(nn.LlamaConfig(**GROUPED), rng=0)),
    "Llama, LoRA": lambda: adapted(nn.Llama(nn.LlamaConfig(**GROUPED), rng=0), "q_proj", "v_proj"),
    "Llama, one key head": lambda: frozen_tables(nn.Llama(nn.LlamaConfig(**dict(SIZES, num_key_value_heads=1)), rng=0)),
    "Llama, prefix": lambda: prefixed(nn.Llama(nn.LlamaConfig(**GROUPED), rng=0)),
    "Mistral": lambda: frozen_tables(nn.Llama(models.MistralConfig(**GROUPED, sliding_window=3), rng=0)),
    "Qwen3": lambda: frozen_tables(nn.Llama(models.Qwen3Config(**GROUPED, head_dim=4), rng=0)),
    "GPT-2, prefix": lambda: prefixed(gpt2()),
    "GPT-2": lambda: frozen_tables(gpt2()),
    "GPT-2, prompt": lambda: prompted(gpt2()),
    "GPT-2, fused QKV LoRA": lambda: with_updates(gpt2(), enable_lora=(True, False, True)),
    "GPT-2, fused QKV LoRA, dropout": lambda: with_updates(gpt2(), enable_lora=(True, True, True), lora_dropout=0.25),
    "GPT-2, DoRA": lambda: with_updates(gpt2(), use_dora=True),
    "GPT-2, all weights": gpt2,
    "Llama, all weights": lambda: nn.Llama(nn.LlamaConfig(**GROUPED), rng=0),
    "BERT, all weights": lambda: models.Bert(models.BertConfig(**SIZES, max_position_embeddings=16), rng=0),
    "DeBERTa, all weights": deberta,
    "BERT": lambda: frozen_tables(models.Bert(models.BertConfig(**SIZES, max_position_embeddings=16), rng=0)),
    "DistilBERT": lambda: frozen_tables(models.DistilBert(models.DistilBertConfig(
        vocab_size=11, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16), rng=0)),
    "DeBERTa": lambda: frozen_tables(deberta()),
}


def trained(record, model, padded):
    rng = np.random.default_rng(1)
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.01)

    @record
    def step(ids, keep):
        more = {} if keep is None else dict(key_padding=keep)
        if isinstance(model, nn.GPT2 | nn.Llama):
            loss = model.loss(ids, ids, **more)
        else:
            y = model(ids, **more)
            loss = ops.mse(y, y.data * 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    losses = []
    for _ in range(3):
        keep = np.arange(6) < rng.integers(3, 7, (2, 1)) if padded else None
        losses.append(fetch(step(rng.integers(0, 11, (2, 6)), keep)).tobytes())
    assert len(set(losses)) == 3
    return losses, [fetch(p).tobytes() for p in model.parameters()]


@pytest.mark.parametrize("adapt", [lambda conv: lora.adapt(conv, r=2, rng=0),
                                   lambda conv: lora.adapt(conv, r=2, rng=0, use_dora=True), lambda conv: conv],
                         ids=["LoRA", "DoRA", "all weights"])
def test_convolutions(adapt, card):
    """Samples in several parts, and one pointwise convolution."""
    results = []
    for record in (minilora.record, lambda step: step):
        convs = [adapt(nn.Conv2d(*sizes, rng=0)) for sizes in ((2, 4, 3, 1, 1), (4, 4, 3, 2), (4, 2, 1))]
        model = nn.Sequential(convs[0], nn.GroupNorm(2, 4), nn.SiLU(), convs[1], nn.SiLU(), convs[2])
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data[...] = 0.125
        optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.01)

        @record
        def step(x):
            y = model(x)  # noqa: B023
            loss = ops.mse(y, y.data * 0.5)
            optimizer.zero_grad()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            return loss

        rng = np.random.default_rng(0)
        losses = [fetch(step(place(rng.standard_normal((3, 2, 6, 5)), "float32"))).tobytes() for _ in range(4)]
        assert len(set(losses)) == 4
        results.append((losses, [fetch(p).tobytes() for p in model.parameters()]))
    assert results[0] == results[1]


# Each has a step of its own of the same operations; those of every run have all of these.
SLOW = {"Llama", "Llama, one key head", "Qwen3", "GPT-2", "DistilBERT"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_the_same_bits(name, card):  # noqa: F811
    padded = list(MODELS).index(name) % 2 == 1
    assert trained(minilora.record, MODELS[name](), padded) == trained(lambda step: step, MODELS[name](), padded)


def test_a_longer_text_makes_new_tables_and_the_recording_is_made_again(card):  # noqa: F811
    """The graph of a recorded step reads the tables of angles: they live as long as it does, or it is recorded anew."""
    results = []
    for record in (minilora.record, lambda step: step):
        model = MODELS["Llama"]()
        step = record(lambda ids: model.loss(ids, ids))  # noqa: B023
        rng, seen = np.random.default_rng(0), []
        for i in range(6):
            if i == 3:
                with minilora.no_grad():
                    model(rng.integers(0, 11, (1, 200)))
            seen.append(fetch(step(rng.integers(0, 11, (2, 6)))).tobytes())
        results.append(seen)
    assert results[0] == results[1]


@pytest.mark.parametrize("padded", [True, False])
def test_the_last_token_classifies(padded, card):  # noqa: F811
    """Where that stands is found out on the device, of the ids or of the mask."""
    ends = []
    for record in (minilora.record, lambda step: step):
        body = nn.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, pad_token_id=0)
        model = models.GPT2Classifier(body, models.Labels(("a", "b", "c")), rng=0)
        optimizer, rng = optim.Adam(list(model.parameters()), lr=0.01), np.random.default_rng(0)

        @record
        def step(ids, keep, labels):
            loss = model(ids, labels, **({"key_padding": keep} if padded else {}))  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            return loss

        seen = []
        for _ in range(4):
            keep = np.arange(6) < rng.integers(2, 7, (2, 1))
            seen.append(fetch(step(np.where(keep, rng.integers(1, 11, (2, 6)), 0), keep, rng.integers(0, 3, 2))).tobytes())
        ends.append((seen, [fetch(p).tobytes() for p in model.parameters()]))
    assert ends[0] == ends[1] and len(set(ends[0][0])) == 4
