"""A cache: what is read in pieces is what is read at once, and a call that does not fit changes nothing."""
import copy
import pickle

import numpy as np
import pytest
from conftest import fetch
from hypothesis import given
from hypothesis import strategies as st
from tiny_transformers import CAUSAL, D, P, V, build, randomise, token_ids

import minilora
from minilora import no_grad
from minilora.errors import DTypeError, GraphError, OutOfRangeError, ShapeError, StateError
from minilora.models import Cache

CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def assert_close(got, expected, tol=1e-12):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol * max(1.0, np.abs(expected).max(initial=0.0)))


def read(model, ids, lengths, keep=None, cache=None, **more):
    """Logits of ids (..., T), read in pieces of these lengths."""
    cache, pieces, start = Cache() if cache is None else cache, [], 0
    with no_grad():
        for n in lengths:
            part = np.s_[..., start:start + n]
            given = {name: value[part] for name, value in more.items()}
            pieces.append(fetch(model(ids[part], key_padding=None if keep is None else keep[part], cache=cache, **given)))
            start += n
    assert cache.length == start == ids.shape[-1]
    return np.concatenate(pieces, axis=-2)


@pytest.fixture(scope="module")
def models():
    with minilora.use("cpu"):
        return {family: randomise(build(family, **({"n_positions": 20} if family == "gpt2" else {}))) for family in CAUSAL}


@pytest.mark.parametrize("family", CAUSAL)
@given(lengths=CUTS, batch=st.sampled_from([(), (1,), (3,), (2, 2)]), padded=st.booleans(), data=st.data())
def test_any_split_of_a_text_gives_the_same_logits(family, lengths, batch, padded, data, models):
    T = sum(lengths)
    ids = token_ids(*batch, T)
    keep = None
    if padded:
        keep = np.array(data.draw(st.lists(st.booleans(), min_size=ids.size, max_size=ids.size))).reshape(ids.shape)
        keep[..., 0] = True  # else the first tokens see nothing
    expected = fetch(models[family](ids, key_padding=keep))
    assert_close(read(models[family], ids, lengths, keep), expected)


@pytest.mark.parametrize("family", CAUSAL)
def test_devices_and_dtypes(family, device):
    for dtype, tol in (("float64", 1e-12), ("float32", 1e-5), ("float16", 5e-2)):
        model = randomise(build(family, dtype=dtype, rng=0), std=0.1)
        ids = token_ids(2, 8)
        keep = np.arange(8) >= np.array([[0], [3]])
        expected = fetch(model(ids, key_padding=keep))
        got = read(model, ids, (5, 1, 1, 1), keep)
        assert got.dtype == dtype
        assert_close(got[1, 3:].astype("float64"), expected[1, 3:].astype("float64"), tol)
        assert_close(got[0].astype("float64"), expected[0].astype("float64"), tol)


@pytest.mark.parametrize("family", CAUSAL)
def test_positions_can_be_given(family, models):
    ids, positions = token_ids(2, 6), np.array([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    keep = np.arange(6) >= np.array([[2], [0]])
    expected = fetch(models[family](ids, key_padding=keep, position_ids=positions))
    assert_close(read(models[family], ids, (4, 2), keep, position_ids=positions)[0, 2:], expected[0, 2:])
    assert_close(read(models[family], ids, (4, 2), keep, position_ids=positions)[1], expected[1])


@pytest.mark.parametrize("family", CAUSAL)
def test_room_grows_by_doubling(family, models):
    model, cache = models[family], Cache(room=2)
    rooms = set()
    with no_grad():
        for t in range(18):
            model(token_ids(1, 1), cache=cache)
            rooms.add(cache._layers[0].k.shape[-2])
            assert cache.length == t + 1 and cache.nbytes == sum(2 * layer.k.nbytes for layer in cache._layers)
    assert rooms == {64} and len(cache._layers) == 2
    layer = cache._layers[0]
    copied, layer.room = 0, 1
    k = minilora.Tensor(np.zeros((1, *layer.k.shape[1:-2], 1, layer.k.shape[-1])))
    for t in range(1000):
        before = layer.k
        layer.length = 18 + t
        all_k, _ = layer.extend(k, k)
        assert all_k.shape[-2] == 19 + t and np.shares_memory(all_k.data, layer.k)
        copied += layer.length if layer.k is not before else 0
    assert copied < 2 * 1018


@pytest.mark.parametrize("family", CAUSAL)
def test_a_copy_goes_its_own_way(family, models):
    model, ids = models[family], token_ids(2, 6)
    for copied in (copy.copy, copy.deepcopy):
        cache = Cache()
        read(model, ids[:, :4], (4,), cache=cache)
        other = copied(cache)
        a, b = ids[:, 4:], ids[:, 4:] % (V - 1) + 1
        with no_grad():
            first = fetch(model(a, cache=cache))
            second = fetch(model(b, cache=other))
        assert_close(first, fetch(model(ids))[:, 4:])
        assert_close(second, fetch(model(np.concatenate([ids[:, :4], b], axis=1)))[:, 4:])
    assert repr(copied(Cache())) == "Cache(0 tokens, 0 bytes)"
    with pytest.raises(StateError, match="not pickled"):
        pickle.dumps(cache)


@pytest.mark.parametrize("family", CAUSAL)
def test_what_does_not_fit_changes_nothing(family, models):
    model, other, ids = models[family], build(family), token_ids(2, 4)
    cache = Cache()
    with pytest.raises(GraphError, match=r"with minilora\.no_grad\(\):"):
        model(ids, cache=cache)
    read(model, ids[:, :3], (3,), np.array([[0, 1, 1], [1, 1, 1]]), cache=cache)
    held = [layer.k.copy() for layer in cache._layers]
    new = ids[:, 3:]
    with no_grad():
        with pytest.raises(StateError, match="another model"):
            other(new, cache=cache)
        with pytest.raises(StateError, match="another model"):
            copy.deepcopy(model)(new, cache=cache)
        for wrong in (token_ids(3, 1), token_ids(1), token_ids(1, 2, 1)):
            with pytest.raises(ShapeError, match=r"holds a batch \(2,\).*give new tokens of every text"):
                model(wrong, cache=cache)
        with pytest.raises(ShapeError, match=r"for the new ids, \(2, 1\), got bool \(2, 4\): .*is remembered"):
            model(new, key_padding=np.ones((2, 4), bool), cache=cache)
        with pytest.raises(OutOfRangeError):
            model(np.full((2, 1), V), cache=cache)
        with pytest.raises(DTypeError, match="expected a minilora.models.Cache, got dict"):
            model(new, cache={})
        if family == "gpt2":
            with pytest.raises(ShapeError, match="18 tokens after 3 in the cache, but the model has a vector for 20"):
                model(token_ids(2, 18), cache=cache)
        last = cache._layers[-1]
        half = last.v.astype("float32")
        last.v, kept = half, last.v  # an error in the last layer, when the first have written
        with pytest.raises(StateError, match=r"holds float32 on the cpu, and the model now gives float64 .*was it moved"):
            model(new, cache=cache)
        last.v = kept
        assert cache.length == 3
        for layer, k in zip(cache._layers, held):
            np.testing.assert_array_equal(layer.k[..., :3, :], k[..., :3, :])
        got = fetch(model(new, cache=cache))
    assert_close(got, fetch(model(ids, key_padding=np.array([[0, 1, 1, 1], [1, 1, 1, 1]])))[:, 3:])


@pytest.mark.parametrize("family", CAUSAL)
def test_a_failed_first_call_leaves_the_cache_new(family, models):
    model, cache = models[family], Cache()
    last = list(model.model.layers if family == "llama" else model.h)[-1]

    def fail(*args, **kwargs):
        raise ShapeError("planted")
    last.forward = fail
    try:
        with no_grad(), pytest.raises(ShapeError, match="planted"):
            model(token_ids(3, 2), cache=cache)
    finally:
        del last.forward
    assert cache.length == 0
    other = build(family)
    assert_close(read(other, token_ids(2, 4), (2, 2), cache=cache), fetch(other(token_ids(2, 4))))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_loss_can_be_measured_with_a_cache(family, models):
    with no_grad():
        ids = token_ids(2, 5)
        assert models[family].loss(ids, ids, cache=Cache()).item() == pytest.approx(models[family].loss(ids, ids).item())


def test_room_is_a_number():
    with pytest.raises(minilora.errors.ConfigError, match="room must be an int >= 0"):
        Cache(-1)
    assert P < 20 and D == 32
