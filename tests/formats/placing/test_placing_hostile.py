"""Whatever a value holds: it fits and loads, or it is a FormatError and the model is as it was."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import lora, nn
from minilora.errors import FormatError
from minilora.formats.adapters.saved import SavedAdapter, TokenRows, Update
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.saving import saved_adapter

IDS = [[0, 1, 2]]


class Net(nn.Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.emb, self.fc, self.conv = nn.Embedding(5, 4, rng=rng), nn.Linear(4, 4, rng=rng), nn.Conv1d(3, 2, 1, rng=rng)
        self.head = nn.Linear(4, 2, rng=rng)

    def forward(self, ids):
        return self.head(self.conv(self.fc(self.emb(ids))))


def bits(model):
    return [(path, type(module)) for path, module in model.named_modules()], \
        [(path, p.data.tobytes(), p.shape, p.trainable) for path, p in model.named_parameters()]


SIZES = st.sampled_from([0, 1, 2, 3, 4, 5])
SHAPES = st.one_of(st.lists(SIZES, max_size=4).map(tuple),
                   st.sampled_from([(2, 4), (4, 2), (2, 5), (2, 3, 1), (2, 2, 1), (2, 3), (4,), (2,)]))
DTYPES = st.sampled_from(["float32", "float32", "float64", "float16", "int64", "bool", "complex64", "S1"])


def array_of(shape, dtype, bad, seed):
    array = np.random.default_rng(seed).standard_normal(shape)
    if bad is not None and array.size:
        array.reshape(-1)[0] = bad
    with np.errstate(all="ignore"):
        return np.zeros(shape, dtype) if dtype in ("S1", "int64", "bool") else array.astype(dtype)


ARRAYS = st.builds(array_of, SHAPES, DTYPES, st.sampled_from([None, None, None, np.nan, np.inf, 1e300]), st.integers(0, 9))
PATHS = st.sampled_from(["fc", "emb", "conv", "head", "model.fc", "fc.fc", "", ".", "fc.", "..", "nowhere", "a" * 500, "é.fc",
                         "base_model.model.fc", "adapters.x", "conv.weight"])
SCALES = st.sampled_from([1.0, 0.5, -2.0, 0.0, float("nan"), float("inf"), 1e-320])
KINDS = st.sampled_from(["linear", "embedding", "convolution"])
UPDATES = st.dictionaries(
    PATHS, st.builds(Update, KINDS, ARRAYS, ARRAYS, SCALES, st.none() | ARRAYS, st.none() | ARRAYS), max_size=3)
PARAMETERS = st.dictionaries(st.builds("{}{}".format, PATHS, st.sampled_from([".weight", ".bias", ".running", ""])), ARRAYS,
                             max_size=2)
TOKENS = st.dictionaries(PATHS, st.builds(TokenRows, st.lists(st.integers(-1, 6), max_size=3).map(tuple), ARRAYS), max_size=1)
METADATA = st.sampled_from([{}, {"minilora": "{}"}, {"minilora": "\ud800"}, {"minilora.in_head": "[1]"}, {"format": "pt"}])
CONFIGS = st.builds(lora.Config, r=st.sampled_from([1, 2]), bias=st.sampled_from(["none", "all", "lora_only"]),
                    init_lora_weights=st.sampled_from([True, "pissa", "olora"]), use_rslora=st.booleans(),
                    modules_to_save=st.sampled_from([None, ["head"], ["d", "c"]]), target_modules=st.just(["fc"]))
SAVED = st.builds(SavedAdapter, UPDATES, CONFIGS, st.sampled_from(["peft", "mlx"]), PARAMETERS, PARAMETERS, TOKENS, METADATA)


def loads_or_is_refused(saved):
    model = Net()
    before = bits(model)
    try:
        load_adapter(model, saved, "drawn")
    except FormatError as error:
        assert bits(model) == before and len(str(error)) < 20_000
        return
    written = saved_adapter(model)
    again = Net()
    load_adapter(again, written, "again")
    np.testing.assert_array_equal(again.emb.weight.data if hasattr(again.emb, "weight") else 0,
                                  model.emb.weight.data if hasattr(model.emb, "weight") else 0)
    lora.remove(model, "drawn")
    after = bits(model)
    assert after[0] == before[0]
    changed = {a[0] for a, b in zip(after[1], before[1]) if a[1:3] != b[1:3]}
    assert changed <= {f"{path}.bias" for path in ("fc", "conv", "head")}  # as `lora.inject` trains them, in place


@given(SAVED)
def test_drawn(saved):
    loads_or_is_refused(saved)


FITTING = st.fixed_dictionaries({"fc": st.builds(
    Update, st.just("linear"), st.just(np.ones((2, 4), "float32")), st.just(np.ones((4, 2), "float32")), SCALES)})


@given(st.builds(SavedAdapter, FITTING, CONFIGS, st.just("peft"), PARAMETERS, PARAMETERS, TOKENS, METADATA))
def test_drawn_around_an_update_that_fits(saved):
    loads_or_is_refused(saved)


@pytest.mark.parametrize("s", [0.0, float("nan"), float("-inf")])
def test_a_scaling_that_is_none(s):
    saved = SavedAdapter({"fc": Update("linear", np.ones((1, 4), "float32"), np.ones((4, 1), "float32"), s)}, lora.Config())
    with pytest.raises(FormatError, match="finite scaling"):
        load_adapter(Net(), saved)
