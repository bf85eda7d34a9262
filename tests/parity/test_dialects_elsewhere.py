"""Adapters in the dialects of other programs, taken by these programs: their models compute what the merged weights do.

Run with -m parity, where mlx and mlx-lm, or torch, peft and diffusers are installed.
"""
import json

import numpy as np
import pytest

from minilora.formats import load_state, read_adapter, save_state, write_adapter
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.lora import Config

pytestmark = pytest.mark.parity


def drawn(rng, shapes, s, dora=False, rank=lambda i: 2):
    """An adapter for weights of these shapes; `s` and `rank` are functions of the number of the module."""
    updates = {}
    for i, (path, shape) in enumerate(shapes.items()):
        r, out = rank(i), shape[0]
        A = (rng.normal(size=(r, *shape[1:])) / 5).astype("float32")
        B = (rng.normal(size=(out, r, *[1] * (len(shape) - 2))) / 5).astype("float32")
        lengths = rng.uniform(0.5, 2, out).astype("float32") if dora else None
        updates[path] = Update("linear" if len(shape) == 2 else "convolution", A, B, s(i), magnitude=lengths)
    return SavedAdapter(updates, Config(r=2, lora_alpha=2, target_modules=[*updates]))


def merged(weight, update):
    """The weight with the update in it, in float64."""
    A, B = (array.astype("float64").reshape(len(array), -1) for array in (update.A, update.B))
    whole = weight.astype("float64").reshape(len(weight), -1) + update.s * B @ A
    if update.magnitude is not None:
        whole *= (update.magnitude / np.sqrt((whole ** 2).sum(axis=1)))[:, None]
    return whole.reshape(weight.shape).astype("float32")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("num_layers", [None, 3])
def test_mlx_lm_takes_what_is_written(tmp_path, dora, num_layers):
    mx = pytest.importorskip("mlx.core")
    llama, utils = pytest.importorskip("mlx_lm.models.llama"), pytest.importorskip("mlx_lm.tuner.utils")

    def model():
        mx.random.seed(0)
        return llama.Model(llama.ModelArgs(
            model_type="llama", hidden_size=16, num_hidden_layers=3, intermediate_size=32, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=40, tie_word_embeddings=False))

    with mx.stream(mx.cpu):
        plain, by_hand, ids = model(), model(), mx.array([[1, 2, 3, 39]])
        inside = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 32)}
        shapes = {f"model.layers.{i}.{name}": shape for i in (1, 2) for name, shape in inside.items()} | {"lm_head": (40, 16)}
        adapter = drawn(np.random.default_rng(0), shapes, lambda i: (0.1, 0.4)[i % 2], dora)
        write_adapter(adapter, tmp_path / "a", dialect="mlx", num_layers=num_layers)
        before = np.array(plain(ids))
        modules = dict(by_hand.named_modules())
        for path, update in adapter.updates.items():
            modules[path].weight = mx.array(merged(np.array(modules[path].weight), update))
        adapted = np.array(utils.load_adapters(plain, str(tmp_path / "a"))(ids))
        np.testing.assert_allclose(adapted, np.array(by_hand(ids)), atol=1e-4)
        assert abs(adapted - before).max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("metadata", [True, False])
def test_diffusers_takes_what_is_written_and_writes_what_is_read(tmp_path, dora, metadata):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")

    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8, attention_head_dim=4).eval()

    plain, by_hand = unet(), unet()
    places = {f"unet.{name}": module for name, module in by_hand.named_modules()
              if name.endswith(("to_q", "to_v", "to_out.0", "proj_in", "conv1"))}
    rng = np.random.default_rng(0)
    adapter = drawn(rng, {path: tuple(module.weight.shape) for path, module in places.items()},
                    lambda i: 0.3 + i if metadata else 1.0, dora, rank=lambda i: 2 + i % 3)
    write_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", dialect="diffusers", metadata=metadata)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        before = plain(x, 0, text).sample
        for path, update in adapter.updates.items():
            places[path].weight.copy_(torch.tensor(merged(places[path].weight.numpy(), update)))
        plain.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors", adapter_name="one")
        adapted = plain(x, 0, text).sample
        torch.testing.assert_close(adapted, by_hand(x, 0, text).sample, atol=1e-3, rtol=1e-3)
        assert (adapted - before).abs().max() > 0.01
    plain.save_lora_adapter(tmp_path / "theirs", adapter_name="one")
    theirs = read_adapter(tmp_path / "theirs")
    assert theirs.dialect == "diffusers"
    for path, update in adapter.updates.items():
        found = theirs.updates[path.removeprefix("unet.")]
        assert np.array_equal(found.A, update.A) and np.array_equal(found.B, update.B)
        assert found.s == pytest.approx(update.s, rel=1e-15)
        assert (found.magnitude is None) == (update.magnitude is None)


def test_peft_takes_an_adapter_that_came_through_every_dialect(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))

    adapter = drawn(np.random.default_rng(0), {"0": (6, 4), "1": (3, 6)}, lambda i: 1.5)
    value, read = adapter, {"loralib": dict(lora_alpha=3), "kohya": dict(modules=["0", "1"])}
    walk = {"loralib": {}, "mlx": {}, "kohya": {}, "diffusers": dict(component=""), "peft": {}}
    for i, (dialect, write) in enumerate(walk.items()):
        write_adapter(value, tmp_path / str(i), dialect=dialect, **write)
        value = read_adapter(tmp_path / str(i), **read.get(dialect, {}))
    assert json.loads((tmp_path / "4" / "adapter_config.json").read_text())["lora_alpha"] == 3
    by_hand, x = net(), torch.randn(5, 4)
    with torch.no_grad():
        for path, update in adapter.updates.items():
            module = by_hand[int(path)]
            module.weight.copy_(torch.tensor(merged(module.weight.numpy(), update)))
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "4")
        torch.testing.assert_close(loaded(x), by_hand(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("layer", ["linear", "convolution", "1 x 1"])
def test_lycoris(tmp_path, decompose, layer):
    torch, locon = pytest.importorskip("torch"), pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(0)
    base, x = {"linear": (torch.nn.Linear(6, 5), torch.randn(3, 6)),
               "convolution": (torch.nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6)),
               "1 x 1": (torch.nn.Conv2d(3, 5, 1), torch.randn(2, 3, 6, 6))}[layer]
    name = "lora_unet_x"
    module = locon.LoConModule(name, base, 1.0, lora_dim=2, alpha=3.0, weight_decompose=decompose, wd_on_out=True)
    torch.nn.init.normal_(module.lora_up.weight)
    if decompose:
        module.dora_scale.data.mul_(1.5)
    module.apply_to()
    module.eval()
    adapted = base(x).detach()
    module.restore()
    state = {f"{name}.{part}": tensor.detach().numpy() for part, tensor in module.custom_state_dict().items()}
    save_state(tmp_path / "theirs.safetensors", state)
    adapter = read_adapter(tmp_path / "theirs.safetensors")
    base.weight.data = torch.tensor(merged(base.weight.detach().numpy(), adapter.updates[name]))
    torch.testing.assert_close(base(x).detach(), adapted, atol=1e-5, rtol=1e-5)
    write_adapter(adapter, tmp_path / "ours.safetensors", dialect="kohya")
    ours = load_state(tmp_path / "ours.safetensors")
    assert ours.keys() == state.keys()
    assert all(np.array_equal(ours[key], state[key]) and ours[key].shape == state[key].shape for key in state)
