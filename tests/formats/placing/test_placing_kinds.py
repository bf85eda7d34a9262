"""Every kind of layer and update, in and out again: rows 6, 7, 12, 13, 14, 22 and 25 of the cases, and drawn ones."""
import dataclasses

import numpy as np
import pytest
from conftest import fetch

import minilora
from minilora import lora, nn
from minilora.errors import FormatError
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.saving import saved_adapter


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


class One(nn.Module):
    def __init__(self, layer, weight=None, bias=None):
        self.x = layer
        if weight is not None:
            layer.weight.data = np.array(weight, "float64")
        if bias is not None:
            layer.bias.data = np.array(bias, "float64")

    def forward(self, x):
        return self.x(x)


def one(update, **settings):
    return SavedAdapter({"x": update}, lora.Config(**{"r": update.r, "lora_alpha": update.s * update.r,
                                                      "target_modules": ["x"], **settings}))


def linear(W, bias=False):
    return One(nn.Linear(np.shape(W)[1], len(W), bias=bias, dtype="float64", rng=0), W)


def arrays(*values):
    return [np.array(value, "float64") for value in values]


def delta(model):
    """W' of the layer as a matrix (out, in), from its outputs."""
    x = np.eye(model.x.weight.shape[1])
    return np.array(model(x).data).T


def same(got, expected):
    assert got.kind == expected.kind and got.s == expected.s
    for name in ("A", "B", "bias", "magnitude"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)


# -- starts that took part of the weight: rows 6 and 7 -------------------------------------------------------------------

def test_an_untrained_pissa_file_is_the_base():
    model, (A, B) = linear(np.diag([3.0, 2, 1])), arrays([[3 ** 0.5, 0, 0]], [[3 ** 0.5], [0], [0]])
    report = load_adapter(model, one(Update("linear", A, B, 1.0), init_lora_weights="pissa"))
    np.testing.assert_allclose(delta(model), np.diag([3.0, 2, 1]), atol=1e-12)
    np.testing.assert_array_equal(model.x.weight.data, np.diag([3.0, 2, 1]))
    assert "start of 'pissa'" in str(report)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_of_another_program_is_the_same_whatever_its_signs(init, sign):
    W, s, r = draw(5, 4), 1.5, 2
    if init == "pissa":
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        A0, B0 = np.sqrt(S[:r, None] / s) * Vt[:r] * sign, U[:, :r] * np.sqrt(S[:r] / s) * sign
    else:
        Q, R = np.linalg.qr(W)
        A0, B0 = R[:r] * sign, Q[:, :r] * sign
    A, B = A0 + 0.1 * draw(r, 4, seed=1), B0 + 0.1 * draw(5, r, seed=2)  # trained
    model = linear(W)
    load_adapter(model, one(Update("linear", A, B, s), init_lora_weights=init), trainable=True)
    theirs = W - s * B0 @ A0 + s * B @ A
    np.testing.assert_allclose(delta(model), theirs, atol=1e-12)
    # written: an ordinary adapter of rank 2 r for the unchanged weight, which gives the same again
    saved = saved_adapter(model)
    update = saved.updates["x"]
    assert update.r == 2 * r and update.s == s and saved.config.init_lora_weights is True
    again = linear(W)
    load_adapter(again, saved)
    np.testing.assert_allclose(delta(again), theirs, atol=1e-12)
    assert again.x.adapter.start_A is None and not model.x.adapter.start_A.trainable and model.x.lora_A.trainable


@pytest.mark.parametrize("use_rslora, s", [(False, 1.5), (True, 3 / 2 ** 0.5)])
def test_a_pissa_adapter_of_ours_doubles_its_rank_and_keeps_s(use_rslora, s):
    model = linear(draw(5, 4))
    lora.inject(model, lora.Config(r=2, lora_alpha=3, target_modules=["x"], init_lora_weights="pissa", use_rslora=use_rslora))
    model.x.lora_B.data += draw(5, 2)
    saved = saved_adapter(model)
    assert saved.updates["x"].s == pytest.approx(s, rel=1e-15) and saved.updates["x"].r == 4
    again = linear(draw(5, 4))
    report = load_adapter(again, saved)
    np.testing.assert_allclose(delta(again), delta(model), atol=1e-12)
    assert report.layers[0].lora_alpha == pytest.approx(4.242640687 if use_rslora else 6)


def test_a_rank_that_the_weight_has_not():
    with pytest.raises(FormatError, match="r is at most 2"):
        load_adapter(linear(draw(5, 2)), one(Update("linear", draw(3, 2), draw(5, 3), 1.0), init_lora_weights="pissa"))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_other_starts_leave_no_trace(init):
    W, A, B = draw(4, 4), draw(2, 4, seed=1), draw(4, 2, seed=2)
    model = linear(W)
    load_adapter(model, one(Update("linear", A, B, 0.5), init_lora_weights=init))
    np.testing.assert_allclose(delta(model), W + 0.5 * B @ A, atol=1e-12)


# -- linear layers -----------------------------------------------------------------------------------------------------------

def test_a_gpt2_matrix_is_stored_the_other_way_and_a_and_b_are_not():
    stored, (A, B) = np.array([[1.0, 2, 3], [4, 5, 6]]), arrays([[1, 1]], [[1], [0], [2]])
    model = linear(stored.T)  # here (out, in)
    report = load_adapter(model, one(Update("linear", A, B, 1.0), fan_in_fan_out=True))
    lora.merge(model)
    np.testing.assert_array_equal(model.x.weight.data.T, [[2, 2, 5], [5, 5, 8]])
    assert report.layers[0].kind == "linear"
    lora.unmerge(model)
    assert saved_adapter(model).config.fan_in_fan_out
    # a layer of ours that stores its weight so
    again = One(lora.Linear(2, 3, fan_in_fan_out=True, bias=False, dtype="float64", rng=0))
    again.x.weight.data = stored.copy()
    load_adapter(again, one(Update("linear", A, B, 1.0)), "beside")
    np.testing.assert_array_equal(np.array(again(np.eye(2)).data), [[2, 2, 5], [5, 5, 8]])


def test_lora_bias_is_scaled():
    W, A, B, b = draw(3, 4), draw(2, 4, seed=1), draw(3, 2, seed=2), draw(3, seed=3)
    model, update = linear(W), Update("linear", A, B, 0.5, bias=b)
    load_adapter(model, one(update, lora_bias=True))
    x = draw(5, 4)
    np.testing.assert_allclose(model(x).data, x @ W.T + 0.5 * (x @ A.T @ B.T + b), rtol=1e-12)
    same(saved_adapter(model).updates["x"], update)
    assert saved_adapter(model).config.lora_bias


def test_dora_with_the_lengths_of_the_file():
    model, (A, B, m) = linear([[3, 4], [0, 2]]), arrays([[1, 1]], [[0], [0]], [10, 2])
    update = Update("linear", A, B, 2.0, magnitude=m)
    load_adapter(model, one(update, use_dora=True))
    np.testing.assert_allclose(delta(model), [[6, 8], [0, 2]], rtol=1e-12)
    same(saved_adapter(model).updates["x"], update)
    assert saved_adapter(model).config.use_dora


def test_lengths_and_biases_of_another_length():
    for name, text in (("bias", "expected bias"), ("magnitude", "expected magnitude")):
        with pytest.raises(FormatError, match=text):
            load_adapter(linear(draw(3, 4)), one(Update("linear", draw(1, 4), draw(3, 1), 1.0, **{name: draw(4)})))
    with pytest.raises(FormatError, match="beside DoRA"):
        load_adapter(linear(draw(3, 4)), one(Update("linear", draw(1, 4), draw(3, 1), 1.0, draw(3), draw(3))))


def test_a_fused_and_a_projected_layer_are_written_as_what_they_equal():
    x = draw(5, 4)
    fused, behind = dict(enable_lora=(True, False, True)), dict(on_output=True)
    for made, bias in ((fused, True), (behind, True), (behind, False)):
        base = nn.Linear(4, 6, bias=bias, dtype="float64", rng=0)
        model = One(lora.adapt(base, r=2, lora_alpha=3, rng=1, **made))
        model.x.lora_B.data[...] = draw(*model.x.lora_B.shape, seed=2)
        saved = saved_adapter(model)
        again = One(nn.Linear(4, 6, bias=bias, dtype="float64", rng=0))
        load_adapter(again, saved)
        np.testing.assert_allclose(again(x).data, model(x).data, rtol=1e-12)
        assert saved.config.lora_bias == ("on_output" in made and bias)
        with pytest.raises(FormatError, match="takes no other"):
            load_adapter(model, saved, "more")


def test_an_adapter_given_as_factors_has_a_config_in_its_file():
    model = linear(draw(3, 4))
    lora.inject_updates(model, {"x": lora.LowRank(draw(2, 4), draw(3, 2), 0.3)}, "given")
    saved = saved_adapter(model)
    assert saved.updates["x"].s == 0.3 and saved.config.r == 2 and saved.config.target_modules == ("x",)
    assert saved.config.scaling_for(2, saved.config.lora_alpha) == pytest.approx(0.3)


# -- tables ------------------------------------------------------------------------------------------------------------------

def table(W):
    return One(nn.Embedding(*np.shape(W), dtype="float64", rng=0), W)


def test_a_table_with_its_update():
    E, (A, B) = np.array([[1.0, 0], [0, 1], [1, 1]]), arrays([[0, 1, 0]], [[1], [2]])
    model, update = table(E), Update("embedding", A, B, 2.0)
    load_adapter(model, one(update))
    np.testing.assert_array_equal(model([0, 1, 2]).data, [[1, 0], [2, 5], [1, 1]])
    np.testing.assert_array_equal(model.x.logits(np.array([[1.0, 2]])).data, [[1, 2, 3]])  # as in PEFT: test_placing_tied
    same(saved_adapter(model).updates["x"], update)
    np.testing.assert_array_equal(model.x.weight.data, E)


def test_a_table_with_lengths_of_its_columns():
    E, A, B, m = draw(5, 3), draw(2, 5, seed=1), draw(3, 2, seed=2), np.abs(draw(3, seed=3))
    model, update = table(E), Update("embedding", A, B, 0.5, magnitude=m)
    load_adapter(model, one(update, use_dora=True))
    V = E + 0.5 * (B @ A).T
    np.testing.assert_allclose(model(np.arange(5)).data, V * m / np.linalg.norm(V, axis=0), rtol=1e-12)
    same(saved_adapter(model).updates["x"], update)


def test_the_start_of_pissa_is_none_of_a_table():
    E, A, B = draw(5, 3), draw(2, 5, seed=1), draw(3, 2, seed=2)
    model = table(E)
    load_adapter(model, one(Update("embedding", A, B, 0.5), init_lora_weights="pissa"))
    np.testing.assert_allclose(model(np.arange(5)).data, E + 0.5 * (B @ A).T, rtol=1e-12)


def test_a_tied_head_by_itself_leaves_the_table():
    """Row 12, where head and table are two layers that share one Parameter."""
    class Tied(nn.Module):
        def __init__(self):
            self.emb, self.lm_head = nn.Embedding(3, 2, dtype="float64", rng=0), nn.Linear(2, 3, False, dtype="float64", rng=0)
            self.emb.weight.data = np.array([[1.0, 0], [0, 1], [1, 1]])
            self.lm_head.weight = self.emb.weight

        def forward(self, h):
            return self.lm_head(h)

    model, (A, B) = Tied(), arrays([[1, 1]], [[1], [0], [2]])
    saved = SavedAdapter({"lm_head": Update("linear", A, B, 2.0)}, lora.Config(r=1, lora_alpha=2, target_modules=["lm_head"]))
    load_adapter(model, saved)
    np.testing.assert_array_equal(model(np.array([[1.0, 2]])).data, [[7, 2, 15]])
    np.testing.assert_array_equal(model.emb([0, 1, 2]).data, [[1, 0], [0, 1], [1, 1]])


# -- convolutions ------------------------------------------------------------------------------------------------------------

def correlate(x, W, stride, padding, dilation, groups):
    """A convolution by its definition: sums over channels and kernel places."""
    x = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in padding]])
    spatial = [(n - d * (k - 1) - 1) // t + 1 for n, k, t, d in zip(x.shape[2:], W.shape[2:], stride, dilation)]
    y = np.zeros((len(x), len(W), *spatial))
    per_group, outs = W.shape[1], len(W) // groups
    for place in np.ndindex(*spatial):
        for k in np.ndindex(*W.shape[2:]):
            at = tuple(p * t + j * d for p, t, j, d in zip(place, stride, k, dilation))
            for o in range(len(W)):
                first = o // outs * per_group
                y[(slice(None), o, *place)] += x[(slice(None), slice(first, first + per_group), *at)] @ W[(o, slice(None), *k)]
    return y


CONVS = {  # class, kernel, settings
    "1d": (nn.Conv1d, (3,), {}), "1d dilated": (nn.Conv1d, (2,), dict(dilation=2, stride=2, padding=1)),
    "2d": (nn.Conv2d, (2, 3), {}), "2d dilated": (nn.Conv2d, (2, 2), dict(dilation=(2, 1), padding=(1, 0))),
    "2d groups": (nn.Conv2d, (2, 2), dict(groups=2)), "1d groups": (nn.Conv1d, (3,), dict(groups=2, dilation=2)),
}


def conv(name):
    cls, kernel, settings = CONVS[name]
    return One(cls(4, 6, kernel if len(kernel) > 1 else kernel[0], bias=False, dtype="float64", rng=0, **settings))


def conv_update(name, r=2):
    """A and B in PEFT's shapes; of a convolution with groups A is 0 for the channels of other groups."""
    _, kernel, settings = CONVS[name]
    groups = settings.get("groups", 1)
    A, B = draw(r, 4, *kernel, seed=1), draw(6, r // groups, *[1] * len(kernel), seed=2)
    for g in range(groups):
        for h in range(groups):
            if g != h:
                A[g * r // groups:(g + 1) * r // groups, h * 4 // groups:(h + 1) * 4 // groups] = 0
    return Update("convolution", A, B, 0.5)


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name):
    model, update = conv(name), conv_update(name)
    layer, groups = model.x, getattr(model.x, "groups", 1)
    x = draw(2, 4, *([9] if len(CONVS[name][1]) == 1 else [6, 7]), seed=3)
    settings = layer.stride, layer.padding, layer.dilation
    A, B = update.A, update.B.reshape(6, -1)
    D, outs, ranks, channels = np.zeros(layer.weight.shape), 6 // groups, 2 // groups, 4 // groups
    for g in range(groups):
        rows, inside = slice(g * ranks, (g + 1) * ranks), slice(g * channels, (g + 1) * channels)
        D[g * outs:(g + 1) * outs] = np.tensordot(B[g * outs:(g + 1) * outs], A[rows, inside], 1)
    expected = correlate(x, layer.weight.data + 0.5 * D, *settings, groups)
    load_adapter(model, one(update))
    np.testing.assert_allclose(model(x).data, expected, rtol=1e-10, atol=1e-12)
    same(saved_adapter(model).updates["x"], update)


def test_a_that_reads_the_channels_of_other_groups_is_refused():
    update = conv_update("2d groups")
    update.A[0, 3, 0, 0] = 1.0
    with pytest.raises(FormatError, match="1 numbers of A lie outside of their own group"):
        load_adapter(conv("2d groups"), one(update))
    with pytest.raises(FormatError, match="not a multiple of the 2 groups"):
        load_adapter(conv("2d groups"), one(Update("convolution", draw(3, 4, 2, 2), draw(6, 1, 1, 1), 1.0)))


def test_a_with_the_channels_of_its_group_alone_is_taken_too():
    update, model = conv_update("2d groups"), conv("2d groups")
    own = np.concatenate([update.A[:1, :2], update.A[1:, 2:]])
    load_adapter(model, one(dataclasses.replace(update, A=own)))
    same(saved_adapter(model).updates["x"], update)


@pytest.mark.parametrize("name, kind", [("conv", "linear"), ("linear", "convolution")])
def test_a_kernel_of_one_place_is_a_matrix(name, kind):
    W, A, B = draw(3, 4), draw(2, 4, seed=1), draw(3, 2, seed=2)
    if name == "conv":
        model = One(nn.Conv2d(4, 3, 1, bias=False, dtype="float64", rng=0), W.reshape(3, 4, 1, 1))
        update, x = Update(kind, A, B, 0.5), draw(1, 4, 5, 5)
        expected = np.einsum("oc,nchw->nohw", W + 0.5 * B @ A, x)
    else:
        model, x = linear(W), draw(5, 4)
        update = Update(kind, A.reshape(2, 4, 1, 1), B.reshape(3, 2, 1, 1), 0.5)
        expected = x @ (W + 0.5 * B @ A).T
    load_adapter(model, one(update))
    np.testing.assert_allclose(model(x).data, expected, rtol=1e-12)


class All(nn.Module):
    """A layer of every kind, and a head."""

    def __init__(self):
        made = dict(dtype="float64", rng=np.random.default_rng(0))
        self.emb, self.fc, self.line = nn.Embedding(6, 4, **made), nn.Linear(4, 4, **made), nn.Conv1d(3, 5, 2, **made)
        self.head = nn.Linear(3, 2, **made)

    def forward(self, ids):
        return self.head(self.line(self.fc(self.emb(ids))))


@pytest.mark.parametrize("settings", [
    {}, dict(use_dora=True), dict(init_lora_weights="pissa", target_modules=["fc"]),
    dict(target_modules=["fc"], lora_bias=True, bias="all"),
    dict(target_modules=["fc", "line"], trainable_token_indices=[3, 1])], ids=str)
def test_on_every_device(device, settings):
    """Written from one device and loaded onto it: the same outputs, to the bit; arrays of the value are on the host."""
    usual = dict(r=2, lora_alpha=3, target_modules=["emb", "fc", "line"], modules_to_save=["head"])
    config = lora.Config(**{**usual, **settings})
    model, ids = All(), [[0, 3, 5], [1, 1, 3]]
    lora.inject(model, config, rng=0)
    for path, p in model.named_parameters():
        if p.trainable:
            p.data += 0.25
    saved = saved_adapter(model)
    arrays_of = [*saved.saved.values(), *saved.biases.values(), *(rows.rows for rows in saved.tokens.values()),
                 *(a for u in saved.updates.values() for a in (u.A, u.B, u.bias, u.magnitude) if a is not None)]
    assert all(isinstance(array, np.ndarray) for array in arrays_of)
    again = All()
    report = load_adapter(again, saved)
    assert report.fingerprint.startswith("the base is") and {p.device.name for p in again.parameters()} == {device}
    got, expected = fetch(again.eval()(ids)), fetch(model.eval()(ids))
    if "pissa" in settings.values():
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    else:
        np.testing.assert_array_equal(got, expected)
    table = fetch(again.emb.weight)
    lora.merge(again)
    np.testing.assert_allclose(fetch(again(ids)), expected, rtol=1e-10)
    lora.unmerge(again)
    np.testing.assert_array_equal(fetch(again.emb.weight), table)


def test_after_training_what_is_saved_gives_the_same_outputs():
    rng = np.random.default_rng(0)
    for update, model, x in ((conv_update("2d"), conv("2d"), draw(2, 4, 6, 7)),
                             (Update("embedding", draw(2, 5), draw(3, 2), 0.5), table(draw(5, 3)), rng.integers(0, 5, (4,)))):
        load_adapter(model, one(update), trainable=True)
        optimizer = minilora.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) * model(x)).sum().backward()
            optimizer.step()
        again = type(model)(model.x.plain())
        load_adapter(again, saved_adapter(model))
        np.testing.assert_array_equal(again(x).data, model(x).data)
