"""Adapter folders: what PEFT writes is read and written back with nothing lost, and what is written here PEFT reads.

Run with -m parity, where torch and peft are installed.
"""
import dataclasses
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.errors import FormatError
from minilora.formats.adapters.reading import read_adapter
from minilora.formats.adapters.writing import write_adapter

pytestmark = pytest.mark.parity
LAYERS = ["emb", "lin", "nobias", "conv1", "conv2", "conv3", "h.0.fc", "h.1.fc", "h.1.out"]
LINEAR = ["lin", "nobias", "h.0.fc", "h.1.fc", "h.1.out"]


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"),
                               tensors=pytest.importorskip("safetensors.torch"))


def model(libraries):
    nn = libraries.torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out, self.norm = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(x + self.out(self.fc(x)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.wte = nn.Embedding(11, 6), nn.Embedding(11, 6)
            self.lin, self.nobias = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
            self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Conv3d(4, 6, 2)
            self.h = nn.ModuleList([Block(), Block()])
            self.head, self.pre_head = nn.Linear(6, 3), nn.Linear(6, 6)

        def forward(self, ids):
            x = self.h[1](self.h[0](self.emb(ids) + self.wte(ids)))
            x = x + self.nobias(self.lin(x))
            image = x[:, :4, None].expand(-1, 4, 5)
            x = x + self.conv1(image).sum(-1)
            x = x + self.conv2(image[..., None].expand(-1, 4, 5, 5)).sum((-2, -1))
            x = x + self.conv3(image[..., None, None].expand(-1, 4, 5, 5, 5)).sum((-3, -2, -1))
            return self.head(self.pre_head(x))

    libraries.torch.manual_seed(0)
    return Model()


def drawn(rng):
    """Settings of a LoraConfig, and a dtype, that PEFT takes for this model."""
    def maybe(value, share=0.3):
        return value if rng.random() < share else None

    init = str(rng.choice(["True", "False", "gaussian", "pissa", "olora", "orthogonal", "mica", "eva"], p=[.44] + [.08] * 7))
    lora_bias = init in ("True", "False") and rng.random() < 0.2
    plain = init in ("True", "False", "gaussian")
    layers = LINEAR if not plain else LAYERS[1:] if lora_bias else LAYERS
    r = int(rng.choice([2, 4]))
    targets = sorted({str(name) for name in rng.choice(layers, rng.integers(1, 4))})
    settings = dict(r=r, lora_alpha=[3, 8, 0.7, 16.0][rng.integers(4)], lora_dropout=float(rng.choice([0.0, 0.1])),
                    target_modules=targets, bias=str(rng.choice(["none", "all", "lora_only"])), lora_bias=bool(lora_bias),
                    use_rslora=bool(rng.random() < 0.3), use_dora=bool(plain and not lora_bias and rng.random() < 0.3),
                    init_lora_weights={"True": True, "False": False}.get(init, init),
                    modules_to_save=maybe(["head"]), trainable_token_indices=maybe({"wte": [3, 1, 7]}),
                    task_type=maybe("FEATURE_EXTRACTION"), revision=maybe("main"), base_model_name_or_path=maybe("some/base"),
                    exclude_modules=maybe(["pre_head"], 0.2))
    if rng.random() < 0.4:
        settings["rank_pattern"] = {targets[0]: 2, "nothing": 6} if rng.random() < 0.3 else {targets[0]: 6}
    if rng.random() < 0.4:
        settings["alpha_pattern"] = {f"^{targets[-1].replace('.', chr(92) + '.')}": float(rng.uniform(0.1, 9))}
    form = rng.random()
    if form < 0.15:
        settings.update(target_modules=rf"h\.\d\.{rng.choice(['fc', 'out', '(fc|out)'])}", rank_pattern={}, alpha_pattern={})
    elif form < 0.3:
        settings.update(target_modules=["fc"], layers_to_transform=[1], layers_pattern="h", rank_pattern={},
                        alpha_pattern={})
    return settings, str(rng.choice(["float32", "float32", "float16", "bfloat16", "float64"]))


def tuned(libraries, settings, dtype, seed):
    """A model with an adapter of PEFT, all of whose numbers are random."""
    torch, peft = libraries.torch, libraries.peft
    if settings["init_lora_weights"] == "eva":
        settings = {**settings, "eva_config": peft.EvaConfig(rho=1.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model(libraries), peft.LoraConfig(**settings)).to(getattr(torch, dtype))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
    return made


def save(made, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)


def contents(libraries, folder):
    tensors = libraries.tensors.load_file(folder / "adapter_model.safetensors")
    return tensors, json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("seed", range(200))
def test_nothing_is_lost_on_the_way_there_and_back(libraries, tmp_path, seed):
    rng = np.random.default_rng(seed)
    settings, dtype = drawn(rng)
    save(tuned(libraries, settings, dtype, seed), tmp_path / "theirs")
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "ours")
    (theirs, config), (ours, our_config) = contents(libraries, tmp_path / "theirs"), contents(libraries, tmp_path / "ours")
    again = {key for key in theirs if ".modules_to_save." in key or ".original_module." in key}  # with bias="all"
    assert ours.keys() == theirs.keys() - again
    for key in again:
        if ".modules_to_save." in key:
            assert libraries.torch.equal(ours[key.replace(".modules_to_save", "")], theirs[key])
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype == getattr(libraries.torch, dtype)
        assert tensor.shape == theirs[key].shape and libraries.torch.equal(tensor, theirs[key]), key
    assert our_config == config
    assert (tmp_path / "ours" / "adapter_config.json").read_text() == json.dumps(config, indent=2, sort_keys=True)


@pytest.mark.parametrize("seed", range(0, 200, 8))
def test_peft_reads_what_was_written_here(libraries, tmp_path, seed):
    """With scalings that no rule of the config gives: the same outputs, and no warning."""
    torch, peft, rng = libraries.torch, libraries.peft, np.random.default_rng(seed)
    settings, _ = drawn(rng)
    if settings["init_lora_weights"] in ("pissa", "olora", "eva", "mica"):
        settings["init_lora_weights"] = True  # PEFT takes these starts from the base, or from data, or not in float64
    settings.update(base_model_name_or_path=None, task_type=None)
    made = tuned(libraries, settings, "float64", seed).eval()
    save(made, tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    updates = {path: dataclasses.replace(update, s=float(rng.uniform(0.1, 3))) for path, update in adapter.updates.items()}
    for path, module in made.base_model.model.named_modules():
        if path in updates:
            assert module.scaling["default"] == adapter.updates[path].s
            module.scaling["default"] = updates[path].s
    write_adapter(dataclasses.replace(adapter, updates=updates), tmp_path / "ours")
    ids = torch.tensor([1, 3, 7, 10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(lora_bias|nothing|use_rslora).*")  # PEFT's, of the config itself
        loaded = peft.PeftModel.from_pretrained(model(libraries).double(), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(ids), made(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "corda", "lora_ga"])
def test_the_advice_for_starts_that_move_the_base_works(libraries, tmp_path, init):
    """What PEFT converts is read as an ordinary adapter of rank 2 r, whatever the config says about how training began."""
    torch, peft = libraries.torch, libraries.peft
    configs = peft.tuners.lora.config
    more = {"corda": {"corda_config": configs.CordaConfig()},
            "lora_ga": {"lora_ga_config": configs.LoraGAConfig()}}.get(init, {})
    given = dict(r=2, lora_alpha=3, target_modules=["lin", "h.0.fc"], **more)
    start = True if more else init  # these two need data to begin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model(libraries), peft.LoraConfig(init_lora_weights=start, **given))
        made.peft_config["default"].init_lora_weights = True
        made.save_pretrained(tmp_path / "start")
        made.peft_config["default"].init_lora_weights = init
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.add_(torch.randn(p.shape) if "lora_" in name else 0)
        made.save_pretrained(tmp_path / "kept")
        expected = made(torch.tensor([1, 3]))
        made.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
        if start is not True:
            loaded = peft.PeftModel.from_pretrained(model(libraries), tmp_path / "converted").eval()
            torch.testing.assert_close(loaded(torch.tensor([1, 3])), expected, rtol=1e-4, atol=1e-4)
    if init in ("pissa", "olora"):
        assert read_adapter(tmp_path / "kept").config.init_lora_weights == init
    else:
        with pytest.raises(FormatError, match="path_initial_model_for_weight_conversion"):
            read_adapter(tmp_path / "kept")
    adapter = read_adapter(tmp_path / "converted")
    assert adapter.config.init_lora_weights is True and {u.r for u in adapter.updates.values()} == {4}
    assert {u.s for u in adapter.updates.values()} == {1.5}
    write_adapter(adapter, tmp_path / "again")
    assert contents(libraries, tmp_path / "again")[1] == contents(libraries, tmp_path / "converted")[1]
