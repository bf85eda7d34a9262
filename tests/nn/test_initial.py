"""Layers made without numbers: what they hold, what that costs, and where it holds."""
import threading
import time
import tracemalloc

import numpy as np
import pytest
from conftest import fetch

from minilora import models, nn
from minilora.nn.initial import drawing, first

LAYERS = [
    lambda: nn.Linear(5, 3), lambda: nn.Linear(5, 3, bias=False), lambda: nn.Embedding(7, 3, 2), lambda: nn.Conv1d(4, 6, 3),
    lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4), lambda: nn.GroupNorm(2, 4),
    lambda: nn.MultiheadAttention(8, 2), lambda: nn.SimpleAttention(4),
    lambda: nn.GPT2(nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)),
    lambda: nn.Bert(nn.BertConfig(vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=8, max_position_embeddings=8)),
    lambda: nn.Llama(nn.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                                    num_attention_heads=4, num_key_value_heads=2)),
]


@pytest.mark.parametrize("make", LAYERS)
def test_an_undrawn_layer_is_the_same_without_numbers(make, device):
    with nn.undrawn():
        undrawn = make()
    drawn = make()
    assert {name: (p.shape, p.dtype, p.device, p.trainable) for name, p in undrawn.named_parameters()} == {
        name: (p.shape, p.dtype, p.device, p.trainable) for name, p in drawn.named_parameters()}
    for _, p in undrawn.named_parameters():
        assert not fetch(p).any()
        if device == "cpu":
            assert not any(p.data.strides) and not p.data.flags.writeable
    undrawn.load_state_dict(drawn.state_dict())
    assert {name: a.tobytes() for name, a in undrawn.state_dict().items()} == {
        name: a.tobytes() for name, a in drawn.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_dtype(dtype):
    with nn.undrawn():
        assert {p.dtype.name for p in nn.Linear(2, 3, dtype=dtype).parameters()} == {dtype}
        assert nn.LayerNorm(2, dtype=dtype).weight.dtype == dtype and nn.Embedding(2, 3, dtype=dtype).weight.dtype == dtype


def test_gpt2_small_costs_nothing():
    """50 ms and 10 MB, against 1 s and 500 MB with numbers."""
    def make():
        with nn.undrawn():
            return nn.GPT2(nn.GPT2Config())

    make()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        make()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    tracemalloc.start()
    model = make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6 and sum(p.size for p in model.parameters()) == 124_439_808


def test_it_draws_no_numbers():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    with nn.undrawn():
        nn.MultiheadAttention(8, 2, rng=rng)
    assert rng.bit_generator.state == before


def test_the_context_ends_and_nests():
    assert drawing()
    with pytest.raises(ZeroDivisionError), nn.undrawn():
        with nn.undrawn():
            pass
        assert not drawing()
        1 / 0
    assert drawing() and fetch(nn.Linear(3, 3, rng=0).weight).any()


def test_other_threads_draw():
    inside, found = threading.Event(), {}

    def other():
        inside.wait()
        found["other"] = nn.Linear(3, 3, rng=0).weight.data.any()

    thread = threading.Thread(target=other)
    thread.start()
    with nn.undrawn():
        inside.set()
        thread.join()
        found["own"] = nn.Linear(3, 3, rng=0).weight.data.any()
    assert found == {"other": True, "own": False}


def test_first():
    assert first((2, 3), "float32", lambda: np.ones((2, 3))).data.tolist() == [[1.0] * 3] * 2
    with nn.undrawn():
        assert first((), "float64", lambda: 1 / 0).data.item() == 0.0
        assert first((0, 3), "float64", lambda: 1 / 0).shape == (0, 3)


def test_a_group_takes_parameters_and_none():
    group = models.Group(a=nn.Linear(2, 2), bias=first((2,), "float32", lambda: np.ones(2)), none=None)
    assert {name for name, _ in group.named_parameters()} == {"a.weight", "a.bias", "bias"} and group.none is None
