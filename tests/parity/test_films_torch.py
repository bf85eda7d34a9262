"""The training of demos/film_reviews.py in torch + transformers + peft: the same batches, the same start, the same losses.

The real model and sentences, where MINILORA_FILM_MODEL and MINILORA_FILM_DATA name them (demos/film_reviews.py says how to get
them); a tiny random one always. The whole real run, with accuracies: film_training.py beside this file.
"""
import os

import numpy as np
import pytest
from film_training import TARGETS, demo_pieces, our_answers, ours, peft_model, start, their_answers, theirs
from in_double import import_transformers
from test_torch import torch  # noqa: F401  (a fixture)

from minilora import formats, models, train

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

film_data = demo_pieces()


@pytest.fixture(scope="module")
def peft():
    import_transformers()
    return pytest.importorskip("peft")


def both(folder, films, side, settings, out, dtype, r):
    """(loss, norm) of every step on both sides, and both models."""
    model = start(folder, side, r=r, dtype=dtype)
    formats.save_adapter(model, out / "first")
    other = peft_model(folder, out / "first", dtype, trainable=True)
    return ours(model, films.parts["train"], settings), theirs(other, films.parts["train"], settings), model, other


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("side", TARGETS)
def test_tiny_in_double(side, clip, tmp_path, torch, peft):  # noqa: F811
    """float64: what is not the same arithmetic would show. torch divides by norm + 1e-6 where it clips: hence two bounds."""
    folder, films = film_data.made_up_encoder(str(tmp_path / "model"), 0)
    settings = train.Settings(steps=40, batch_size=16, learning_rate=5e-3, schedule="linear", warmup=0.06, weight_decay=0.01,
                              max_grad_norm=clip)
    one, two, model, other = both(folder, films, side, settings, tmp_path, "float64", 2)
    bound = 1e-9 if clip is None else 1e-5  # relative; the rounding of 40 steps, and 1e-6 / 0.3 in what Adam's eps sees
    np.testing.assert_allclose(one, two, rtol=bound)
    assert one[-1][0] < 0.9 * one[0][0]
    test = films.parts["test"]
    first, second = our_answers(model, test), their_answers(other, test)
    assert np.abs(first - second).max() <= 10 * bound * np.abs(first).max()
    formats.save_adapter(model, tmp_path / "trained")
    moved = their_answers(peft_model(folder, tmp_path / "trained", "float64"), test)
    assert np.abs(first - moved).max() <= 1e-12 * np.abs(first).max() and np.array_equal(first.argmax(1), moved.argmax(1))


def test_their_adapter_here(tmp_path, torch, peft):  # noqa: F811
    """peft trains and saves; the same answers here."""
    folder, films = film_data.made_up_encoder(str(tmp_path / "model"), 0)
    settings = train.Settings(steps=5, batch_size=16, learning_rate=5e-3, schedule="linear", warmup=0.0)
    _, _, _, other = both(folder, films, "query_value", settings, tmp_path, "float64", 2)
    other.save_pretrained(tmp_path / "theirs")
    own = models.load(folder, head="sentence_classification", labels=["negative", "positive"], rng=5, dtype="float64")
    formats.load_adapter(own, tmp_path / "theirs")
    first, second = (answers(model, films.parts["test"]) for answers, model in ((our_answers, own), (their_answers, other)))
    assert np.abs(first - second).max() <= 1e-12 * np.abs(first).max()


@pytest.mark.parametrize("side", TARGETS)
def test_the_real_one(side, tmp_path, torch, peft):  # noqa: F811
    """float32, 8 steps: as near as two runs of ours whose rounding differs, the batch whole or in two parts.

    Adam divides by the root of the second moment: where a gradient is only rounding, the step's sign is too, and the losses
    drift apart, ours from ours no less than ours from torch's. So the bound is 10 times that drift, and at least 2e-5, what
    six layers round in a first loss of 0.7.
    """
    pytest.importorskip("tokenizers")
    where = [os.environ.get(f"MINILORA_FILM_{name}", "") for name in ("MODEL", "DATA")]
    if not all(map(os.path.exists, where)):
        pytest.skip("MINILORA_FILM_MODEL and MINILORA_FILM_DATA do not name what demos/film_reviews.py says how to get")
    folder, name = film_data.read_encoder(where[0], str(tmp_path / "model"))
    films = film_data.Films(film_data.read_reviews(where[1]), models.Tokenizer(folder), name,
                            {"test": 64, "valid": 1, "train": 3000})
    settings = {threads: train.Settings(steps=8, batch_size=32, learning_rate=1e-3, schedule="linear", warmup=0.06,
                                        threads=threads) for threads in (1, 2)}
    one, two, model, other = both(folder, films, side, settings[1], tmp_path, "float32", 8)
    again = ours(start(folder, side), films.parts["train"], settings[2])
    (own, torchs, parts) = (np.array(found)[:, 0] for found in (one, two, again))
    drift = np.maximum.accumulate(np.abs(own - parts))
    assert (np.abs(own - torchs) <= np.maximum(10 * drift, 2e-5)).all(), (own - torchs, drift)
    formats.save_adapter(model, tmp_path / "trained")
    first, moved = our_answers(model, films.parts["test"]), their_answers(
        peft_model(folder, tmp_path / "trained", "float32"), films.parts["test"])
    assert np.abs(first - moved).max() <= 1e-4 * max(1.0, np.abs(first).max())
