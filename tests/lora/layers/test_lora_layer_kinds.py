"""Every kind of LoRA layer with every option: against the formula with the dense update in plain NumPy, and numerically."""
import numpy as np
import pytest
from conftest import fetch, place
from tiny_transformers import build, randomise, token_ids

import minilora
from minilora import engine, lora, nn, ops, optim, testing
from minilora.errors import ConfigError, DTypeError, ShapeError, StateError

IDS = [[1, 3, 1], [0, 2, 5]]
ROWS = np.random.default_rng(5).standard_normal((2, 3, 5))
CONV = dict(r=2, lora_alpha=3)

# kind: (how it is made, its input). r = 2, s = 3 / 2 unless an option says otherwise.
KINDS = {
    "Linear": (lambda **o: lora.Linear(5, 4, **{"r": 2, "lora_alpha": 3, **o}), ROWS),
    "Linear without bias": (lambda **o: lora.Linear(5, 4, bias=False, **{"r": 2, "lora_alpha": 3, **o}), ROWS[0]),
    "fan_in_fan_out": (lambda **o: lora.Linear(5, 4, fan_in_fan_out=True, **{"r": 2, "lora_alpha": 3, **o}), ROWS),
    "Embedding": (lambda **o: lora.Embedding(6, 4, **{"r": 2, "lora_alpha": 3, **o}), IDS),
    "Embedding padding_idx": (lambda **o: lora.Embedding(6, 4, padding_idx=1, **{"r": 2, "lora_alpha": 3, **o}), IDS),
    "Conv1d": (lambda **o: lora.Conv1d(3, 4, 3, stride=2, padding=1, **{**CONV, **o}), ROWS[:, :, :].copy()),
    "Conv1d groups": (lambda **o: lora.Conv1d(4, 6, 2, groups=2, **{**CONV, **o}), np.tile(ROWS, (1, 2, 1))[:, :4] ** 2),
    "Conv2d": (lambda **o: lora.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 0), **{**CONV, **o}),
               np.random.default_rng(6).standard_normal((2, 2, 3, 5))),
    "Conv2d groups": (lambda **o: lora.Conv2d(4, 4, (1, 2), groups=2, padding=1, **{**CONV, **o}),
                      np.random.default_rng(7).standard_normal((2, 4, 2, 3))),
    "Conv2d dilation": (lambda **o: lora.Conv2d(2, 3, 2, dilation=(2, 3), bias=False, **{**CONV, **o}),
                        np.random.default_rng(8).standard_normal((2, 2, 4, 5))),
}

# option: settings of the adapter. "two" and "three" have more adapters, with weights: see `make`.
OPTIONS = {
    "plain": {}, "rslora": dict(use_rslora=True), "dropout": dict(lora_dropout=0.4), "lora_bias": dict(lora_bias=True),
    "lora_bias, dropout": dict(lora_bias=True, lora_dropout=0.4), "pissa": dict(init_lora_weights="pissa"),
    "pissa, dropout": dict(init_lora_weights="pissa", lora_dropout=0.4),
    "dora": dict(use_dora=True), "dora exact": dict(use_dora=True, exact=True),
    "dora exact, dropout": dict(use_dora=True, exact=True, lora_dropout=0.4),
    "dora pissa": dict(use_dora=True, init_lora_weights="pissa"), "two": {}, "two with dora": dict(use_dora=True, exact=True),
}


def fits(kind, option):
    settings = OPTIONS[option]
    special = settings.get("init_lora_weights") or settings.get("lora_bias") or settings.get("lora_dropout")
    return not ("Embedding" in kind and special) and not ("groups" in kind and "init_lora_weights" in settings)


PAIRS = [(kind, option) for kind in KINDS for option in OPTIONS if fits(kind, option)]
pairs = pytest.mark.parametrize("kind, option", PAIRS, ids=map(", ".join, PAIRS))


def scatter(layer, seed=1, std=0.5):
    """Every trained number away from its start, whatever it was."""
    rng = np.random.default_rng(seed)
    for name, p in layer.named_parameters():
        if "adapters" in name and "start" not in name:
            p.data += place((std * rng.standard_normal(p.shape)).astype(p.dtype))
    return layer


def make(kind, option="plain", dtype="float64", scattered=True):
    layer = KINDS[kind][0](dtype=dtype, rng=0, **OPTIONS[option])
    if option.startswith("two"):
        layer.attach("other", lora.adapt(layer.plain(), r=4, lora_alpha=2, rng=2).adapter)
        layer.active = {"other": -0.5, "default": 2.0}
    return scatter(layer) if scattered else layer


def input_of(kind, dtype="float64"):
    x = KINDS[kind][1]
    return x if "Embedding" in kind else minilora.Parameter(place(x, dtype))


# -- the layer in plain NumPy -------------------------------------------------------------------------------------------


def conv(layer, x, W):
    """One output after the other. Works for complex numbers."""
    x, W = np.asarray(x), np.asarray(W)
    window = [layer.stride, layer.padding, layer.dilation]
    if W.ndim == 3:
        x, W, window = x[:, :, None], W[:, :, None], [(1, *window[0]), (0, *window[1]), (1, *window[2])]
    (sh, sw), (ph, pw), (dh, dw) = window
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    (n, _, h, w), (out, per, kh, kw) = x.shape, W.shape
    y = np.zeros((n, out, (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1), np.result_type(x, W))
    for o in range(out):
        first = o // (out // layer.groups) * per
        for i, j in np.ndindex(*y.shape[2:]):
            seen = x[:, first:first + per, i * sh:i * sh + dh * kh:dh, j * sw:j * sw + dw * kw:dw]
            y[:, o, i, j] = np.einsum("nchw,chw->n", seen, W[o])
    return y[:, :, 0] if len(layer.stride) == 1 else y


def base(layer, x, W):
    """The frozen layer without its bias, for a weight (out, ...) whose rows are outputs; a table is (d, V)."""
    if isinstance(layer, nn.Embedding):
        return np.moveaxis(W[:, np.asarray(x)], 0, -1)
    return np.einsum("...i,oi->...o", x, W) if W.ndim == 2 else conv(layer, x, W)


def dense(layer, v, name):
    """D / s of an adapter, rows of outputs, entry by entry."""
    A, B = v[f"adapters.{name}.lora_A"], v[f"adapters.{name}.lora_B"]
    r, groups = len(A), getattr(layer, "groups", 1)
    D = np.zeros((len(B), *A.shape[1:]), np.result_type(A, B))
    for o, j in np.ndindex(len(B), r // groups):
        D[o] += B[o, j].reshape(-1)[0] * A[o // (len(B) // groups) * (r // groups) + j]
    if f"adapters.{name}.start_A" in v:
        start_A, start_B = v[f"adapters.{name}.start_A"], v[f"adapters.{name}.start_B"]
        D = D + np.tensordot(start_B.reshape(len(B), r), start_A, 1)
    return D


def update(layer, v, x, name, lengths=None):
    """What an adapter adds to the output; `lengths` are taken as those of DoRA in place of the true ones."""
    adapter = layer.adapters[name]
    W = weight_of(layer, v)
    V = W + adapter.scaling * dense(layer, v, name)
    new = V
    if adapter.magnitude is not None:
        c = np.sqrt((V * V).reshape(len(V), -1).sum(1)) if lengths is None else lengths[name]
        new = (v[f"adapters.{name}.magnitude"] / c).reshape(-1, *[1] * (V.ndim - 1)) * V
    y = base(layer, x, new - W)
    if adapter.lora_bias is not None:
        y = y + by_output(layer, adapter.scaling * v[f"adapters.{name}.lora_bias"])
    return y


def weight_of(layer, v):
    turned = isinstance(layer, nn.Embedding) or getattr(layer, "fan_in_fan_out", False)
    return v["weight"].T if turned else v["weight"]


def by_output(layer, b):
    return b.reshape(-1, *[1] * len(getattr(layer, "stride", ())))


def formula(layer, v, x, dropped=None, lengths=None):
    y = base(layer, x, weight_of(layer, v))
    if "bias" in v:
        y = y + by_output(layer, v["bias"])
    for name, weight in layer.active.items():
        y = y + weight * update(layer, v, x if dropped is None else dropped, name, lengths)
    return y


def values(layer):
    return {name: fetch(p).astype("float64") for name, p in layer.named_parameters()}


def close(got, expected, rtol=1e-12, name=""):
    got = fetch(got)
    assert got.shape == expected.shape, name
    assert np.abs(got - expected).max(initial=0.0) <= rtol * max(1.0, np.abs(expected).max(initial=0.0)), name


def mask_of(layer, x):
    """What the next forward pass in training will multiply the adapter's input with."""
    dropout = layer.adapter.lora_dropout
    return fetch(ops.dropout(minilora.tensor(np.ones(x.shape)), dropout.p, dropout.seed, dropout.step + 1))


# -- output, gradients, merging -----------------------------------------------------------------------------------------


@pairs
def test_output_is_that_of_the_dense_update(device, kind, option):
    layer, x = make(kind, option), input_of(kind)
    host = fetch(x) if isinstance(x, minilora.Tensor) else x
    dropped = host * mask_of(layer, host) if "dropout" in option else None
    assert dropped is None or (dropped == 0).any()
    v = values(layer)
    close(layer(x), formula(layer, v, host, dropped))
    layer.eval()
    close(layer(x), formula(layer, v, host))
    total = sum(weight * update(layer, v, host, name) for name, weight in layer.active.items())
    close(layer.update(x), total)


def detached(option):
    return bool(OPTIONS[option].get("use_dora")) and not OPTIONS[option].get("exact")


@pairs
def test_gradcheck(kind, option):
    """Of x and of all that is trained. The next test has what is no derivative: A and B while the lengths count as constants,
    which is DoRA as published, and the row of a padding_idx, which is absent here."""
    layer = make(kind, option)
    trained = {name.split(".")[-1] for name, p in layer.named_parameters() if p.trainable}
    assert {"lora_A", "lora_B"} <= trained <= {"lora_A", "lora_B", "lora_bias", "magnitude"}

    def f(*x):
        for adapter in layer.adapters.values():
            adapter.lora_dropout.step = 0  # the same mask every time
        return layer(*x or [[[2, 3, 2], [0, 2, 5]] if "padding_idx" in kind else IDS])

    if detached(option):
        layer.lora_A.trainable = layer.lora_B.trainable = False
    elif "padding_idx" in kind and OPTIONS[option].get("exact"):
        layer.adapters["default"].lora_A.trainable = False  # its column of padding counts in the lengths and is not trained
    report = testing.gradcheck(f, *[] if "Embedding" in kind else [KINDS[kind][1]], parameters=layer.named_parameters(),
                               full_size=20, directions=3)
    assert max(row.error for row in report.check().rows) < 1e-9


def test_padding_gets_no_gradient_through_lengths():
    layer = make("Embedding padding_idx", "dora exact")
    (layer(IDS) ** 2).sum().backward()
    assert not layer.lora_A.grad[:, 1].any()


def lengths_now(layer):
    v = values(layer)
    V = {name: weight_of(layer, v) + adapter.scaling * dense(layer, v, name) for name, adapter in layer.adapters.items()}
    return {name: np.sqrt((matrix ** 2).reshape(len(matrix), -1).sum(1)) for name, matrix in V.items()}


@pairs
def test_gradients_are_those_of_the_formula(kind, option):
    """The complex step through plain NumPy, along two directions for each parameter; the lengths held where they are to be."""
    layer, x = make(kind, option), input_of(kind)
    host = fetch(x) if isinstance(x, minilora.Tensor) else x
    mask = mask_of(layer, host) if "dropout" in option else None
    lengths = lengths_now(layer) if detached(option) else None
    v, rng = values(layer), np.random.default_rng(3)
    y = layer(x)
    dy = rng.standard_normal(y.shape)
    y.backward(place(dy))
    leaves = [(name, p.grad) for name, p in layer.named_parameters() if p.trainable]
    leaves += [("x", x.grad)] if isinstance(x, minilora.Tensor) else []
    for name, gradient in leaves:
        for _ in range(2):
            step = rng.standard_normal(gradient.shape)
            if "padding_idx" in kind and name.endswith("lora_A"):
                step[:, layer.padding_idx] = 0
                assert not gradient[:, layer.padding_idx].any()
            moved = {**v, "x": host, name: (host if name == "x" else v[name]) + 1e-30j * step}
            y = formula(layer, moved, moved["x"], None if mask is None else moved["x"] * mask, lengths)
            assert np.isclose((gradient * step).sum(), (dy * y.imag).sum() / 1e-30, rtol=1e-9, atol=1e-12), name


@pairs
def test_merged_is_unmerged(device, kind, option):
    layer, x = make(kind, option).eval(), input_of(kind)
    before, y = {name: fetch(p).tobytes() for name, p in layer.named_parameters()}, fetch(layer(x))
    if "lora_bias" in option and layer.bias is None:
        with pytest.raises(StateError, match="has a bias .lora_bias. and this layer has none"):
            layer.merge()
    else:
        delta = fetch(layer.delta())
        W = fetch(layer.weight)
        layer.merge()
        close(layer.weight, W + delta, 1e-14)
        close(layer(x), y)
        layer.unmerge()
    assert {name: fetch(p).tobytes() for name, p in layer.named_parameters()} == before
    assert fetch(layer(x)).tobytes() == y.tobytes()


@pairs
def test_dtype_is_kept(kind, option):
    for dtype in ("float16", "float32"):
        layer, x = make(kind, option, dtype), input_of(kind, dtype)
        y = layer(x)
        y.mean().backward()
        arrays = [y, layer.weight, *([] if layer.bias is None else [layer.bias])]
        arrays += [x.grad] if isinstance(x, minilora.Tensor) else []
        assert {str(a.dtype) for a in arrays} == {dtype}
        adapters = [p for adapter in layer.adapters.values() for p in adapter.parameters()]  # never in half precision
        assert {str(a.dtype) for a in (*adapters, *(p.grad for p in adapters if p.trainable))} == {"float32"}
        host = fetch(x).astype("float64") if isinstance(x, minilora.Tensor) else x
        layer.eval()
        close(fetch(layer(x)).astype("float64"), formula(layer, values(layer), host), 200 * np.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_below_a_layer_that_trains_nothing_nothing_is_kept(kind):
    layer = make(kind)
    for p in layer.parameters():
        p.trainable = False
    x = input_of(kind)
    y = layer(minilora.Tensor(x.data) if isinstance(x, minilora.Tensor) else x)
    assert y.node is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_one_operation(kind):
    """As many nodes as the plain layer has: nothing is added up afterwards."""
    layer = make(kind)
    assert len(engine.ledger(layer(input_of(kind))).rows) == 1
    layer = make(kind, "rslora")
    layer.active = {"default": 0.5}
    assert len(engine.ledger(layer(input_of(kind))).rows) == 1


def test_repr():
    found = {kind: repr(make(kind)) for kind in KINDS}
    assert found["Linear"] == "Linear(in_features=5, out_features=4, bias=True, r=2, lora_alpha=3, scaling=1.5)"
    assert found["Embedding padding_idx"] == "Embedding(6, 4, padding_idx=1, r=2, lora_alpha=3, scaling=1.5)"
    assert found["Conv1d"] == ("Conv1d(3, 4, kernel_size=(3,), stride=(2,), padding=(1,), bias=True, r=2, lora_alpha=3, "
                               "scaling=1.5)")
    assert found["Conv2d groups"] == ("Conv2d(4, 4, kernel_size=(1, 2), padding=(1, 1), groups=2, bias=True, r=2, "
                                      "lora_alpha=3, scaling=1.5)")
    layer = make("Linear", "dora pissa")
    assert repr(layer).endswith("scaling=1.5, magnitude, start_A)")
    layer.merge(allow_lossy=True)
    assert repr(layer).endswith("magnitude, start_A, merged)")
    assert repr(make("Linear", "lora_bias, dropout")).endswith("scaling=1.5, lora_dropout=0.4, lora_bias)")
    layer = make("Linear", "two")
    assert repr(layer).endswith("adapters=['default*', 'other*'])")
    layer.active, layer.adapters = {}, {}
    assert repr(layer).endswith("adapters=none)")
    assert repr(make("Linear").adapter) == "Adapter(r=2, lora_alpha=3, scaling=1.5)"


def test_shapes_of_factors():
    shapes = {kind: (make(kind).lora_A.shape, make(kind).lora_B.shape) for kind in KINDS}
    assert shapes == {
        "Linear": ((2, 5), (4, 2)), "Linear without bias": ((2, 5), (4, 2)), "fan_in_fan_out": ((2, 5), (4, 2)),
        "Embedding": ((2, 6), (4, 2)), "Embedding padding_idx": ((2, 6), (4, 2)), "Conv1d": ((2, 3, 3), (4, 2, 1)),
        "Conv1d groups": ((2, 2, 2), (6, 1, 1)), "Conv2d": ((2, 2, 2, 3), (4, 2, 1, 1)),
        "Conv2d groups": ((2, 2, 1, 2), (4, 1, 1, 1)), "Conv2d dilation": ((2, 2, 2, 2), (3, 2, 1, 1))}
    assert make("fan_in_fan_out").weight.shape == (5, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapting_a_plain_layer_shares_its_arrays(device, kind):
    layer = make(kind)
    plain = layer.plain()
    assert type(plain).__module__.startswith("minilora.nn") and repr(plain).split("(")[0] == type(layer).__name__
    assert not vars(plain).keys() & {"adapters", "active", "rows", "way_back", "base_class", "fan_in_fan_out"}
    x = input_of(kind)
    layer.active = {}
    assert fetch(plain(x)).tobytes() == fetch(layer(x)).tobytes()
    again = lora.adapt(plain, r=2, lora_alpha=3, rng=1)
    assert again.weight.data is plain.weight.data and type(again) is type(layer)
    close(again(x), fetch(plain(x)))  # at the start


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_it, error, match", [
    (lambda: lora.Conv1d(4, 6, 2, r=3, groups=2), ConfigError, "r=3: this convolution has 2 groups"),
    (lambda: lora.Conv1d(4, 6, 2, r=2, groups=2, init_lora_weights="olora"), ConfigError, "not for a convolution with 2"),
    (lambda: lora.Embedding(6, 4, r=2, lora_bias=True), ConfigError, "lora_bias is not for embeddings"),
    (lambda: lora.Embedding(6, 4, r=2, init_lora_weights="olora"), ConfigError, "='olora' is not for embeddings"),
    (lambda: lora.Linear(6, 4, lora_bias=True, use_dora=True), ConfigError, "lora_bias: only with"),
    (lambda: lora.Linear(6, 4, lora_bias=True, init_lora_weights="pissa"), ConfigError, "lora_bias: only with"),
    (lambda: lora.Linear(6, 4, init_lora_weights="pisa"), ConfigError, "must be one of True, False, 'gaussian', 'pissa'"),
    (lambda: lora.adapt(nn.LayerNorm(3)), DTypeError, "expected one of nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d"),
    (lambda: lora.adapt(type("Odd", (nn.Linear,), {"forward": lambda self, x: x})(2, 2)), DTypeError, "forward of its own"),
])
def test_settings_that_do_not_go_together(make_it, error, match):
    with pytest.raises(error, match=match):
        make_it()


def test_the_only_adapter_is_asked_for_by_name_when_there_are_two():
    layer = make("Linear", "two")
    with pytest.raises(StateError, match="has 2 adapters: say which one.*'default', 'other'"):
        layer.lora_A
    layer.active = {"other": 1.0}
    assert layer.r == 4 and layer.scaling == 0.5 and layer.lora_A is layer.adapters["other"].lora_A
    with pytest.raises(ConfigError, match="there is an adapter 'other' already"):
        layer.attach("other", layer.adapters["other"])
    layer.active = {}
    with pytest.raises(StateError, match="update: no adapter is active"):
        layer.update(input_of("Linear"))


def test_a_wrong_input_is_an_error_with_numbers():
    with pytest.raises(ShapeError, match="5"):
        make("Linear")(minilora.tensor(np.ones((2, 4))))
    with pytest.raises(ShapeError, match="5"):
        make("Linear", "dora")(minilora.tensor(np.ones((2, 4))))


# -- a tied output head -------------------------------------------------------------------------------------------------


def tiny(**options):
    """A GPT-2 with adapters on the table that makes the logits too, and on a projection."""
    model = randomise(build("gpt2"))
    lora.inject(model, lora.Config(r=2, lora_alpha=3, target_modules=["wte", "c_attn"], **options), rng=0,
                exact=options.get("use_dora", False))
    for i, layer in enumerate([model.wte, *(block.attn.c_attn for block in model.h)]):
        scatter(layer, i, 0.2)
    return model


@pytest.mark.parametrize("options", [{}, dict(use_dora=True)], ids=["plain", "dora"])
def test_tied_head(device, options):
    model = tiny(**options).eval()
    ids, plain = token_ids(2, 4), build("gpt2")
    state = {name.replace("adapters.", ""): fetch(p) for name, p in model.named_parameters() if "adapters" not in name}
    for path in ("wte", "h.0.attn.c_attn", "h.1.attn.c_attn"):
        layer = dict(model.named_modules())[path]
        v = values(layer)
        V = weight_of(layer, v) + layer.scaling * dense(layer, v, "default")
        if options:
            V *= (v["adapters.default.magnitude"] / np.sqrt((V * V).sum(1)))[:, None]
        state[f"{path}.weight"] = V.T if path == "wte" else V
    plain.load_state_dict(state)
    logits, loss = fetch(plain(ids)), fetch(plain.loss(ids, ids))
    close(model(ids), logits)
    close(model.loss(ids, ids), loss)
    before = model.state_dict()
    lora.merge(model)
    close(model(ids), logits)
    close(model.loss(ids, ids), loss)
    lora.unmerge(model)
    assert {name: value.tobytes() for name, value in model.state_dict().items()} == \
        {name: value.tobytes() for name, value in before.items()}


@pytest.mark.parametrize("options", [{}, dict(use_dora=True)], ids=["plain", "dora"])
def test_gradients_through_a_tied_head(options):
    model, ids = tiny(**options), token_ids(2, 4)
    report = testing.gradcheck(lambda: model.loss(ids, ids), parameters=model.named_parameters(), full_size=0, directions=2)
    assert max(row.error for row in report.check().rows) < 1e-9
    assert {row.name for row in report.rows} >= {"wte.adapters.default.lora_A", "h.1.attn.c_attn.adapters.default.lora_B"}


def test_logits_of_several_adapters_add_up():
    model = tiny()
    lora.inject(model, lora.Config(r=1, target_modules=["wte"], use_dora=True), "second", rng=1, exact=True)
    scatter(model.wte, 4, 0.2)
    lora.activate(model, "default", "second", weights=[0.5, -1])
    h = np.random.default_rng(0).standard_normal((2, 32))
    v, W = values(model.wte), fetch(model.wte.weight).T
    V = W + model.wte.adapters["second"].scaling * dense(model.wte, v, "second")
    V *= (v["adapters.second.magnitude"] / np.sqrt((V * V).sum(1)))[:, None]
    table = W + 0.5 * 1.5 * dense(model.wte, v, "default") - (V - W)
    close(model.wte.logits(minilora.tensor(h)), h @ table)
    lora.activate(model, "default", weights=[-2])
    close(model.wte.logits(minilora.tensor(h)), h @ (W - 2 * 1.5 * dense(model.wte, v, "default")))
    lora.activate(model, "default", "second", weights=[0.5, -1])
    model.eval()
    model.wte.merge(allow_lossy=True)
    close(model.wte.logits(minilora.tensor(h)), h @ table)


@pairs
def test_a_half_precision_base_is_trained_beside(kind, option):
    """A first step of Adam moves every trained number by about lr, and leaves nothing that is not finite."""
    layer, x = make(kind, option, "float16"), input_of(kind, "float16")
    layer.train()
    for adapter in layer.adapters.values():
        for p in adapter.parameters():
            p.data = p.data * 30.0  # updates of hundreds: their squares are beyond float16
    before = {name: fetch(p) for name, p in layer.named_parameters()}
    optimizer = optim.Adam([p for p in layer.parameters() if p.dtype == "float32"], lr=0.5)
    (layer(x) * 1e-3).sum().backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        moved = np.abs(fetch(p) - before[name])
        assert np.isfinite(fetch(p)).all() and moved.max() <= 0.5 * 1.001, name
        assert (moved.max() > 0.4) == (p.grad is not None and bool(np.abs(fetch(p.grad)).max() > 1e-4)), name
