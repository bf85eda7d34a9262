"""The U-Net against the same network written with torch's own functions; and against diffusers, where that is installed.

Run with -m parity.
"""
import math

import numpy as np
import pytest

from minilora import models

pytestmark = pytest.mark.parity

CONFIG = models.UNetConfig(sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16, 24), norm_num_groups=4,
                           attention_head_dim=8, layers_per_block=2, classes=3, guided=False)


def drawn():
    model, rng = models.UNet(CONFIG, rng=0), np.random.default_rng(7)
    for name, p in model.named_parameters():
        p.data[...] = rng.normal(float("norm" in name and name.endswith("weight")), 0.2, p.shape)
    x = rng.standard_normal((3, 2, 8, 8)).astype("float32")
    return model, x, np.array([0, 500, 999]), np.array([2, 0, 1])


def in_torch(torch, state, x, t, labels):
    F = torch.nn.functional
    W = {name: torch.from_numpy(array.astype("float64")) for name, array in state.items()}

    def linear(h, at):
        return F.linear(h, W[f"{at}.weight"], W[f"{at}.bias"])

    def conv(h, at, **more):
        weight = W[f"{at}.weight"]
        return F.conv2d(h, weight, W[f"{at}.bias"], padding=weight.shape[-1] // 2, **more)

    def norm(h, at):
        return F.group_norm(h, CONFIG.norm_num_groups, W[f"{at}.weight"], W[f"{at}.bias"], CONFIG.norm_eps)

    def resnet(h, at):
        inner = conv(F.silu(norm(h, f"{at}.norm1")), f"{at}.conv1") + linear(F.silu(e), f"{at}.time_emb_proj")[:, :, None, None]
        inner = conv(F.silu(norm(inner, f"{at}.norm2")), f"{at}.conv2")
        return inner + (conv(h, f"{at}.conv_shortcut") if f"{at}.conv_shortcut.weight" in W else h)

    def attention(h, at):
        n, c, height, width = h.shape
        flat = norm(h, f"{at}.group_norm").flatten(2).transpose(1, 2)
        heads = c // CONFIG.attention_head_dim
        q, k, v = (linear(flat, f"{at}.to_{one}").view(n, -1, heads, c // heads).transpose(1, 2) for one in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        return h + linear(y, f"{at}.to_out.0").transpose(1, 2).view(h.shape)

    width = CONFIG.block_out_channels[0]
    exponents = torch.arange(width // 2, dtype=torch.float64) / (width // 2)
    angles = torch.from_numpy(t)[:, None] * torch.exp(-math.log(10000) * exponents)
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    e = linear(F.silu(linear(waves, "time_embedding.linear_1")), "time_embedding.linear_2")
    e = e + W["class_embedding.weight"][torch.from_numpy(labels)]
    h = conv(torch.from_numpy(x.astype("float64")), "conv_in")
    seen = [h]
    for level in range(3):
        for i in range(2):
            h = resnet(h, f"down_blocks.{level}.resnets.{i}")
            h = attention(h, f"down_blocks.2.attentions.{i}") if level == 2 else h
            seen.append(h)
        if level < 2:
            h = conv(h, f"down_blocks.{level}.downsamplers.0.conv", stride=2)
            seen.append(h)
    h = resnet(attention(resnet(h, "mid_block.resnets.0"), "mid_block.attentions.0"), "mid_block.resnets.1")
    for level in range(3):
        for i in range(3):
            h = resnet(torch.cat([h, seen.pop()], dim=1), f"up_blocks.{level}.resnets.{i}")
            h = attention(h, f"up_blocks.0.attentions.{i}") if level == 0 else h
        if level < 2:
            h = conv(F.interpolate(h, scale_factor=2.0, mode="nearest"), f"up_blocks.{level}.upsamplers.0.conv")
    return conv(F.silu(norm(h, "conv_norm_out")), "conv_out").numpy()


def test_the_network_in_torch():
    torch = pytest.importorskip("torch")
    model, x, t, labels = drawn()
    model = model.to(dtype="float64")
    got = model(x.astype("float64"), t, labels).data
    expected = in_torch(torch, model.state_dict(), x, t, labels)
    np.testing.assert_allclose(got, expected, atol=1e-10 * abs(expected).max())


def test_diffusers_takes_the_weights_and_gives_the_same_noise():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model, x, t, labels = drawn()
    theirs = diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16, 24), norm_num_groups=4, layers_per_block=2,
        attention_head_dim=8, num_class_embeds=3, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")).eval()
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()})
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(labels)).sample.numpy()
    np.testing.assert_allclose(model(x, t, labels).data, expected, atol=1e-4 * abs(expected).max())
