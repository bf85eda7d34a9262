"""The noise of a diffusion: the schedules, what is drawn for a row, and whether the mixture has the moments that it should."""
import math

import numpy as np
import pytest

from minilora import models
from minilora.errors import ConfigError, OutOfRangeError, ShapeError
from minilora.train.data import Arrays, Redrawn


def test_linear_is_that_of_the_paper():
    schedule = models.NoiseSchedule(1000, "linear")
    expected = np.array([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)])
    np.testing.assert_allclose(schedule.betas, expected, rtol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], math.prod(1 - expected), rtol=1e-10)


def test_cosine_is_the_square_of_one():
    T, schedule = 50, models.NoiseSchedule(50, "cosine")

    def g(u):
        return math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], [g(t + 1) / g(0) for t in range(T - 1)], rtol=1e-9)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [20, 77, 1000])
def test_what_holds_for_every_schedule(kind, steps):
    schedule = models.NoiseSchedule(steps, kind)
    assert ((0 < schedule.betas) & (schedule.betas < 1)).all() and (np.diff(schedule.betas) >= 0).all()
    np.testing.assert_allclose(schedule.signal ** 2 + schedule.noise ** 2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(schedule.signal ** 2, np.cumprod(1 - schedule.betas), rtol=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.5


def test_mixtures():
    schedule, rng = models.NoiseSchedule(100), np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 3, 1, 4, 4)).astype("float32")
    t = np.array([0, 50, 99])
    mixed = schedule.noised(x, t, noise)
    assert mixed.dtype == "float32"
    for i, step in enumerate(t):
        expected = math.sqrt(schedule.alphas_cumprod[step]) * x[i] + math.sqrt(1 - schedule.alphas_cumprod[step]) * noise[i]
        np.testing.assert_allclose(mixed[i], expected, atol=1e-6)
        assert np.array_equal(schedule.noised(x[i], step, noise[i]), mixed[i])
    assert schedule.noised(x[:0], t[:0], noise[:0]).shape == (0, 1, 4, 4)
    with pytest.raises(ShapeError):
        schedule.noised(x, t[:2], noise)
    with pytest.raises(ShapeError):
        schedule.noised(x, t, noise[:, :, 1:])
    for wrong in (t + 1, -t, t / 2):
        with pytest.raises(OutOfRangeError, match="ints from 0 to 99"):
            schedule.noised(x, wrong, noise)


def test_the_steps_of_a_sampler():
    schedule = models.NoiseSchedule(100)
    assert schedule.path(1).tolist() == [99] and schedule.path(2).tolist() == [99, 0]
    assert schedule.path(100).tolist() == list(range(99, -1, -1))
    assert (np.diff(schedule.path(37)) < 0).all()
    for wrong in (0, 101, 2.0, True):
        with pytest.raises(ConfigError):
            schedule.path(wrong)


@pytest.mark.parametrize(("args", "said"), [((19,), "steps must be an int >= 20"), ((100, "square"), "linear, cosine"),
                                            ((True,), "steps")])
def test_schedules_that_are_refused(args, said):
    with pytest.raises(ConfigError, match=said):
        models.NoiseSchedule(*args)


def rows(n=400):
    return Arrays(x=np.full((n, 1, 2, 2), 0.5, "float32"), labels=np.arange(n) % 10)


def test_draws_are_a_function_of_seed_row_and_epoch():
    schedule = models.NoiseSchedule()
    data = Redrawn(rows(), models.NoisedRow(schedule, 10, 0.5), seed=4)
    batch = data.batch([7, 3, 407]).inputs
    alone = Redrawn(rows(), models.NoisedRow(schedule, 10, 0.5), seed=4).batch([3]).inputs
    assert all(np.array_equal(batch[name][1], alone[name][0]) for name in batch)
    assert batch["t"][0] != batch["t"][2] or not np.array_equal(batch["noise"][0], batch["noise"][2])  # another epoch
    np.testing.assert_array_equal(batch["x"], schedule.noised(np.full((3, 1, 2, 2), 0.5, "float32"), batch["t"], batch["noise"]))
    never = Redrawn(rows(), models.NoisedRow(schedule), seed=4).batch([7, 3, 407]).inputs
    assert np.array_equal(never["noise"], batch["noise"]) and never["labels"].tolist() == [7, 3, 7]


def test_moments_of_what_is_drawn():
    batch = Redrawn(rows(4000), models.NoisedRow(models.NoiseSchedule(), 10, 0.25)).batch(range(4000)).inputs
    assert abs(batch["noise"].mean()) < 0.03 and abs(batch["noise"].std() - 1) < 0.02
    assert abs(batch["t"].mean() / 999 - 0.5) < 0.02 and abs((batch["labels"] == 10).mean() - 0.25) < 0.03


def test_drop_out_of_range():
    with pytest.raises(ConfigError, match="drop"):
        models.NoisedRow(models.NoiseSchedule(), 10, 1.0)
