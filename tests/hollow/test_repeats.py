"""What is run once and counted often takes what it would take run by run: every figure of a step, for every kind of model."""
import dataclasses

import numpy as np
import pytest

from minilora import lora, models, nn, quant, tuners
from minilora.hollow import Step, device, rehearse, repeats
from minilora.hollow.array import Hollow, protocol
from minilora.hollow.meter import metered
from minilora.lora.planning.ways import WAYS, rehearsed, ways_for

CONFIG = lora.Config(r=2, target_modules="all-linear")
GPT2 = nn.GPT2Config(vocab_size=5000, n_positions=256, n_embd=32, n_layer=2, n_head=4)


@pytest.fixture
def run_by_run(monkeypatch):
    """A rehearsal that leaves nothing out and remembers nothing."""
    def whole(call):
        with monkeypatch.context() as patch:
            patch.setitem(protocol, "fewer", iter)
            patch.setattr(device, "remembered", lambda op, half, *arrays: half(*arrays))
            return call()
    return whole


def with_prefix(model):
    tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=3), rng=0)
    return model


KINDS = {  # a model, and an example of a call
    "gpt2": lambda: (nn.GPT2(GPT2), (9, 130)),
    "gpt2, one long text": lambda: (nn.GPT2(GPT2), (1, 256)),
    "llama": lambda: (nn.Llama(nn.LlamaConfig(vocab_size=3000, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2)), (17, 65)),
    "mistral": lambda: (nn.Llama(models.MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=20)), (5, 200)),
    "bert": lambda: (models.BertMaskedLM(nn.BertConfig(
        vocab_size=3000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)), (11, 70)),
    "deberta": lambda: (models.DebertaV2MaskedLM(models.DebertaV2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)), (7, 70)),
    "prefix": lambda: (with_prefix(nn.GPT2(dataclasses.replace(GPT2, n_layer=1))), (9, 66)),
    "images": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(),
                                     nn.Linear(8 * 256, 64), nn.GELU(), nn.Linear(64, 3)),
                       np.zeros((40, 3, 16, 16), "float32")),
}


def made(kind):
    with nn.undrawn():
        model, example = KINDS[kind]()
    return model, model.example(*example) if isinstance(example, tuple) else example


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_kind_of_model(kind, run_by_run):
    model, example = made(kind)
    repeats._calls.clear()
    quick = rehearse(model, example)
    assert quick == rehearse(model, example) == run_by_run(lambda: rehearse(model, example))
    assert isinstance(quick, Step) and quick.scratch > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "images"])
@pytest.mark.parametrize("more", [{}, dict(use_dora=True, lora_dropout=0.1)], ids=["lora", "dora"])
def test_a_step_in_every_way(kind, more, run_by_run):
    model, example = made(kind)
    config = dataclasses.replace(CONFIG, **more)
    for way in ways_for(model, WAYS[::3] if more else WAYS):
        quick = rehearsed(model, config, example, way)
        assert quick == run_by_run(lambda way=way: rehearsed(model, config, example, way)), way.name


def test_a_step_in_float16_and_of_a_quantised_model(run_by_run):
    half = nn.GPT2(dataclasses.replace(GPT2, vocab_size=100), rng=0).to(dtype="float16").requires_grad(False)
    held = nn.GPT2(dataclasses.replace(GPT2, vocab_size=100), rng=0).requires_grad(False)
    quant.quantize(held)
    for model in (half, held):
        lora.inject(model, CONFIG, rng=0)
        example = model.example(5, 70)
        assert rehearse(model, example) == run_by_run(lambda: rehearse(model, example))


# -- the choice of places ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys, run", [
    ("", set()), ("a", {0}), ("aa", {0, 1}), ("aaa", {0, 1, 2}), ("aaaaaaa", {0, 1, 5, 6}), ("aaaaab", {0, 1, 4, 5}),
    ("aabaabaabaab", {0, 1, 2, 3, 10, 11}), ("abcabc", {0, 1, 2, 3, 4, 5}),
])
def test_which_places_are_run(keys, run):
    assert repeats.chosen(list(keys)) & set(range(len(keys))) == run


def test_what_is_left_out_is_counted():
    x, places = Hollow((100, 8), "float32"), [slice(low, min(low + 7, 100)) for low in range(0, 100, 7)]
    with metered() as meter:
        came = []
        for part in x.fewer(places):
            came.append(part)
            np.dot(x[part], np.ones((8, 3), "float32", like=x[:1]).astype("float32"))
    assert came == [places[0], places[1], places[-2], places[-1]]
    with metered() as whole:
        for part in places:
            np.dot(x[part], np.ones((8, 3), "float32", like=x[:1]).astype("float32"))
    assert meter.flops == whole.flops and meter.peak == whole.peak


def test_calls_that_differ_are_not_taken_for_each_other():
    def key(q, **settings):
        op = type("Op", (), {})()
        vars(op).update(causal=True, needs=[True], **settings)
        return repeats.key_of(op, q)[1:]

    x = Hollow((2, 3), "float32")
    keys = [key([x, x]), key([x, Hollow((2, 3), "float32")]), key([x, x.T]), key([x, None]), key([x, x], window=3),
            key([x, x], masks=(Hollow((2, 2), "bool"),)), key([Hollow((2, 3), "float64"), x]), key([x, x], other=object())]
    assert len(set(keys)) == len(keys) and key([x, x]) == key([x, x])


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(repeats, "MOST", 3)
    with nn.undrawn():
        model = nn.GPT2(dataclasses.replace(GPT2, vocab_size=50, n_layer=1))
    for length in range(33, 38):
        rehearse(model, model.example(1, length))
        assert len(repeats._calls) <= 3
