"""Generation: the same text with and without a cache, in a batch and alone; its ends, settings and errors."""
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import PROOF, fetch, place
from generation_cases import N, PROCESSED, SETTINGS, logits, model_of, seen
from generation_cases import PROMPTS as STORED
from tiny_transformers import CAUSAL, V, build, randomise, token_ids

import minilora
from minilora import lora, nn, no_grad
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError, StateError
from minilora.models import generate
from minilora.models.decoding.sampling import keep_top_k, keep_top_p, penalise, probabilities

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
DRAWN = dict(temperature=1.3, top_k=7, top_p=0.9)


@pytest.fixture(scope="module")
def models():
    with minilora.use("cpu"):
        return {family: model_of(family) for family in CAUSAL}


def greedy(model, prompt, n, penalty=1.0):
    """Token by token, from the logits of the whole text."""
    text = list(prompt)
    for _ in range(n):
        z = fetch(model([text]))[0, -1].copy()
        seen = sorted(set(text))
        z[seen] = np.where(z[seen] < 0, z[seen] * penalty, z[seen] / penalty)
        text.append(int(z.argmax()))
    return text[len(prompt):]


# -- which tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, 1.7])
@pytest.mark.parametrize("family", CAUSAL)
def test_greedy(family, penalty, models):
    expected = [greedy(models[family], prompt, 6, penalty or 1.0) for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS, expected):
        assert generate(models[family], prompt, 6, repetition_penalty=penalty).ids.tolist() == [text]
    for use_cache in (True, False):
        together = generate(models[family], PROMPTS, 6, repetition_penalty=penalty, use_cache=use_cache)
        assert together.ids.tolist() == expected == together.texts()
    assert together.lengths.tolist() == [6] * 3 and not together.stopped.any()
    assert together.ids.dtype == "int64" and len({tuple(text) for text in expected}) == 3


@pytest.mark.parametrize("family", CAUSAL)
def test_one_seed_gives_one_text(family, models, device):
    """On both devices, with and without a cache; and a row draws the same in every batch."""
    model = model_of(family)
    batch = generate(model, PROMPTS, 8, seed=3, **DRAWN)
    with minilora.use("cpu"):
        again = generate(models[family], PROMPTS, 8, seed=3, use_cache=False, **DRAWN)
    assert batch.ids.tolist() == again.ids.tolist()
    assert generate(model, PROMPTS[:1], 8, seed=np.random.default_rng(3), **DRAWN).ids.tolist() == batch.ids[:1].tolist()
    assert generate(model, PROMPTS, 8, seed=4, **DRAWN).ids.tolist() != batch.ids.tolist()
    assert generate(model, PROMPTS, 8, **DRAWN).ids.tolist() != generate(model, PROMPTS, 8, **DRAWN).ids.tolist()
    rng = np.random.default_rng(3)
    first, second = (generate(model, PROMPTS, 8, seed=rng, **DRAWN).ids.tolist() for _ in range(2))
    assert first == batch.ids.tolist() != second


@pytest.mark.parametrize("family", CAUSAL)
def test_padding_by_hand_is_padding_in_here(family, models):
    expected = generate(models[family], PROMPTS, 8, repetition_penalty=1.3)
    ids, mask = np.full((3, 6), 7), np.zeros((3, 6), "int64")
    for row, prompt in enumerate(PROMPTS):
        ids[row, 6 - len(prompt):], mask[row, 6 - len(prompt):] = prompt, 1
    for given in (mask, mask.astype(bool), mask.tolist()):
        made = generate(models[family], ids, 8, attention_mask=given, repetition_penalty=1.3)
        assert made.ids.tolist() == expected.ids.tolist()
    assert generate(models[family], ids, 8, repetition_penalty=1.3).ids.tolist() != expected.ids.tolist()
    one = generate(models[family], ids[0], 8, attention_mask=mask[0], repetition_penalty=1.3)
    assert one.ids.tolist() == expected.ids[:1].tolist()


# -- ends ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", CAUSAL)
def test_stop_ids_and_pads(family, use_cache, models):
    model = models[family]
    free = generate(model, PROMPTS, 12, repetition_penalty=1.7)
    first, second = int(free.ids[0, 2]), int(free.ids[1, 5])
    for stop_ids, pad_id in ((first, None), ([first, second], None), (np.array([second, first]), 11), ((second,), 0)):
        stops = np.atleast_1d(stop_ids).tolist()
        made = generate(model, PROMPTS, 12, repetition_penalty=1.7, stop_ids=stop_ids, pad_id=pad_id, use_cache=use_cache)
        for row, text, n, stopped in zip(free.ids.tolist(), made.ids.tolist(), made.lengths, made.stopped):
            ends = [i + 1 for i, token in enumerate(row) if token in stops]
            assert n == (ends[0] if ends else 12) and stopped == bool(ends)
            assert text == (row[:n] + [stops[0] if pad_id is None else pad_id] * 12)[:made.ids.shape[1]]
        assert made.texts() == [row[:n] for row, n in zip(free.ids.tolist(), made.lengths)]
    ended = generate(model, PROMPTS[:1], 12, repetition_penalty=1.7, stop_ids=first, use_cache=use_cache)
    assert ended.ids.shape == (1, 3) and ended.stopped.all()


def test_the_stream_sees_each_step(models):
    model, steps = models["gpt2"], []
    made = generate(model, PROMPTS, 6, stream=steps.append)
    assert np.stack(steps, axis=1).tolist() == made.ids.tolist()
    stop, steps = int(made.ids[0, 1]), []

    def keep_and_spoil(ids):
        steps.append(ids.tolist())
        ids[:] = -5
    again = generate(model, PROMPTS, 6, stop_ids=stop, pad_id=12, stream=keep_and_spoil)
    assert np.transpose(steps).tolist() == again.ids.tolist()


def test_the_last_position_is_filled(models):
    """n - 1 of the new tokens are read: 64 positions take a prompt of 59 and 6 more."""
    made = generate(models["gpt2"], token_ids(1, 59), 6)
    assert made.ids.shape == (1, 6)
    with pytest.raises(ShapeError, match=r"59 tokens and 7 new.*need 65 positions, but the model has 64.*max_new_tokens <= 6"):
        generate(models["gpt2"], token_ids(1, 59), 7)
    assert generate(models["gpt2"], token_ids(1, 64), 1).ids.shape == (1, 1)


# -- what it leaves, and what it does not do ---------------------------------------------------------------------------------


def test_dropout_is_off_and_comes_back():
    model = model_of("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)
    model.h[0].drop.eval()
    flags = {path: module.training for path, module in model.named_modules()}
    state = {name: value.copy() for name, value in model.state_dict().items()}
    assert generate(model, [1, 2], 9).ids.tolist() == [greedy(model_of("gpt2"), [1, 2], 9)]

    def fail(ids):
        raise KeyError("planted")
    with pytest.raises(KeyError):
        generate(model, [1, 2], 9, stream=fail)
    assert flags == {path: module.training for path, module in model.named_modules()} and len(set(flags.values())) == 2
    assert minilora.engine.is_recording()
    assert all(np.array_equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_are_made_for_the_last_token_only(family, models, monkeypatch):
    rows = []
    embedding = type(models[family]).logits
    monkeypatch.setattr(type(models[family]), "logits", lambda self, h: rows.append(h.shape) or embedding(self, h))
    generate(models[family], PROMPTS, 3)
    assert [shape[:2] for shape in rows] == [(3, 1)] * 3


@pytest.mark.parametrize("family", CAUSAL)
def test_each_row_keeps_its_adapter(family, device):
    """Several adapters in one batch: a context around the call, of which models know nothing."""
    model = model_of(family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    for seed, name in enumerate(["one", "two"]):
        lora.inject(model, lora.Config(r=2, target_modules=targets), name, rng=seed)
    rng = np.random.default_rng(5)
    for path, p in model.named_parameters():
        if "lora_B" in path:
            p.data[...] = place(rng.normal(0, 0.5, p.shape), p.dtype)
    names, texts = ["two", "__base__", "one"], []
    for name, prompt in zip(names, PROMPTS):
        with lora.mixed(model, adapter_names=[name]):
            texts.append(generate(model, prompt, 6).ids[0].tolist())
    with lora.mixed(model, adapter_names=names):
        assert generate(model, PROMPTS, 6).ids.tolist() == texts
        assert generate(model, PROMPTS, 6, use_cache=False).ids.tolist() == texts
    base = [generate(model_of(family), prompt, 6).ids[0].tolist() for prompt in PROMPTS]
    assert texts[1] == base[1] and texts[0] != base[0] and texts[2] != base[2]


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, error, message", [
    (dict(ids=[[]]), ShapeError, "a prompt is empty"),
    (dict(ids=[]), ShapeError, "a prompt is empty"),
    (dict(ids=[[1, 2], []]), ShapeError, "a prompt is empty"),
    (dict(ids=np.zeros((2, 0), "int64")), ShapeError, "is a text empty"),
    (dict(ids=np.zeros((0, 2), "int64")), ShapeError, r"expected prompts \(B, T\) with B and T >= 1, got \(0, 2\)"),
    (dict(ids=np.zeros((1, 2, 2), "int64")), ShapeError, r"expected prompts \(B, T\)"),
    (dict(ids=[[[1]], [[2]]]), ShapeError, "one axis each"),
    (dict(ids=[[1.5]]), DTypeError, "must be integers"),
    (dict(ids=[1, V]), OutOfRangeError, f"token id {V} at position 1 is out of range: expected 0 to {V - 1}"),
    (dict(ids=[[1], [2, -1]]), OutOfRangeError, "token id -1"),
    (dict(max_new_tokens=0), ConfigError, "max_new_tokens must be an int >= 1, got 0"),
    (dict(temperature=-1.0), ConfigError, "temperature must be a number in"),
    (dict(temperature=float("nan")), ConfigError, "temperature"),
    (dict(top_k=5), ConfigError, r"top_k choose.*give a temperature, such as 1\.0"),
    (dict(top_p=0.5, top_k=2), ConfigError, "top_k and top_p choose"),
    (dict(temperature=1.0, top_k=0), ConfigError, "top_k must be an int >= 1"),
    (dict(temperature=1.0, top_p=0.0), ConfigError, "top_p must be a number in"),
    (dict(temperature=1.0, top_p=1.5), ConfigError, "top_p must be a number in"),
    (dict(repetition_penalty=0.0), ConfigError, "repetition_penalty"),
    (dict(stop_ids=V), OutOfRangeError, "stop id 13"),
    (dict(stop_ids=["a"]), DTypeError, "stop ids must be integers"),
    (dict(pad_id=-1), OutOfRangeError, "pad id -1"),
    (dict(stream=3), ConfigError, "stream must be a function"),
    (dict(ids=[[1], [2, 3]], attention_mask=[[1, 1]]), ConfigError, "leave out attention_mask"),
    (dict(attention_mask=[[1, 1]]), ShapeError, r"shape of the ids, \(1, 3\), got bool \(1, 2\)"),
    (dict(attention_mask=[[1, 1, 2]]), DTypeError, "others: are these the token ids"),
    (dict(attention_mask=[[1.0, 1.0, 1.0]]), ShapeError, "booleans"),
    (dict(attention_mask=[[1, 1, 0]]), ShapeError, r"rows \[0\] end with padding.*pad at the left"),
])
def test_mistakes(given, error, message, models):
    given = {"ids": [1, 2, 3], "max_new_tokens": 3, **given}
    with pytest.raises(error, match=message):
        generate(models["llama"], **given)


def test_a_model_without_next_tokens():
    with pytest.raises(DTypeError, match=r"a CausalLM\), got Bert"):
        generate(build("bert"), [1], 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(value):
    model = model_of("llama", dtype="float32")
    model.lm_head.weight.data[3] = value
    with no_grad(), np.errstate(invalid="ignore"):
        with pytest.raises(StateError, match=r"the largest logit of row 0 is (nan|inf).*isfinite"):
            generate(model, [1, 2], 3)


def test_half_precision():
    model = randomise(build("llama", dtype="float16"), std=0.1)
    assert generate(model, PROMPTS, 5).ids.shape == (3, 5)
    assert isinstance(model, nn.Llama)


# -- against stored texts of transformers --------------------------------------------------------------------------------------


VECTORS = json.loads((Path(__file__).parents[2] / "data" / "generation_transformers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", CAUSAL)
@PROOF
def test_fifty_tokens_as_transformers_writes_them(family, settings, models, device):
    """Each prompt alone there, in a batch here."""
    expected = VECTORS["texts"][f"{family} {settings}"]
    model = model_of(family)
    assert generate(model, STORED, N, **SETTINGS[settings]).ids.tolist() == expected


@pytest.mark.parametrize("name", PROCESSED)
def test_probabilities_as_transformers_makes_them(name):
    temperature, k, p, penalty = PROCESSED[name]
    z = logits(ties=False)
    if penalty:
        marked = np.zeros(z.shape, bool)
        np.put_along_axis(marked, seen(), True, axis=1)
        z = penalise(z, marked, penalty)
    z = z / temperature
    z = keep_top_k(z, k) if k else z
    z = keep_top_p(z, p) if p else z
    np.testing.assert_allclose(probabilities(z), VECTORS["probabilities"][name], rtol=0, atol=1e-11)
