"""The U-Net: names, shapes, gradients with adapters, what it refuses."""
import copy
import pickle

import numpy as np
import pytest
from conftest import fetch, place

from minilora import lora, models, nn, no_grad, ops, tensor
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError
from minilora.models.diffusion.blocks import sinusoids
from minilora.testing import gradcheck

TINY = dict(sample_size=4, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4)
KINDS = {
    "classes": models.UNetConfig(**TINY, classes=3),
    "unguided": models.UNetConfig(**TINY, classes=3, guided=False),
    "no classes": models.UNetConfig(**TINY, in_channels=2, out_channels=3),
    "one level": models.UNetConfig(sample_size=3, block_out_channels=(4,), norm_num_groups=2, attention_head_dim=2),
    "deep": models.UNetConfig(sample_size=8, block_out_channels=(4, 6, 8), norm_num_groups=2, attention_head_dim=8,
                              layers_per_block=2, classes=2),
}


def drawn(kind, dtype="float64"):
    """A model whose every parameter counts."""
    model, rng = models.UNet(KINDS[kind], dtype=dtype, rng=0), np.random.default_rng(7)
    for name, p in model.named_parameters():
        p.data = place(rng.normal(float("norm" in name and name.endswith("weight")), 0.3, p.shape), dtype)
    return model


def inputs(config, n=2, dtype="float64", seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, config.in_channels, config.sample_size, config.sample_size)).astype(dtype)
    labels = [] if config.classes is None else [rng.integers(0, config.embedded, n)]
    return [place(x), rng.integers(0, 1000, n), *labels]


def test_names_are_those_of_diffusers():
    names = {path for path, module in drawn("classes").named_modules() if not isinstance(module, (models.Group, models.UNet))}
    assert {"conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "class_embedding",
            "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj", "down_blocks.0.downsamplers.0.conv",
            "down_blocks.1.attentions.0.to_q", "down_blocks.1.resnets.0.conv_shortcut", "mid_block.resnets.1.norm2",
            "mid_block.attentions.0.to_out.0", "up_blocks.0.attentions.1.group_norm", "up_blocks.0.upsamplers.0.conv",
            "up_blocks.1.resnets.1.conv2"} <= names
    absent = "down_blocks.0.attentions", "up_blocks.1.attentions", "down_blocks.1.downsamplers", "up_blocks.1.upsamplers"
    assert not any(path.startswith(absent) for path in names)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_dtype(kind, device):
    model = drawn(kind, "float32")
    x, *told = inputs(model.config, dtype="float32")
    y = model(x, *told)
    assert y.shape == (2, model.config.out_channels, *x.shape[2:]) and y.dtype == "float32"
    assert model(x[:0], *(each[:0] for each in told)).shape == (0, *y.shape[1:])
    one = fetch(model(x[:1], *(each[:1] for each in told)))
    np.testing.assert_allclose(one, fetch(y)[:1], atol=1e-5)  # no image sees another


def test_it_starts_with_no_noise_and_one_seed_gives_one_model(device):
    config = KINDS["classes"]
    model, again = (models.UNet(config, rng=3) for _ in range(2))
    assert not fetch(model(*inputs(config, dtype="float32"))).any()
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert np.array_equal(fetch(p), fetch(q)), name
    with nn.undrawn():
        empty = models.UNet(config)
    empty.load_state_dict(model.state_dict())
    assert empty.state_dict().keys() == model.state_dict().keys()


def test_step_and_class_count(device):
    model = drawn("classes")
    x, t, labels = inputs(model.config)
    y = fetch(model(x, t, labels))
    assert abs(fetch(model(x, t + 1, labels)) - y).max() > 1e-6 < abs(fetch(model(x, t, (labels + 1) % 4)) - y).max()
    assert np.array_equal(fetch(model(tensor(x), t.astype("uint16"), labels.tolist())), y)


def test_gradients_of_the_whole_with_adapters():
    """< 1e-9 for every parameter, base and adapters, on convolutions and attention."""
    model = drawn("classes")
    config = lora.Config(r=2, lora_alpha=3, target_modules=["conv1", "conv2", "conv_in", "conv", "to_q", "to_v", "to_out.0",
                                                            "time_emb_proj", "conv_shortcut", "class_embedding"])
    lora.inject(model, config, rng=0)
    model.requires_grad()
    rng = np.random.default_rng(3)
    for path, p in model.named_parameters():
        if ".adapters." in path:
            p.data = place(rng.normal(0.0, 0.3, p.shape))
    x, t, labels = inputs(model.config)
    report = gradcheck(lambda x, noise: ops.mse(model(x, t, labels), noise), fetch(x), rng.standard_normal(x.shape),
                       parameters=model.named_parameters(), full_size=4, directions=1)
    report.check()
    assert len(report.rows) > 100 and max(row.error for row in report.rows) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_image(kind):
    model = drawn(kind).requires_grad(False)
    x, *told = inputs(model.config)
    report = gradcheck(lambda x: model(x, *told), x, parameters=model.named_parameters(), full_size=8, directions=3)
    report.check()


def test_waves():
    waves = sinusoids(np.array([0, 1, 999]), 6, "float64")
    for t, row in zip((0, 1, 999), waves):
        angles = [t / 10000 ** (2 * i / 6) for i in range(3)]
        np.testing.assert_allclose(row, [*np.cos(angles), *np.sin(angles)], atol=1e-12)


def test_copies_and_pickles():
    model = drawn("classes")
    args = inputs(model.config)
    with no_grad():
        expected = fetch(model(*args))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert np.array_equal(fetch(other(*args)), expected)


def test_what_was_seen_on_the_way_down_is_used_on_the_way_up():
    """Each residual block of the way up reads one that waits: without it the image's gradient is another."""
    model = drawn("deep")
    widths = [[resnet.conv1.in_channels for resnet in block.resnets] for block in model.up_blocks]
    assert widths == [[16, 16, 14], [14, 12, 10], [10, 8, 8]]
    assert [resnet.conv1.out_channels for block in model.up_blocks for resnet in block.resnets] == [8] * 3 + [6] * 3 + [4] * 3


@pytest.mark.parametrize(("change", "said"), [
    ({"sample_size": 5}, "sample_size must be a multiple of 2 for 2 levels"),
    ({"block_out_channels": ()}, "must hold the channels of each level"),
    ({"block_out_channels": (4, 0)}, r"block_out_channels\[1\] must be an int >= 1"),
    ({"block_out_channels": (4, 9)}, r"block_out_channels\[1\] must be a multiple of norm_num_groups"),
    ({"block_out_channels": (5, 10), "norm_num_groups": 5}, "must be even"),
    ({"attention_head_dim": 3}, "must divide the last"),
    ({"classes": 0}, "classes must be an int >= 1"),
    ({"guided": 1}, "guided must be True or False"),
    ({"norm_eps": 0.0}, "norm_eps must be a finite number above 0"),
])
def test_configs_that_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        models.UNetConfig(**{**TINY, **change})


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        models.UNetConfig(sample_size=5, block_out_channels=(3, 9), norm_num_groups=4, attention_head_dim=4)
    assert len(str(caught.value).splitlines()) == 5


def test_inputs_that_are_refused(device):
    model = drawn("classes", "float32")
    x, t, labels = inputs(model.config, dtype="float32")
    for error, args, said in [
        (ShapeError, (x[:, 0], t, labels), "expected images (N, 1, 4, 4)"),
        (ShapeError, (x[:, :, :2], t, labels), "another size"),
        (ShapeError, (x, t[:1], labels[:1]), "expected one for each of the 2 images, got steps (1,) and labels (1,)"),
        (ConfigError, (x, t), "give the label of each image"),
        (DTypeError, (x, t / 2, labels), "steps must be integers"),
        (OutOfRangeError, (x, -t - 1, labels), "step"),
        (OutOfRangeError, (x, t, labels + 10), "label"),
    ]:
        with pytest.raises(error) as caught:
            model(*args)
        assert said in str(caught.value), caught.value
    with pytest.raises(ConfigError, match="takes no labels"):
        drawn("no classes")(*inputs(KINDS["no classes"]), [0, 0])


def test_the_loss_is_the_mean_square(device):
    config = models.UNetConfig(**TINY)
    model = models.UNet(config, dtype="float64", rng=0)
    for p in model.parameters():
        p.data = place(np.random.default_rng(p.size).normal(0, 0.3, p.shape))
    x, t = inputs(config)
    noise = np.random.default_rng(5).standard_normal(x.shape)
    expected = ((fetch(model(x, t)) - noise) ** 2).mean()
    got = models.noise_loss(model, {"x": fetch(x), "t": t, "noise": noise})
    np.testing.assert_allclose(got.item(), expected, rtol=1e-12)
    assert ops.mse(model(x, t), place(noise)).item() == got.item()
