"""Rows of tokens, and plain arrays, as the loop takes them: order, batches, fingerprints."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import place
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.errors import ConfigError, DTypeError, ShapeError
from minilora.train import Settings, fit
from minilora.train.data import Arrays, Tokens

ROOT = Path(__file__).resolve().parents[3]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


def tokens(lengths, **options):
    return Tokens([[1 + (i + j) % 50 for j in range(n)] for i, n in enumerate(lengths)], **options)


def arrays(n):
    return Arrays(x=np.arange(2.0 * n).reshape(n, 2), y=np.arange(n))


def test_few_lengths():
    """Four in every octave, at most a quarter longer, none beyond max_length, and another fingerprint."""
    n = np.concatenate([np.arange(1, 200), [256, 257, 1023, 2048]])
    every, few = tokens(n), tokens(n, few_lengths=True)
    widths = [[data.batch([i]).inputs["ids"].shape[1] for i in range(len(n))] for data in (every, few)]
    assert sorted(set(widths[1][:128])) == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert widths[1][128:130] == [160, 160] and widths[1][-4:] == [256, 320, 1024, 2048]
    for length, one, other in zip(n, *widths):
        assert one <= other <= max(1.25 * length, length + 7) and (other == one or length > 64)
    assert tokens([70], few_lengths=True, max_length=70).batch([0]).inputs["ids"].shape == (1, 70)
    assert every.fingerprint != few.fingerprint


@given(lengths=LENGTHS, seed=st.integers(0, 2 ** 64), epoch=st.integers(0, 1000), batch_size=st.integers(1, 40))
def test_every_row_once_an_epoch(lengths, seed, epoch, batch_size):
    n = len(lengths)
    for data in (tokens(lengths), arrays(n), Arrays(x=np.arange(n), drawn=False)):
        if batch_size > n:
            words = rf"batch_size={batch_size} is more than there are rows, {n}: give batch_size={n} or less"
            with pytest.raises(ConfigError, match=words):
                data.order(seed, epoch, batch_size)
            batch_size = n
        batches = data.order(seed, epoch, batch_size)
        assert sorted(i for batch in batches for i in batch) == list(range(n))
        assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1) and len(batches) == -(-n // batch_size)
        assert batches == data.order(seed, epoch, batch_size)
        assert sorted(i for batch in data.in_order(batch_size) for i in batch) == list(range(n))


def test_order_depends_on_seed_and_epoch_and_has_no_memory():
    for data in (tokens(range(1, 100)), arrays(99)):
        first = data.order(3, 1, 8)
        others = [data.order(3, 2, 8), data.order(4, 1, 8), data.order(1, 3, 8)]
        assert data.order(3, 1, 8) == first and all(other != first for other in others)


def test_rows_of_a_batch_are_of_about_one_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 2000)
    data = tokens(lengths)
    padded = sum(len(batch) * max(lengths[batch]) for batch in data.order(0, 0, 8))
    assert padded < 1.05 * lengths.sum()
    firsts = [lengths[batch].mean() for batch in data.order(0, 0, 8)]
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.2  # and batches do not come by length
    assert {tuple(sorted(batch)) for batch in data.order(0, 0, 8)}.isdisjoint({tuple(sorted(b)) for b in data.order(0, 1, 8)})


def test_evaluation_begins_with_the_longest():
    assert tokens([3, 9, 1, 9]).in_order(2) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
def test_nothing_depends_on_the_hash_seed(hash_seed):
    code = ("import numpy; from minilora.train.data import Arrays, Tokens\n"
            "a = Tokens([[1, 2], [3], [4, 5, 6]] * 20); b = Arrays(x=numpy.arange(60.0), y=numpy.arange(60))\n"
            "print(a.order(1, 2, 4), b.order(1, 2, 4), a.fingerprint, b.fingerprint)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)})
    a, b = Tokens([[1, 2], [3], [4, 5, 6]] * 20), Arrays(x=np.arange(60.0), y=np.arange(60))
    assert done.stdout == f"{a.order(1, 2, 4)} {b.order(1, 2, 4)} {a.fingerprint} {b.fingerprint}\n", done.stderr


@given(lengths=LENGTHS, data=st.data())
def test_a_batch_holds_its_rows(lengths, data):
    learned = [[tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))] for n in lengths]
    most = data.draw(st.sampled_from([None, max(lengths), max(lengths) + 3]))
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9))
    own = tokens(lengths, learned=learned, pad_id=7, max_length=most)
    batch = own.batch(rows)
    ids, mask, labels = (batch.inputs[name] for name in ("ids", "key_padding", "labels"))
    T = ids.shape[1]
    longest = max([1, *(lengths[i] for i in rows)])
    assert ids.shape == mask.shape == labels.shape == (len(rows), T) and longest <= T < longest + 8
    assert T % 8 == 0 or T == most
    for k, i in enumerate(rows):
        n, (low, high) = lengths[i], learned[i][0]
        assert ids[k, :n].tolist() == own.row(i).tolist() and (ids[k, n:] == 7).all()
        assert mask[k].tolist() == [True] * n + [False] * (T - n)
        assert (labels[k] == -100).tolist() == [not low <= j < high for j in range(T)]
        assert labels[k, low:high].tolist() == ids[k, low:high].tolist()
    assert batch.tokens == sum(lengths[i] for i in rows)
    count = sum(max(0, high - max(low, 1)) for i in rows for low, high in learned[i])
    assert batch.targets == own.targets(batch.inputs) == count
    assert own.total_targets == sum(own.batch([i]).targets for i in range(len(lengths)))


def test_targets_of_parts_add_up():
    own = tokens([5, 3, 8, 1], learned=[[(2, 5)], [(0, 3)], [(1, 2), (6, 8)], [(0, 1)]])
    inputs = own.batch([0, 1, 2, 3]).inputs
    parts = [{name: array[low:high] for name, array in inputs.items()} for low, high in ((0, 1), (1, 4), (4, 4))]
    assert [own.targets(part) for part in parts] == [3, 5, 0] and own.targets(inputs) == 8


def test_a_batch_of_no_rows():
    for data in (tokens([3, 2]), tokens([3, 2], answers=[0, 1]), arrays(2)):
        batch = data.batch([])
        assert batch.targets == batch.tokens == 0 and all(len(array) == 0 for array in batch.inputs.values())


@pytest.mark.parametrize(("answers", "dtype"), [
    ([2, 0], "int64"), (np.array([1, 0], "uint8"), "int64"), ([0.5, -1.0], "float32"), ([[0.0, 1.0], [1.0, 0.0]], "float32")])
def test_answers_take_the_place_of_tokens(answers, dtype):
    own = tokens([3, 2], answers=answers)
    batch = own.batch([1, 0])
    assert batch.inputs["labels"].dtype == dtype and batch.inputs["labels"].tolist() == np.asarray(answers)[::-1].tolist()
    assert batch.targets == own.total_targets == 2


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: Tokens([]), ShapeError, "there are no rows"),
    (lambda: Tokens([[1], [], [2]]), ShapeError, "row 1 has no tokens"),
    (lambda: Tokens([[1], ["a"]]), DTypeError, "whole numbers"),
    (lambda: Tokens([[1], [-1]]), DTypeError, "here are -1 to 1"),
    (lambda: Tokens([[1 << 31]]), DTypeError, "0 to 2\\^31 - 1"),
    (lambda: Tokens([[1]], answers=[1, 2]), ShapeError, "an answer for each of 1 rows"),
    (lambda: Tokens([[1]], answers=["a"]), ShapeError, "got <U1"),
    (lambda: Tokens([[1], [2]], answers=[0.0, float("nan")]), ConfigError, "the answer of row 1 is not finite"),
    (lambda: Tokens([[1]], pad_id=-1), ConfigError, "pad_id"),
    (lambda: Arrays(), ShapeError, "got none"),
    (lambda: Arrays(x=np.zeros(3), y=np.zeros(2)), ShapeError, "x with 3, y with 2"),
    (lambda: Arrays(x=np.zeros((0, 3))), ShapeError, "x with 0"),
    (lambda: Arrays(x=5.0), ShapeError, "x must have rows, got a single number"),
    (lambda: Arrays(x=np.array(["a"])), DTypeError, "x must be an array of numbers, got <U1"),
    (lambda: Arrays(x=np.array([None])), DTypeError, "got object"),
    (lambda: Arrays(x=np.ma.masked_array([1.0, 2.0], [True, False])), DTypeError, "x has a mask, which would be lost"),
    (lambda: Arrays(x=np.array([1j])), DTypeError, "got complex128"),
])
def test_what_makes_no_data(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_that_are_not_finite_are_found_when_data_is_made(number, dtype):
    x, y = np.zeros((9, 4), dtype), np.ones(9, dtype)
    x[5, 2] = x[7, 0] = y[3] = number
    with pytest.raises(ConfigError) as caught:
        Arrays(x=x, y=y, allow_nonfinite=False)
    assert (f"x: 2 numbers are not finite, the first in row 5, column 2 ({number}); y: 1 number is not finite, the first in "
            f"row 3 ({number}).") in str(caught.value)
    data = Arrays(x=x, y=y, allow_nonfinite=True)
    np.testing.assert_array_equal(data.batch([5]).inputs["x"], x[[5]])
    images = np.zeros((3, 2, 2), dtype)
    images[1, 0, 1] = number
    with pytest.raises(ConfigError, match=r"the first in row 1, column \(0, 1\)"):
        Arrays(images=images)


def test_columns_that_say_nothing_are_noted():
    x = np.arange(20.0).reshape(4, 5)
    assert Arrays(x=x, y=[1, 2, 3, 4]).notes == []
    x[:, 3] = 2.0
    assert Arrays(x=x, y=np.full(4, 7)).notes == ["x: column 3 the same in every row",
                                                  "y is 7 in every row: there is nothing to learn from it"]
    assert Arrays(x=np.zeros((4, 8))).notes == ["x: columns 0, 1, 2, 3, 4 and 3 more the same in every row"]
    assert Arrays(x=np.zeros((1, 8))).notes == [] == Arrays(x=np.zeros((4, 0))).notes  # one row is no evidence


def test_arrays_of_all_kinds():
    read_only = np.arange(6.0, dtype="float16").reshape(3, 2)
    read_only.flags.writeable = False
    data = Arrays(drawn=False, half=read_only, strided=np.arange(12)[::4], flags=np.array([True, False, True]),
                  names_=[1, 2, 3], swapped=np.arange(3, dtype=">f4"), tensor=minilora.tensor([1.0, 2.0, 3.0]))
    inputs = data.batch([2, 0]).inputs
    assert inputs["half"].tolist() == [[4.0, 5.0], [0.0, 1.0]] and inputs["strided"].tolist() == [8, 0]
    assert inputs["flags"].tolist() == [True, True] and inputs["names_"].tolist() == [3, 1]
    assert inputs["swapped"].tolist() == [2.0, 0.0] and inputs["tensor"].tolist() == [3.0, 1.0]
    inputs["half"][:] = 0.0
    assert read_only[2, 1] == 5.0 and data.order(0, 0, 2) == [[0, 1], [2]]


def test_arrays_of_a_device_are_copied_to_the_host(device):
    x = np.arange(6.0, dtype="float32").reshape(3, 2)
    for value in (place(x), minilora.tensor(x), minilora.Parameter(x), x, x.tolist()):
        data = Arrays(x=value)
        assert type(data.arrays["x"]) is np.ndarray and data.arrays["x"].tolist() == x.tolist()


def test_a_file_mapped_into_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    data = Arrays(x=np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert data.batch([2]).inputs["x"].tolist() == [[4.0, 5.0]] and data.fingerprint == Arrays(
        x=np.arange(6.0).reshape(3, 2)).fingerprint


def test_arrays_of_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(6).astype(ml_dtypes.bfloat16)
    assert Arrays(x=x).batch([1]).inputs["x"].dtype == x.dtype and len(Arrays(x=x).fingerprint) == 64
    x[2] = np.nan
    with pytest.raises(ConfigError, match="row 2"):
        Arrays(x=x)


def test_fingerprints_tell_data_apart():
    x, y = np.arange(6.0).reshape(3, 2), np.arange(3)
    same = [Arrays(x=x, y=y), Arrays(x=np.asfortranarray(x), y=y.copy())]
    other = [Arrays(y=y, x=x), Arrays(x=x.astype("float32"), y=y), Arrays(x=x + [[0, 0], [0, 0], [0, 1]], y=y), Arrays(x=x),
             Arrays(x=x.reshape(3, 2, 1), y=y), Arrays(x=x, y=y, drawn=False)]
    assert same[0].fingerprint == same[1].fingerprint
    assert len({data.fingerprint for data in (same[0], *other)}) == 1 + len(other)
    rows = [[1, 2, 3], [4, 5]]
    all_of_them = [Tokens(rows), Tokens([[1, 2], [3, 4, 5]]), Tokens(rows, pad_id=1), Tokens(rows, [[(1, 3)], [(0, 2)]]),
                   Tokens(rows, max_length=8), Tokens(rows, answers=[0, 1]), Tokens(rows, answers=[0.0, 1.0]),
                   Tokens(rows[::-1])]
    assert len({data.fingerprint for data in all_of_them}) == len(all_of_them)
    assert Tokens(np.array([[1, 2], [3, 4]])).fingerprint == Tokens([[1, 2], (3, 4)]).fingerprint


def test_copies_and_pickles_are_the_same_data():
    for data in (tokens([3, 2, 9], answers=[1, 0, 1]), arrays(5)):
        again = pickle.loads(pickle.dumps(data))
        assert again.fingerprint == data.fingerprint and again.order(1, 1, 2) == data.order(1, 1, 2)
        assert repr(again) == repr(data)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_learns_from_it(threads):
    config = minilora.nn.GPT2Config(vocab_size=12, n_positions=10, n_embd=16, n_layer=1, n_head=2)
    model = minilora.nn.GPT2(config, rng=0)
    rows = [[1 + (start + j) % 5 for j in range(3 + start % 7)] for start in range(40)]
    data = Tokens(rows, [[(1, len(row))] for row in rows], max_length=10)
    result = fit(model, data, Settings(epochs=12, batch_size=8, learning_rate=0.02, threads=threads, steps_per_report=5))
    assert result.losses[-1][1] < 0.3 * result.losses[0][1] and result.step == 60


def test_arrays_train_a_plain_layer():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 3)).astype("float32")
    data = Arrays(x=x, y=x @ np.array([[1.0], [2.0], [3.0]], "float32"))
    layer = minilora.nn.Linear(3, 1, rng=0)
    result = fit(layer, data, Settings(steps=150, batch_size=10, learning_rate=0.1), loss=lambda model, batch: minilora.ops.mse(
        model(minilora.tensor(batch["x"])), minilora.tensor(batch["y"])))
    assert result.losses[-1][1] < 1e-3
