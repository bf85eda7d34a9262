"""Sums over rows with equal ids on a GPU: the bits of those that are planned on the host, whatever ids, shapes and threads."""
import emulator
import numpy as np
import pytest
import standin
from conftest import fetch, need_gpu, place
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora import Parameter, backend, lora, nn, ops, optim
from minilora.lora.gradients.embedding import lora_embedding
from minilora.lora.gradients.tokens import token_embedding, token_head
from minilora.ops.embedding import add_up, plan_sums, planned


def expected(out, dy, ids, without):
    out = out.copy()
    add_up(out, dy, plan_sums(ids.reshape(-1), without))
    return out


def on_the_card(out, dy, ids, without, from_host):
    device = backend.current_device()
    placed = place(ids)
    plan, add = device.resolve(planned)(ids if from_host else placed, placed, without)
    add(out, dy, plan)
    return plan


def numbers(rng, shape, dtype):
    """Of many sizes, so that every other order of a sum gives other bits."""
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 5, shape)).astype(dtype)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), n=st.integers(0, 70), V=st.integers(1, 40), D=st.integers(0, 70), few=st.booleans(),
       dtype=st.sampled_from(["float32", "float64"]), without=st.sampled_from([None, 0, 3]), columns=st.booleans(),
       from_host=st.booleans(), threads=st.sampled_from([None, 1, 4, 64, 128]), grid=st.sampled_from([None, 1, 3]))
def test_the_bits_of_the_reference(card, seed, n, V, D, few, dtype, without, columns, from_host, threads, grid):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, min(V, 2 + few * V), n)
    dy, out = numbers(rng, (n, D), dtype), numbers(rng, (V, D), dtype)
    if card:
        card.threads, card.grid = threads, grid
    given_out = place(out.T.copy()).T if columns else place(out)
    on_the_card(given_out, place(dy.T.copy()).T if seed % 2 else place(dy), ids, without, from_host)
    assert fetch(given_out).tobytes() == expected(out, dy, ids, without).tobytes()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 31, 33, 100, 257])
def test_long_trees(card, n):
    """One id for all rows, among rows of others: as many numbers as threads share, one more, one less."""
    rng = np.random.default_rng(n)
    ids = np.zeros(n + 5, "int64")
    ids[rng.choice(n + 5, 5, replace=False)] = np.arange(1, 6)
    dy, out = numbers(rng, (n + 5, 33), "float32"), np.zeros((7, 33), "float32")
    got = place(out)
    on_the_card(got, place(dy), ids, None, True)
    assert fetch(got).tobytes() == expected(out, dy, ids, None).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "V", "D"), [(4096, 50257, 768), (20011, 300, 65), (9001, 1, 33)])
def test_sizes_of_a_training(n, V, D):
    """As GPT-2's; and long trees, of which one takes all threads of a block many times."""
    need_gpu()
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.geometric(0.01, n) - 1, V - 1)
    dy, out = numbers(rng, (n, D), "float32"), np.zeros((V, D), "float32")
    with backend.use("gpu"):
        got = place(out)
        on_the_card(got, place(dy), ids, None, True)
        assert fetch(got).tobytes() == expected(out, dy, ids, None).tobytes()


def test_ids_that_no_row_has_are_left_out(card):
    """On a card nobody looks at ids that lie there: nothing is written outside of the table."""
    got = place(np.ones((3, 2), "float32"))
    on_the_card(got, place(np.full((5, 2), 7, "float32")), np.array([-1, 3, 2, 2 ** 40, -2 ** 40]), None, False)
    assert fetch(got).tolist() == [[1, 1], [1, 1], [7, 7]]


def test_no_number_that_is_none_reaches_another_row(card):
    dy = np.ones((4, 3), "float32")
    dy[1] = np.nan
    got = place(np.zeros((3, 3), "float32"))
    on_the_card(got, place(dy), np.array([0, 1, 0, 1]), None, True)
    assert fetch(got)[0].tolist() == [2, 2, 2] and np.isnan(fetch(got)[1]).all() and not fetch(got)[2].any()


def test_complex_numbers_are_planned_on_the_host(card):
    rng = np.random.default_rng(0)
    dy, ids = rng.standard_normal((9, 2)) + 1j, rng.integers(0, 3, 9)
    got, out = place(np.zeros((4, 2), "complex128")), np.zeros((4, 2), "complex128")
    on_the_card(got, place(dy), ids, 2, True)
    assert fetch(got).tobytes() == expected(out, dy, ids, 2).tobytes()


CALLS = {
    "embedding": (lambda ids, W, A, B: ops.embedding(ids, W, padding_idx=1), (True, False, False)),
    "positions": (lambda ids, W, A, B: ops.embedding(np.arange(2, 8), W), (True, False, False)),
    "lora": (lambda ids, W, A, B: lora_embedding(ids, W, A, B, 0.5), (False, True, True)),
    "lora and table": (lambda ids, W, A, B: lora_embedding(ids, W, A, B, 0.5, padding_idx=2), (True, True, False)),
    "half": (lambda ids, W, A, B: ops.embedding(ids, ops.cast(W, "float16")), (True, False, False)),
}


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_the_operations(name, where, card):
    """Ids of the host and of the device give the bits of sums that are planned on the host."""
    call, trained = CALLS[name]
    rng = np.random.default_rng(0)
    hosts = [rng.standard_normal(shape).astype("float32") for shape in ((9, 4), (2, 9), (4, 2))]
    ids, results = rng.integers(0, 9, (3, 5)), []
    device = backend.current_device()
    cotangent = None
    for version in (device.resolve(planned), planned):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(device.versions, planned, version)
            inputs = [Parameter(place(a)) for a in hosts]
            for p, wanted in zip(inputs, trained):
                p.trainable = wanted
            y = call(ids if where == "host" else place(ids), *inputs)
            cotangent = rng.standard_normal(y.shape).astype(y.dtype) if cotangent is None else cotangent
            (y * place(cotangent)).sum().backward()
            results.append([fetch(p.grad).tobytes() for p in inputs if p.trainable])
    assert results[0] == results[1]


def test_nothing_is_copied_but_the_ids():
    """And nothing is waited for, where they lie on the device already."""
    with emulator.emulated_device():
        W = Parameter(place(np.ones((9, 4), "float32")))
        ids = np.array([3, 1, 3, 0])
        for given_ids, copies in ((ids, 1), (place(ids), 0)):
            with standin.counting() as counts:
                ops.embedding(given_ids, W).sum().backward()
            assert (counts.h2d, counts.syncs, counts.d2h) == (copies, 0, 0)


@pytest.mark.slow
def test_places_beyond_31_bits(tmp_path):
    """The last row of more than 2^31 numbers, into the last row of such a table: files that take no room."""
    D, R = 1 << 16, (1 << 15) + 1
    try:
        g, out = (np.memmap(tmp_path / name, "float32", "w+", shape=(R, D)) for name in ("g", "out"))
    except OSError as error:
        pytest.skip(f"no room for a sparse file: {error}")
    g[-1] = np.arange(D)
    ids, order, lengths = np.full(R, R - 1), np.array([R - 1]), np.array([1])
    kernel = emulator.emulator().kernel("embedding", "sums_by_id", "float")
    numbers = [np.array(value) for value in (-1, R, D, 1, 1, D)]
    kernel.start([g, ids, order, lengths, out, *numbers], D // 32, 32, 0, D // 32)
    assert (out[-1] == g[-1]).all() and not out[0].any()


# -- in recorded steps ---------------------------------------------------------------------------------------------------


class Tables(nn.Module):
    """Tokens, positions and a tied head."""

    def __init__(self, padding_idx=None):
        rng = np.random.default_rng(0)
        self.tokens = nn.Embedding(9, 6, padding_idx=padding_idx, rng=rng)
        self.places = nn.Embedding(12, 6, rng=rng)

    def forward(self, ids):
        T = ids.shape[-1]
        positions = backend.device_of(ids).xp.arange(T)
        h = self.tokens(ids) + self.places(positions)
        return ops.linear_cross_entropy(ops.reshape(h, (-1, 6)), self.tokens.weight, ids.reshape(-1))


@settings(max_examples=3)
@given(program=st.lists(st.tuples(st.sampled_from(["call", "call", "short", "other ids", "device", "freeze", "one row"]),
                                  st.integers(0, 9)), min_size=3, max_size=9), padding=st.sampled_from([None, 2]))
def test_programs_of_trained_tables(card, program, padding):
    """Calls with other ids and lengths, of the host and of the device, tables frozen between: the bits of called steps."""
    ends = []
    for record in (minilora.record, lambda step: step):
        model = Tables(padding)
        optimizer = optim.Adam(model.parameters(), lr=0.05)

        @record
        def step(ids):
            loss = model(ids)  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            return loss

        seen, rng = [], np.random.default_rng(1)
        for event, number in [("call", 0)] * 3 + program:
            ids = rng.integers(0, 9, (1 if event == "one row" else 2, 2 if event == "short" else 5))
            if event == "other ids":
                ids[:] = number % 9
            if event == "freeze":
                model.places.weight.trainable = number % 2 == 0
            seen.append(fetch(step(place(ids) if event == "device" else ids)).tobytes())
        ends.append((seen, [fetch(p).tobytes() for p in model.parameters()]))
        assert getattr(step, "graphs", 1) > 0
    assert ends[0] == ends[1]


def test_a_low_rank_update_of_a_tied_table_is_recorded(card):
    ends = []
    for record in (minilora.record, lambda step: step):
        model = nn.GPT2(nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2), rng=0)
        lora.inject(model, lora.Config(r=2, lora_alpha=4, target_modules=["wte", "c_attn"]), rng=0)
        optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.05)

        @record
        def step(ids):
            loss = model.loss(ids, ids)  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            return loss

        rng = np.random.default_rng(0)
        seen = [fetch(step(rng.integers(0, 11, (1, 4)))).tobytes() for _ in range(4)]
        ends.append((seen, [fetch(p).tobytes() for p in model.parameters()]))
    assert ends[0] == ends[1] and len(set(ends[0][0])) == 4


@pytest.mark.parametrize("padding", [None, 4, 1])
@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False)])
def test_replaced_rows_are_recorded(trained, padding, card):
    """Rows of a table that an adapter replaces, with ids of the host and of the device, and the head tied to them."""
    ends = []
    for record in (minilora.record, lambda step: step):
        rng = np.random.default_rng(0)
        W, T = (Parameter(place(rng.standard_normal((n, 3)), "float32"), trainable=t) for n, t in zip((7, 2), trained))
        optimizer = optim.Adam([p for p in (W, T) if p.trainable], lr=0.05)

        @record
        def step(ids):
            h = token_embedding(ids, W, T, [4, 0], padding)  # noqa: B023
            loss = (token_head(h, W, T, [4, 0]) * 0.5).sum()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            return loss

        seen = []
        for i in range(5):
            ids = rng.integers(0, 7, (2, 4))
            seen.append(fetch(step(place(ids) if i == 4 else ids)).tobytes())
        ends.append((seen, fetch(W).tobytes(), fetch(T).tobytes()))
    assert ends[0] == ends[1] and len(set(ends[0][0])) == 5
