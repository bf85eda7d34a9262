"""Adapter files combined, cut and extracted here, loaded by PEFT; and PEFT's own `add_weighted_adapter`. Run with -m parity.

What PEFT 0.21.2 does, as found by these tests: "cat" and "svd" are the weighted sum for adapters without use_rslora, and too
large by sqrt(r) of the new adapter with it, since that takes use_rslora over; "linear" has the cross terms B_i A_j.
"""
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import formats
from minilora.errors import FormatError

pytestmark = pytest.mark.parity
RANKS, ALPHAS, WEIGHTS = (3, 3), (6.0, 1.5), (0.5, -1.25)


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"),
                               transformers=pytest.importorskip("transformers"))


def base(libraries):
    """The same every time."""
    config = libraries.transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    libraries.torch.manual_seed(0)
    return libraries.transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def two(libraries, quiet, tmp_path, request):
    """PEFT's model with two adapters, whose folders are one and two; the settings are the fixture's parameter."""
    torch, peft, model = libraries.torch, libraries.peft, base(libraries)
    for name, r, alpha, targets in zip(("one", "two"), RANKS, ALPHAS, (["q_proj", "up_proj"], ["q_proj", "up_proj"])):
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **getattr(request, "param", {}))
        if name == "one":
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path and "magnitude" not in path:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def layers(libraries, model):
    return {path: module for path, module in model.named_modules() if isinstance(module, libraries.peft.tuners.lora.LoraLayer)}


def deltas(libraries, model, name):
    return {path: layer.get_delta_weight(name).detach().numpy().astype("float64")
            for path, layer in layers(libraries, model).items()}


def loaded(libraries, folder):
    """D of each layer as PEFT computes it from a folder, and the logits."""
    model = libraries.peft.PeftModel.from_pretrained(base(libraries), str(folder), adapter_name="new").eval()
    ids = libraries.torch.arange(12).reshape(2, 6)
    with libraries.torch.no_grad():
        return deltas(libraries, model, "new"), model(ids).logits.numpy()


def assert_close(got, wanted, rel=1e-6):
    assert got.keys() == wanted.keys()
    for path, D in wanted.items():
        assert np.linalg.norm(got[path] - D) <= rel * np.linalg.norm(D), path


@pytest.mark.parametrize("two", [{}, {"use_rslora": True}], indirect=True)
@pytest.mark.parametrize("how", ["cat", "sum", "svd"])
def test_what_is_combined_here_is_the_weighted_sum_in_peft(how, two, libraries):
    model, folder = two
    adapters = [formats.read_adapter(folder / name) for name in ("one", "two")]
    rank = {"rank": sum(RANKS)} if how == "svd" else {}
    formats.write_adapter(formats.combine(adapters, WEIGHTS, how, **rank).adapter, folder / "new")
    one, other = (deltas(libraries, model, name) for name in ("one", "two"))
    got, logits = loaded(libraries, folder / "new")
    assert_close(got, {path: WEIGHTS[0] * one[path] + WEIGHTS[1] * other[path] for path in one})
    plain = base(libraries)
    with libraries.torch.no_grad():
        for path, D in got.items():
            plain.get_submodule(path.removeprefix("base_model.model.")).weight += libraries.torch.tensor(D).float()
        wanted = plain(libraries.torch.arange(12).reshape(2, 6)).logits.numpy()
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


@pytest.mark.parametrize("two", [{}, {"use_rslora": True}], indirect=True)
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_add_weighted_adapter_where_it_is_right_and_by_how_much_not(kind, two, libraries):
    model, folder = two
    rslora = bool(model.peft_config["one"].use_rslora)
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "made", combination_type=kind)
    theirs = deltas(libraries, model, "made")
    adapters = [formats.read_adapter(folder / name) for name in ("one", "two")]
    mine = formats.combine(adapters, WEIGHTS, kind, **({"rank": max(RANKS)} if kind == "svd" else {})).adapter
    formats.write_adapter(mine, folder / "mine")
    got, _ = loaded(libraries, folder / "mine")
    r = sum(RANKS) if kind == "cat" else max(RANKS)
    # PEFT's SVD is in float32: a cut turns by its rounding over the gap between the last value kept and the first one dropped.
    rel = 2e-6 if kind == "cat" else 5e-5
    assert_close({path: D / (math.sqrt(r) if rslora else 1.0) for path, D in theirs.items()}, got, rel)


def test_linear_is_another_matrix(two, libraries):
    model, folder = two
    model.add_weighted_adapter(["one", "two"], [0.5, 1.25], "made", combination_type="linear")
    theirs = deltas(libraries, model, "made")
    one, other = (deltas(libraries, model, name) for name in ("one", "two"))
    for path, D in theirs.items():
        wanted = 0.5 * one[path] + 1.25 * other[path]
        assert np.linalg.norm(D - wanted) > 0.3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("two", [{"use_dora": True}], indirect=True)
def test_dora_is_no_sum(two, libraries):
    _, folder = two
    with pytest.raises(FormatError, match="DoRA"):
        formats.combine([formats.read_adapter(folder / name) for name in ("one", "two")])


@pytest.mark.parametrize("two", [{"use_rslora": True, "rank_pattern": {"up_proj": 5}}], indirect=True)
def test_resized_in_peft(two, libraries):
    model, folder = two
    done = formats.resize(formats.read_adapter(folder / "one"), 2)
    formats.write_adapter(done.adapter, folder / "small")
    got, _ = loaded(libraries, folder / "small")
    for path, D in deltas(libraries, model, "one").items():
        sigma = np.linalg.svd(D, compute_uv=False)
        assert np.linalg.norm(got[path] - D) == pytest.approx(math.sqrt((sigma[2:] ** 2).sum()), rel=1e-5)


def test_extracted_from_checkpoints_of_transformers(two, libraries):
    model, folder = two
    model.set_adapter("one")
    wanted = deltas(libraries, model, "one")
    base(libraries).save_pretrained(folder / "base")
    model.merge_and_unload(adapter_names=["one"]).save_pretrained(folder / "tuned", max_shard_size="20KB")
    done = formats.extract_files(folder / "tuned", folder / "base", energy=0.999999)
    assert {row.after for row in done.rows} == {3} and done.adapter.config.task_type == "CAUSAL_LM"
    formats.write_adapter(done.adapter, folder / "found")
    got, _ = loaded(libraries, folder / "found")
    assert_close(got, wanted, 1e-5)
