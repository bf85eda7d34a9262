"""The sampler: against the formulas written once more, and against a network that knows the answer."""
import math

import numpy as np
import pytest
from conftest import PROOF, fetch, place
from test_unet import KINDS, drawn

from minilora import lora, models, no_grad
from minilora.errors import ConfigError, OutOfRangeError, ShapeError

SCHEDULE = models.NoiseSchedule(60)


def by_hand(model, labels, steps, guidance, start):
    """Algorithm and formulas in float64, image by image, with nothing of the sampler's."""
    abar, path = SCHEDULE.alphas_cumprod, np.linspace(59, 0, steps).round().astype(int)
    images = []
    with no_grad():
        for x, label in zip(start.astype("float64"), labels):
            for i, t in enumerate(path):
                def noise(c):
                    return fetch(model(place(x[None]), [t], [c]))[0]
                e = noise(3) + guidance * (noise(label) - noise(3))
                x0 = np.clip((x - math.sqrt(1 - abar[t]) * e) / math.sqrt(abar[t]), -1, 1)
                e = (x - math.sqrt(abar[t]) * x0) / math.sqrt(1 - abar[t])
                x = math.sqrt(abar[path[i + 1]]) * x0 + math.sqrt(1 - abar[path[i + 1]]) * e if i + 1 < steps else x0
            images.append(x)
    return np.array(images)


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 7])
@PROOF
def test_against_the_formulas(steps, guidance, device):
    model, labels = drawn("classes"), [0, 2, 1]
    start = np.random.default_rng(0).standard_normal((3, 1, 4, 4))
    made = models.ddim(model, SCHEDULE, labels, steps=steps, guidance=guidance, rng=0)
    np.testing.assert_allclose(made, by_hand(model, labels, steps, guidance, start), atol=1e-9)
    assert abs(made).max() <= 1.0


def test_seeds_and_batches(device):
    model, labels = drawn("classes", "float32"), np.arange(7) % 3

    def sample(**more):
        return models.ddim(model, SCHEDULE, labels, steps=4, **{"rng": 5, **more})
    first = sample()
    assert first.dtype == "float32" and np.array_equal(first, sample()) and not np.array_equal(first, sample(rng=6))
    np.testing.assert_allclose(sample(batch_size=2, threads=2), first, atol=1e-4)
    assert np.array_equal(sample(batch_size=2, threads=2), sample(batch_size=2, threads=1))
    noise = np.random.default_rng(5).standard_normal((7, 1, 4, 4))
    assert np.array_equal(sample(noise=noise), first)
    assert models.ddim(model, SCHEDULE, [], steps=2).shape == (0, 1, 4, 4)


def test_a_network_that_knows_the_image_gives_it():
    """With e the true noise of a fixed image, every path ends at that image."""
    image = np.random.default_rng(2).uniform(-0.9, 0.9, (1, 1, 4, 4))

    class Knows(models.UNet):
        def forward(self, x, t, labels=None):
            t = int(t[0])
            return (x - place(image * SCHEDULE.signal[t])) / float(SCHEDULE.noise[t])
    model = Knows(models.UNetConfig(sample_size=4, block_out_channels=(4,), norm_num_groups=2, attention_head_dim=2),
                  dtype="float64", rng=0)
    for steps in (1, 3, 60):
        np.testing.assert_allclose(models.ddim(model, SCHEDULE, 2, steps=steps), np.repeat(image, 2, 0), atol=1e-6)


def test_adapters_at_their_weights(device):
    """Weight 0 is the base to the bit; a mixture is the sum of the updates."""
    model = drawn("classes")
    base = models.ddim(model, SCHEDULE, [0, 1], steps=3)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        lora.inject(model, lora.Config(r=2, lora_alpha=2, target_modules=["conv1", "to_q"]), name, rng=1)
        for path, p in model.named_parameters():
            if f".adapters.{name}." in path:
                p.data = place(rng.normal(0, 0.2, p.shape))

    def sample(*names, **more):
        lora.activate(model, *names, trainable=False, **more)
        return models.ddim(model, SCHEDULE, [0, 1], steps=3)
    assert np.array_equal(sample(), base)
    np.testing.assert_allclose(sample("a", "b", weights=[0.0, 0.0]), base, atol=1e-12)
    assert abs(sample("a") - base).max() > 1e-3 < abs(sample("a", weights=[1.5]) - sample("a")).max()
    mixed = sample("a", "b", weights=[0.5, 1.25])
    lora.merge(model)
    np.testing.assert_allclose(models.ddim(model, SCHEDULE, [0, 1], steps=3), mixed, atol=1e-9)
    lora.unmerge(model)


def test_what_is_refused():
    model, plain = drawn("classes", "float32"), drawn("no classes", "float32")
    for error, call, said in [
        (ConfigError, lambda: models.ddim(drawn("unguided"), SCHEDULE, [0], guidance=2.0), "guidance=2 needs a model"),
        (ConfigError, lambda: models.ddim(plain, SCHEDULE, [0, 1]), "expected the number of images"),
        (ConfigError, lambda: models.ddim(model, SCHEDULE, [0], guidance=-1.0), "guidance must be a number"),
        (ConfigError, lambda: models.ddim(model, SCHEDULE, [0], steps=61), "at most the 60 steps"),
        (ConfigError, lambda: models.ddim(model, SCHEDULE, [0], batch_size=0), "batch_size"),
        (OutOfRangeError, lambda: models.ddim(model, SCHEDULE, [4]), "label 4"),
        (ShapeError, lambda: models.ddim(model, SCHEDULE, [[0]]), "a label for each image"),
        (ShapeError, lambda: models.ddim(model, SCHEDULE, [0], noise=np.zeros((2, 1, 4, 4))), "for 1 images"),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert said in str(caught.value), caught.value
    assert KINDS["no classes"].any_class is None
