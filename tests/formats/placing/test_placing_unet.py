"""Adapters of the U-Net in kohya's, diffusers' and PEFT's files: equal images to the bit, mixtures, and what is refused."""
import itertools

import numpy as np
import pytest
from conftest import PROOF, place

from minilora import lora, models
from minilora.errors import FormatError
from minilora.formats import combine, load_adapter, load_state, read_adapter, save_adapter, save_state

CONFIG = models.UNetConfig(sample_size=4, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4, classes=3)
SCHEDULE = models.NoiseSchedule(40)
TARGETS = ["conv1", "conv2", "conv_shortcut", "conv", "to_q", "to_v", "to_out.0", "time_emb_proj"]
DIALECTS = {"kohya": ("a.safetensors", {}), "diffusers": ("a.safetensors", {"component": "unet"}), "peft": ("a", {})}


def base(seed=0, config=CONFIG):
    """A base whose every weight counts."""
    model, rng = models.UNet(config, rng=seed), np.random.default_rng(seed + 10)
    for name, p in model.named_parameters():
        p.data = place(rng.normal(float("norm" in name and name.endswith("weight")), 0.3, p.shape), "float32")
    return model.eval()


def with_style(model, name="thick", seed=1, **settings):
    """An adapter with random B, so that it does something."""
    lora.inject(model, lora.Config(**{**dict(r=2, lora_alpha=2, target_modules=TARGETS), **settings}), name, rng=seed)
    rng = np.random.default_rng(seed)
    for path, p in model.named_parameters():
        if f".adapters.{name}." in path:
            p.data = place(rng.normal(0, 0.2, p.shape), "float32")
    return model


def images(model, *names, weights=None):
    lora.activate(model, *names, weights=weights, trainable=False)
    return models.ddim(model, SCHEDULE, [0, 1, 2], steps=3, guidance=1.5, rng=4)


SETTINGS = {
    "one rank": {},
    "alphas and ranks by layer": dict(r=4, lora_alpha=3, rank_pattern={"to_q": 2, "conv1": 3},
                                      alpha_pattern={"mid_block.*conv2": 5, "to_v": 0.7}),
    "rslora": dict(use_rslora=True, r=3),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("settings", SETTINGS)
@PROOF
def test_written_and_read_it_draws_the_same_bits(dialect, settings, tmp_path, device):
    name, options = DIALECTS[dialect]
    model = with_style(base(), **SETTINGS[settings])
    expected = images(model, "thick")
    save_adapter(model, tmp_path / name, "thick", dialect, **options)
    fresh = base()
    report = load_adapter(fresh, tmp_path / name, "theirs")
    assert report.fingerprint == "the base is the one that it was saved with"
    assert np.array_equal(images(fresh, "theirs"), expected) and abs(images(fresh) - expected).max() > 1e-3


@pytest.mark.parametrize("dialect", DIALECTS)
def test_mixed_from_files(dialect, tmp_path):
    """Two files on a new base, at weights up to 1.5: the images of the model that they were written from."""
    name, options = DIALECTS[dialect]
    model = with_style(with_style(base()), "slanted", seed=2, r=3, lora_alpha=6, target_modules=["conv2", "to_k"])
    for style in ("thick", "slanted"):
        (tmp_path / style).mkdir()
        save_adapter(model, tmp_path / style / name, style, dialect, **options)
    fresh = base()
    for style in ("slanted", "thick"):  # in another order
        load_adapter(fresh, tmp_path / style / name, style)
    for weights in ([1.0, 1.0], [0.5, 1.5], [0.0, 1.25], [-0.5, 0.0]):
        assert np.array_equal(images(fresh, "thick", "slanted", weights=weights),
                              images(model, "thick", "slanted", weights=weights)), weights


def test_the_names_are_those_that_programs_know(tmp_path):
    model = with_style(base())
    save_adapter(model, tmp_path / "kohya.safetensors", "thick", "kohya")
    save_adapter(model, tmp_path / "diffusers.safetensors", "thick", "diffusers", component="unet")
    kohya, diffusers = (load_state(tmp_path / f"{each}.safetensors") for each in ("kohya", "diffusers"))
    for key, shape in {"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": (2, 4, 3, 3),
                       "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": (4, 2, 1, 1),
                       "lora_unet_mid_block_attentions_0_to_out_0.alpha": (),
                       "lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight": (2, 4, 3, 3)}.items():
        assert kohya[key].shape == shape
    assert diffusers["unet.up_blocks.0.attentions.1.to_out.0.lora_B.weight"].shape == (8, 2)
    assert diffusers["unet.down_blocks.1.resnets.0.conv_shortcut.lora_A.weight"].shape == (2, 4, 1, 1)


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(DIALECTS, 2)])
def test_from_one_dialect_into_another(first, second, tmp_path):
    model = with_style(base(), **SETTINGS["alphas and ranks by layer"])
    expected = images(model, "thick")
    for number, (dialect, source) in enumerate(((first, model), (second, base()))):
        if number:
            load_adapter(source, tmp_path / "0" / DIALECTS[first][0], "thick")
        (tmp_path / str(number)).mkdir()
        name, options = DIALECTS[dialect]
        save_adapter(source, tmp_path / str(number) / name, "thick", dialect, **options)
    fresh = base()
    load_adapter(fresh, tmp_path / "1" / DIALECTS[second][0], "thick")
    assert np.array_equal(images(fresh, "thick"), expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_adapters_of_two_bases_do_not_mix(dialect, tmp_path):
    """Row 32: onto the other base it is not loaded, as a file it is not combined; forced, it is told."""
    name, options = DIALECTS[dialect]
    saved = []
    for seed in (0, 5):
        (tmp_path / str(seed)).mkdir()
        save_adapter(with_style(base(seed)), tmp_path / str(seed) / name, "thick", dialect, **options)
        saved.append(read_adapter(tmp_path / str(seed) / name, **({"modules": base()} if dialect == "kohya" else {})))
    target = with_style(base(), "mine", seed=3)
    before = {path: p.data.tobytes() for path, p in target.named_parameters()}
    with pytest.raises(FormatError, match="another base") as caught:
        load_adapter(target, tmp_path / "5" / name, "theirs")
    assert "conv1.weight" in str(caught.value) and "force=True" in str(caught.value)
    assert {path: p.data.tobytes() for path, p in target.named_parameters()} == before
    with pytest.raises(FormatError, match="different bases"):
        combine(saved, [0.5, 0.5])
    load_adapter(target, tmp_path / "0" / name, "own")
    images(target, "mine", "own", weights=[0.5, 1.5])


def test_one_base_combines_into_one_file(tmp_path):
    """At its own weights a combined file draws what the mixture draws, to rounding."""
    model = with_style(with_style(base()), "slanted", seed=2)
    for style in ("thick", "slanted"):
        save_adapter(model, tmp_path / f"{style}.safetensors", style, "diffusers", component="unet")
    both = combine([read_adapter(tmp_path / f"{style}.safetensors") for style in ("thick", "slanted")], [0.5, 1.5]).adapter
    load_adapter(fresh := base(), both, "both")
    assert load_adapter(base(), both).fingerprint == "the base is the one that it was saved with"
    with pytest.raises(FormatError, match="another base"):
        load_adapter(base(5), both)
    np.testing.assert_allclose(images(fresh, "both"), images(model, "thick", "slanted", weights=[0.5, 1.5]), atol=2e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("config", "said"), [
    (models.UNetConfig(sample_size=4, block_out_channels=(4, 10), norm_num_groups=2, attention_head_dim=5, classes=3), "(10, "),
    (models.UNetConfig(sample_size=4, block_out_channels=(4,), norm_num_groups=2, attention_head_dim=4), "up_blocks"),
])
def test_a_model_of_another_shape_is_refused(dialect, config, said, tmp_path):
    name, options = DIALECTS[dialect]
    save_adapter(with_style(base()), tmp_path / name, "thick", dialect, **options)
    other = base(config=config)
    before = [p.data.tobytes() for p in other.parameters()]
    with pytest.raises(FormatError) as caught:
        load_adapter(other, tmp_path / name)
    assert said in str(caught.value) and [p.data.tobytes() for p in other.parameters()] == before


def test_a_damaged_file_changes_nothing(tmp_path):
    save_adapter(with_style(base()), tmp_path / "a.safetensors", "thick", "kohya")
    state = dict(load_state(tmp_path / "a.safetensors"))
    name = "lora_unet_mid_block_resnets_0_conv1"
    for key, value in {f"{name}.lora_up.weight": None, f"{name}.lora_down.weight": np.zeros((2, 8, 3), "float32"),
                       f"{name}.alpha": np.array(np.nan, "float32"),
                       "lora_unet_mid_block_resnets_7_conv1.alpha": np.array(1.0, "float32")}.items():
        damaged = {k: v for k, v in {**state, key: value}.items() if v is not None}
        save_state(tmp_path / "b.safetensors", damaged)
        fresh = base()
        with pytest.raises(FormatError) as caught:
            load_adapter(fresh, tmp_path / "b.safetensors")
        assert "resnets_" in str(caught.value) or "resnets." in str(caught.value)
        assert not any(".adapters." in path for path, _ in fresh.named_parameters())
