"""Adapter folders between PEFT and here, both ways, with drawn configs. Run with -m parity, where torch and peft are installed.

What PEFT writes gives the same outputs here, before and after three steps of training on each side; what is written here loads
in PEFT without a warning that PEFT's own file does not cause, and gives the same outputs again.
"""
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import twins

from minilora import formats, lora, nn, optim
from minilora.errors import FormatError

pytestmark = pytest.mark.parity
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
STEPS, RATE = 3, 0.005  # small enough that training is no amplifier of rounding


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"),
                               transformers=pytest.importorskip("transformers"))


def settings_for(kind, dtype, rng):
    """A drawn LoraConfig that PEFT accepts for this model. In float64 it refuses "pissa"; its "olora" breaks on Conv1D."""
    def maybe(p):
        return rng.random() < p

    layers = ["emb", "fc", "c_proj", "pre_classifier"] if kind == "text" else ["conv1", "conv2", "line", "head"]
    targets = [name for name in layers if maybe(0.6)] or ["fc" if kind == "text" else "conv1"]
    settings = dict(r=int(rng.integers(1, 5)), lora_alpha=float(rng.choice([1, 3, 0.7])), target_modules=targets,
                    use_rslora=maybe(0.3), use_dora=maybe(0.3), bias=str(rng.choice(["none", "none", "all", "lora_only"])))
    plain = not ({"emb", "c_proj"} | {"conv1", "conv2", "line"}) & set(targets)
    inits = [True, False, "gaussian", *(["pissa", "olora", "orthogonal"] if plain else [])]
    init = inits[int(rng.integers(len(inits)))]
    settings["init_lora_weights"] = True if init in ("pissa", "olora") and dtype == "float64" else init
    if settings["init_lora_weights"] == "orthogonal":
        settings["r"] *= 2
    if maybe(0.3):
        settings["rank_pattern"] = {targets[0]: int(rng.integers(1, 4)) * 2}
    if maybe(0.3):
        settings["alpha_pattern"] = {targets[-1]: 5}
    if settings["init_lora_weights"] is True and not settings["use_dora"] and "emb" not in targets and maybe(0.4):
        settings["lora_bias"] = True
    if kind == "text" and "pre_classifier" not in targets and maybe(0.4):
        settings["modules_to_save"] = ["classifier"]  # and pre_classifier, whose name ends so
    if kind == "text" and "emb" not in targets and maybe(0.4):
        tokens = [int(i) for i in rng.permutation(11)[:3]]
        settings["trainable_token_indices"] = {"emb": tokens} if maybe(0.5) else tokens
    return settings


def wrapped(libraries, kind, dtype, settings, seed):
    """PEFT's model with all that it trains drawn anew, and the base's numbers as they were before."""
    torch, peft = libraries.torch, libraries.peft
    plain = twins.theirs(torch, libraries.transformers, kind, dtype, seed)
    base = twins.numbers(plain, dtype)
    model, _ = twins.quietly(peft.get_peft_model, plain, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype))
    return model.eval(), base


def run(model, x, torch=None):
    return np.array(model(x).data) if torch is None else model(torch.tensor(x)).detach().numpy()


def close(got, expected, dtype, what):
    assert got.dtype == expected.dtype == np.dtype(dtype)
    size = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * size, err_msg=what)


def train_theirs(torch, model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(torch.tensor(x)) ** 2).mean().backward()
        optimizer.step()


def train_ours(model, x):
    optimizer = optim.SGD([p for p in model.parameters() if p.trainable], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = model(x)
        (y * y).mean().backward()
        optimizer.step()


def typed(x, dtype):
    return x if x.dtype.kind == "i" else x.astype(dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind, seed", [*(("text", i) for i in range(40)), *(("image", i) for i in range(20))])
def test_both_ways(libraries, tmp_path, kind, seed, dtype):
    torch, peft = libraries.torch, libraries.peft
    settings = settings_for(kind, dtype, np.random.default_rng(seed))
    what = f"{kind} {seed} {json.dumps(settings)}"
    x = typed(twins.drawn_input(kind, seed), dtype)
    model, base = wrapped(libraries, kind, dtype, settings, seed)
    expected = run(model, x, torch)
    twins.quietly(model.save_pretrained, tmp_path / "theirs")
    own = twins.ours(kind, base, dtype)
    before = {path: p.data.tobytes() for path, p in own.named_parameters() if not path.endswith("bias")}
    report = formats.load_adapter(own, tmp_path / "theirs", "from_peft", trainable=True)
    close(run(own, x), expected, dtype, f"loaded: {what}\n{report}")
    assert {path: p.data.tobytes() for path, p in twins.ours(kind, base, dtype).named_parameters()
            if not path.endswith("bias")} == before
    assert {p.size for p in own.parameters() if p.trainable} == {p.numel() for p in model.parameters() if p.requires_grad}, what

    train_theirs(torch, model, x)
    train_ours(own, x)
    trained = run(model, x, torch)
    assert np.abs(trained - expected).max() > 1e-6
    close(run(own, x), trained, dtype, f"trained: {what}")

    formats.save_adapter(own, tmp_path / "ours")
    fresh = twins.theirs(torch, libraries.transformers, kind, dtype, seed)
    _, usual = twins.quietly(peft.PeftModel.from_pretrained, twins.theirs(torch, libraries.transformers, kind, dtype, seed),
                             tmp_path / "theirs")
    again, said = twins.quietly(peft.PeftModel.from_pretrained, fresh, tmp_path / "ours")
    assert set(said) <= set(usual), f"{what}: {set(said) - set(usual)}"
    close(run(again.eval(), x, torch), run(own, x), dtype, f"written: {what}")

    once_more = twins.ours(kind, base, dtype)
    report = formats.load_adapter(once_more, tmp_path / "ours")
    assert report.fingerprint.startswith("the base is")
    if settings["init_lora_weights"] in ("pissa", "olora"):  # the start of float32 was rounded into the file
        close(run(once_more, x), run(own, x), dtype, what)
    else:
        np.testing.assert_array_equal(run(once_more, x), run(own, x), err_msg=what)


def test_an_untouched_pissa_reloads_to_float32_rounding(libraries, tmp_path):
    """Row 6: the error of a reload against PEFT, relative, in float32."""
    for init in ("pissa", "olora"):
        for use_rslora in (False, True):
            settings = dict(r=3, lora_alpha=5, target_modules=["fc"], init_lora_weights=init, use_rslora=use_rslora)
            model, base = wrapped(libraries, "text", "float32", settings, 1)
            twins.quietly(model.save_pretrained, tmp_path / init)
            own, x = twins.ours("text", base, "float32"), twins.drawn_input("text")
            formats.load_adapter(own, tmp_path / init)
            expected = run(model, x, libraries.torch)
            error = np.abs(run(own, x) - expected).max() / np.abs(expected).max()
            print(f"{init} use_rslora={use_rslora}: {error:.1e}")
            assert error < 1e-6


@pytest.mark.parametrize("groups", [2])
def test_convolutions_with_groups(libraries, tmp_path, groups):
    """PEFT's A reads all channels: what it trains is refused with the reason; what is trained here loads there."""
    torch, peft = libraries.torch, libraries.peft

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 6, 3, groups=groups)

        def forward(self, x):
            return self.conv(x)

    class Ours(nn.Module):
        def __init__(self):
            self.conv = nn.Conv2d(4, 6, 3, groups=groups)

        def forward(self, x):
            return self.conv(x)

    plain, own = Theirs(), Ours()
    for name, p in plain.named_parameters():
        getattr(own.conv, name.split(".")[1]).data = p.detach().numpy().copy()
    lora.inject(own, lora.Config(r=4, lora_alpha=2, target_modules=["conv"]), rng=0)
    own.conv.lora_B.data += 0.1
    formats.save_adapter(own, tmp_path / "ours")
    again, said = twins.quietly(peft.PeftModel.from_pretrained, plain, tmp_path / "ours")
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 5)).astype("float32")
    close(run(own, x), run(again, x, torch), "float32", "groups")
    assert said == ["LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported."]  # what it always says
    with torch.no_grad():
        again.base_model.model.conv.lora_A["default"].weight.add_(0.1)
    twins.quietly(again.save_pretrained, tmp_path / "theirs")
    with pytest.raises(FormatError, match="lie outside of their own group"):
        formats.load_adapter(Ours(), tmp_path / "theirs", force=True)
