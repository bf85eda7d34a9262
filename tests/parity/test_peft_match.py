"""lora.Config and lora.match against PEFT's. Run with -m parity, where torch and peft are installed."""
import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import lora, nn
from minilora.errors import ConfigError
from minilora.formats.adapters.peft.writing import VERSION
from minilora.lora.config_checks import KNOWN_ELSEWHERE

pytestmark = pytest.mark.parity
N_LAYERS, D = 3, 4


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"))


def build(module, linear, embedding, stack, deep):
    """One model in either library: the same modules under the same names."""
    def holder(**children):
        new = module()
        for name, child in children.items():
            setattr(new, name, child)
        return new

    def block():
        attn = holder(q_proj=linear(D, D), k_proj=linear(D, D), v_proj=linear(D, D), out_proj=linear(D, D))
        return holder(attn=attn, mlp=holder(up=linear(D, 2 * D), down=linear(2 * D, D)),
                      experts=stack([linear(D, D), linear(D, D)]))

    body = holder(embed=embedding(10, D), layers=stack([block() for _ in range(N_LAYERS)]), pooler=linear(D, D))
    return holder(model=body, lm_head_2=linear(D, 10)) if deep else body


def models(libraries, deep=True):
    t = libraries.torch.nn
    rng = np.random.default_rng(0)
    ours = build(nn.Module, lambda i, o: nn.Linear(i, o, rng=rng), lambda v, d: nn.Embedding(v, d, rng=rng), list, deep)
    theirs = build(t.Module, t.Linear, t.Embedding, t.ModuleList, deep)
    return ours, theirs


def of_peft(libraries, model, settings):
    """What PEFT adapts: {path: (r, lora_alpha, scaling)}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = libraries.peft.get_peft_model(model, libraries.peft.LoraConfig(**settings))
    layer = libraries.peft.tuners.lora.LoraLayer
    return {name.removeprefix("base_model.model."): (m.r["default"], m.lora_alpha["default"], m.scaling["default"])
            for name, m in tuned.named_modules() if isinstance(m, layer)}


CASES = [
    dict(target_modules=["q_proj"]),
    dict(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=16),
    dict(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=16, use_rslora=True),
    dict(target_modules=["attn.q_proj", "0.mlp.up", "model.layers.2.mlp.down"]),
    dict(target_modules=["model.embed", "up"]),
    dict(target_modules=r".*\.(q|v)_proj"),
    dict(target_modules=r"model\.layers\.[12]\.mlp\.(up|down)"),
    dict(target_modules=r".*experts\.\d"),
    dict(target_modules="all-linear"),
    dict(target_modules="all-linear", exclude_modules=["pooler", "lm_head_2"]),
    dict(target_modules="all-linear", exclude_modules=r".*\.experts\..*"),
    dict(target_modules="all-linear", modules_to_save=["lm_head_2"]),
    dict(target_modules=["q_proj", "up"], modules_to_save=["layers.1.attn"]),
    dict(target_modules=["q_proj", "up"], layers_to_transform=1),
    dict(target_modules=["q_proj", "up"], layers_to_transform=[0, 2], layers_pattern="layers"),
    dict(target_modules=["experts.0"], layers_to_transform=[1, 2]),
    dict(target_modules=["experts.1"], layers_to_transform=1, layers_pattern=["experts", "layers"]),
    dict(target_modules=["model.layers.0.attn.q_proj", "v_proj"], layers_to_transform=2),
    dict(target_modules=["q_proj", "v_proj", "up"], rank_pattern={"v_proj": 2}, alpha_pattern={"up": 3}),
    dict(target_modules=["q_proj", "v_proj"], rank_pattern={"0.attn.v_proj": 1, "v_proj": 2}),
    dict(target_modules=["q_proj", "v_proj"], rank_pattern={r"layers\.1\..*": 5}, use_rslora=True),
    dict(target_modules=["q_proj", "v_proj"], rank_pattern={r"^model\.layers\.0\.attn\.q_proj": 5}),
    dict(target_modules=["q_proj", "v_proj"], alpha_pattern={r"^model\.layers\.\d\.attn\.q_proj": 5, "v_proj": 7}),
    dict(target_modules=["q_proj", "out_proj"], rank_pattern={r"(q|out)_proj": 6}),
    dict(target_modules=["embed"], rank_pattern={"embed": 2}),
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_same_layers_ranks_and_scalings(libraries, settings):
    ours, theirs = models(libraries)
    expected = of_peft(libraries, theirs, settings)
    found = lora.match(ours, lora.Config(**settings), allow_unmatched=True)  # PEFT lets what matches nothing pass
    assert {t.path: (t.r, t.lora_alpha, t.scaling) for t in found.targets} == expected
    assert [t.path for t in found.targets] == list(expected)  # in model order


@pytest.mark.parametrize("settings", [
    dict(target_modules=["q_proj"]), dict(target_modules="all-linear"), dict(target_modules=["layers.0.attn.q_proj", "up"]),
    dict(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"),
], ids=str)
def test_a_stack_at_the_root(libraries, settings):
    ours, theirs = models(libraries, deep=False)
    assert {t.path for t in lora.match(ours, lora.Config(**settings)).targets} == set(of_peft(libraries, theirs, settings))


def test_layer_numbers_at_the_root_differ_on_purpose(libraries):
    """PEFT wants something in front of the stack's name and finds no layer, or the number of the expert (its issue 3610)."""
    ours, theirs = models(libraries, deep=False)
    plain, expert = dict(target_modules=["q_proj"], layers_to_transform=1), dict(target_modules=["up"], layers_to_transform=1)
    for settings in (plain, expert):
        with pytest.raises(ValueError):
            of_peft(libraries, models(libraries, deep=False)[1], settings)
        assert len(lora.match(ours, lora.Config(**settings)).targets) == 1


@pytest.mark.parametrize("settings", [
    dict(target_modules=["nope"]), dict(target_modules="q_proj"), dict(target_modules=["attn"]), dict(target_modules=r".*attn"),
    dict(target_modules=["q_proj"], layers_to_transform=9), dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
], ids=str)
def test_both_refuse(libraries, settings):
    ours, theirs = models(libraries)
    with pytest.raises(ConfigError):
        lora.match(ours, lora.Config(**settings))
    with pytest.raises(ValueError):
        of_peft(libraries, theirs, settings)


@pytest.mark.parametrize("settings", [
    dict(target_modules=".*", layers_to_transform=1), dict(target_modules=".*", layers_pattern="h"),
    dict(target_modules=["q"], layers_pattern="h"), dict(target_modules=["q"], lora_bias=True, use_dora=True),
    dict(target_modules=["q"], lora_bias=True, init_lora_weights="pissa"),
], ids=str)
def test_both_refuse_the_config(libraries, settings):
    with pytest.raises(ConfigError):
        lora.Config(**settings)
    with pytest.raises(ValueError):
        libraries.peft.LoraConfig(**settings)


def test_fields_and_defaults(libraries):
    """Every setting of PEFT is a field here or known to be off, with PEFT's default."""
    theirs = libraries.peft.LoraConfig().to_dict()
    ours = {field.name: getattr(lora.Config(), field.name) for field in dataclasses.fields(lora.Config)}
    assert ours.pop("extra") == {} and ours.pop("peft_version") is None
    assert theirs.pop("peft_version") == VERSION and theirs.pop("peft_type") == "LORA"
    assert theirs == {**ours, **KNOWN_ELSEWHERE}


@pytest.mark.parametrize("settings", [settings for settings in CASES if "experts" not in str(settings)], ids=str)
def test_configs_travel_both_ways(libraries, settings):
    """As JSON: PEFT's file is a config here, and ours is one there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = libraries.peft.LoraConfig(**settings)
        data = {name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
                for name, value in theirs.to_dict().items()}
        ours = lora.Config.from_dict(data)
        back = libraries.peft.LoraConfig(**ours.to_dict())
    expected = dataclasses.asdict(lora.Config(**settings))
    assert ours.extra == expected.pop("extra") == {}
    for name, value in expected.items():
        got = getattr(ours, name)
        value = VERSION if name == "peft_version" else value  # PEFT fills it in
        assert (sorted(got) == sorted(value)) if isinstance(value, tuple) else got == value, name
        assert getattr(back, name) == getattr(theirs, name), name
