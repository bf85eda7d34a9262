"""Every kind of adapter against PEFT's. Run with -m parity, where torch, peft and transformers are installed.

In float32: outputs, and gradients of the input and of all that is trained. With -s the largest differences are printed, one
line for each configuration, relative to the largest entry of PEFT's array.
"""
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import lora, nn
from minilora.lora.layers.start import new_adapter

pytestmark = pytest.mark.parity
RTOL = 1e-5
LARGEST = {}  # configuration: the largest relative difference of any array


@pytest.fixture(scope="module")
def libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        yield SimpleNamespace(torch=pytest.importorskip("torch"), peft=pytest.importorskip("peft"),
                              transformers=pytest.importorskip("transformers"))
    print("\n" + "\n".join(f"{name:<44} {error:.1e}" for name, error in LARGEST.items()))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def differ(name, got, expected, what):
    """Compare, and remember the largest difference under the configuration's name."""
    got, expected = fetch(got), expected.detach().numpy()
    assert got.dtype == expected.dtype == np.float32 and got.shape == expected.shape, what
    size = np.abs(expected).max(initial=0.0)
    LARGEST[name] = max(LARGEST.get(name, 0.0), np.abs(got - expected).max(initial=0.0) / (size or 1.0))
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=RTOL * size, err_msg=f"{name}: {what}")


class Ours(nn.Module):
    def __init__(self, fc, head=None):
        self.fc = fc
        if head is not None:
            self.head = head

    def forward(self, x):
        y = self.fc(x)
        return self.head(y) if hasattr(self, "head") else y


def theirs(libraries, fc, head=None):
    class Theirs(libraries.torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = fc
            if head is not None:
                self.head = head

        def forward(self, x):
            y = self.fc(x)
            return self.head(y) if head is not None else y

    return Theirs()


# What to wrap: (ours, theirs, input), from the same settings.
def kinds(libraries):
    torch = libraries.torch.nn
    return {
        "Linear": (lambda: nn.Linear(7, 5), lambda: torch.Linear(7, 5), draw(4, 7)),
        "Linear, no bias": (lambda: nn.Linear(7, 5, bias=False), lambda: torch.Linear(7, 5, bias=False), draw(2, 3, 7)),
        "Conv1D": (None, lambda: libraries.transformers.pytorch_utils.Conv1D(5, 7), draw(2, 3, 7)),
        "Embedding": (lambda: nn.Embedding(11, 6), lambda: torch.Embedding(11, 6), np.array([[1, 4, 1], [9, 0, 3]])),
        "Embedding, padding": (lambda: nn.Embedding(11, 6, padding_idx=4), lambda: torch.Embedding(11, 6, padding_idx=4),
                               np.array([[1, 4, 1], [9, 0, 4]])),
        "Conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.Conv1d(4, 6, 3), draw(2, 4, 9)),
        "Conv1d, stride": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
                           lambda: torch.Conv1d(4, 6, 3, stride=2, padding=1), draw(2, 4, 9)),
        "Conv2d": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.Conv2d(3, 5, 3), draw(2, 3, 6, 7)),
        "Conv2d, stride": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)),
                           lambda: torch.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), draw(2, 3, 6, 7)),
        "Conv2d, no bias": (lambda: nn.Conv2d(3, 5, 1, bias=False), lambda: torch.Conv2d(3, 5, 1, bias=False),
                            draw(2, 3, 4, 4)),
    }


OPTIONS = {
    "plain": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True),
    "dora, rslora, dropout in eval": dict(use_dora=True, use_rslora=True, lora_dropout=0.3), "lora_bias": dict(lora_bias=True),
    "gaussian": dict(init_lora_weights="gaussian"), "orthogonal": dict(init_lora_weights="orthogonal"),
    "pissa": dict(init_lora_weights="pissa"), "olora": dict(init_lora_weights="olora"),
    "pissa, rslora": dict(init_lora_weights="pissa", use_rslora=True),
}
CONVS = ("plain", "rslora", "dora", "lora_bias", "gaussian")
FITS = {
    "Linear": tuple(OPTIONS), "Linear, no bias": ("plain", "dora", "pissa"),
    "Conv1D": ("plain", "rslora", "dora", "lora_bias", "pissa"),
    "Embedding": ("plain", "rslora", "dora"), "Embedding, padding": ("plain", "dora"),
    "Conv1d": CONVS, "Conv1d, stride": ("plain", "dora"), "Conv2d": CONVS, "Conv2d, stride": ("plain", "rslora", "dora"),
    "Conv2d, no bias": ("plain", "dora"),
}
PAIRS = [(kind, option) for kind, options in FITS.items() for option in options]


def settings_of(option, **more):
    return {"r": 4, "lora_alpha": 6, "target_modules": ["fc"], **OPTIONS[option], **more}


def wrap(libraries, base, settings, names=("default",), head=None):
    """PEFT's model, with every trained number drawn anew; and a copy of the base's weights as they were before."""
    torch, peft = libraries.torch, libraries.peft
    torch.manual_seed(0)
    plain = theirs(libraries, base(), head and head())
    before = {name: p.detach().numpy().copy() for name, p in plain.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain, peft.LoraConfig(**settings), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, peft.LoraConfig(**settings))
    return model, before


def adapter_tensors(layer, name):
    """PEFT's tensors of one adapter under our names."""
    found = {}
    if name in layer.lora_A:
        found = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight, "lora_bias": layer.lora_B[name].bias}
    elif name in layer.lora_embedding_A:
        found = {"lora_A": layer.lora_embedding_A[name], "lora_B": layer.lora_embedding_B[name]}
    if name in (layer.lora_magnitude_vector or {}):
        found["magnitude"] = layer.lora_magnitude_vector[name].weight
    return {key: p for key, p in found.items() if p is not None}


def scatter(libraries, tensors, std=0.5):
    with libraries.torch.no_grad():
        for p in tensors.values():
            p.add_(std * libraries.torch.randn(p.shape))


def inject(base, settings, before, names=("default",), fan_in_fan_out=None, head=None):
    """Our model on the base of before, with the settings that PEFT's own config gives."""
    if fan_in_fan_out is not None:
        options = {key: value for key, value in settings.items() if key not in ("target_modules", "fan_in_fan_out")}
        model = Ours(lora.Linear(*fan_in_fan_out, fan_in_fan_out=True, **options))
        start = {path: value for path, value in model.state_dict().items() if "adapters" in path}
        model.load_state_dict({**start, **before})
        if "init_lora_weights" in options:  # it reads the weight, which was drawn: once more for this one
            model.fc.adapters.clear()
            model.fc.attach("default", new_adapter(model.fc, options.pop("r"), options.pop("lora_alpha"), **options))
        return model
    model = Ours(base(), head and head())
    model.load_state_dict({name: value for name, value in before.items()})
    for name in names:
        lora.inject(model, settings, name, rng=1)
    return model


def load(layer, name, tensors):
    """Copy PEFT's numbers into our adapter, by name. PEFT keeps the lengths of convolutions as (1, out, 1, 1)."""
    adapter = layer.adapters[name]
    for key, p in tensors.items():
        own = getattr(adapter, key)
        value = p.detach().numpy()
        assert own.size == value.size and (own.shape == value.shape or key == "magnitude"), key
        own.data = place(value.reshape(own.shape))


def compare(libraries, name, ours, model, x, pairs, **call):
    """Outputs and gradients; `pairs` are (what, our parameter, PEFT's tensor)."""
    torch = libraries.torch
    whole = x.dtype.kind == "i"
    leaf = x if whole else minilora.Parameter(place(x))
    tensor = torch.tensor(x) if whole else torch.tensor(x, requires_grad=True)
    y, expected = ours(leaf), model(tensor, **call)
    differ(name, y, expected, "output")
    dy = draw(*y.shape, seed=1)
    y.backward(place(dy))
    expected.backward(torch.tensor(dy))
    if not whole:
        differ(name, leaf.grad, tensor.grad, "x")
    for what, p, q in pairs:
        assert p.trainable == q.requires_grad, what
        assert (p.grad is None) == (q.grad is None), what
        if q.grad is not None:
            differ(name, fetch(p.grad).reshape(q.shape), q.grad, what)


def layer_of(model, path="fc"):
    return getattr(model.base_model.model, path)


@pytest.mark.parametrize("kind, option", PAIRS, ids=map(": ".join, PAIRS))
def test_output_and_gradients(device, libraries, kind, option):
    base, other, x = kinds(libraries)[kind]
    settings = settings_of(option, **{"fan_in_fan_out": True} if kind == "Conv1D" else {})
    model, before = wrap(libraries, other, settings)
    config = lora.Config.from_dict(libraries.peft.LoraConfig(**settings).to_dict())
    ours = inject(base, settings if kind == "Conv1D" else config, before, fan_in_fan_out=(7, 5) if kind == "Conv1D" else None)
    layer, adapter = layer_of(model), ours.fc.adapters["default"]
    assert adapter.scaling == layer.scaling["default"]
    tensors = adapter_tensors(layer, "default")
    if adapter.start_A is not None:
        # Singular vectors come with either sign, and PEFT's base has lost its s B A already: so ours go over there.
        with libraries.torch.no_grad():
            for key in ("lora_A", "lora_B"):
                np.testing.assert_allclose(np.abs(fetch(getattr(adapter, key))), np.abs(tensors[key].numpy()), atol=1e-4)
                tensors[key].copy_(libraries.torch.tensor(fetch(getattr(adapter, key))))
        for name, p in ours.named_parameters():
            assert "adapters" in name or fetch(p).tobytes() == before[name].tobytes()
    scatter(libraries, tensors)
    load(ours.fc, "default", tensors)
    if config.lora_dropout:
        ours.eval(), model.eval()
    pairs = [(key, getattr(adapter, key), q) for key, q in tensors.items()]
    pairs += [("weight", ours.fc.weight, layer.base_layer.weight)]
    compare(libraries, f"{kind}: {option}", ours, model, x, pairs)
    if kind == "Embedding, padding":
        assert not fetch(adapter.lora_A.grad)[:, 4].any() and not tensors["lora_A"].grad[:, 4].any()


@pytest.mark.parametrize("kind, option", [pair for pair in PAIRS if pair[0] in ("Linear", "Conv1D", "Embedding", "Conv2d")
                                          and pair[1] in ("plain", "dora", "lora_bias")], ids=": ".join)
def test_merged_weight(libraries, kind, option):
    base, other, x = kinds(libraries)[kind]
    settings = settings_of(option, **{"fan_in_fan_out": True} if kind == "Conv1D" else {})
    model, before = wrap(libraries, other, settings)
    config = lora.Config.from_dict(libraries.peft.LoraConfig(**settings).to_dict())
    ours = inject(base, settings if kind == "Conv1D" else config, before, fan_in_fan_out=(7, 5) if kind == "Conv1D" else None)
    layer = layer_of(model)
    tensors = adapter_tensors(layer, "default")
    scatter(libraries, tensors)
    load(ours.fc, "default", tensors)
    ours.eval(), model.eval()
    lora.merge(ours)
    layer.merge(safe_merge=True)
    name = f"{kind}: {option}, merged"
    differ(name, ours.fc.weight, layer.base_layer.weight, "weight")
    if option == "lora_bias":
        differ(name, ours.fc.bias, layer.base_layer.bias, "bias")
    leaf = x if x.dtype.kind == "i" else minilora.tensor(place(x))
    differ(name, ours(leaf), model(libraries.torch.tensor(x)), "output")


# -- several adapters ---------------------------------------------------------------------------------------------------


def several(libraries, kind, option="plain"):
    base, other, x = kinds(libraries)[kind]
    settings = settings_of(option)
    model, before = wrap(libraries, other, settings, ("one", "two"))
    ours = inject(base, lora.Config.from_dict(libraries.peft.LoraConfig(**settings).to_dict()), before, ("one", "two"))
    layer = layer_of(model)
    for name in ("one", "two"):
        tensors = adapter_tensors(layer, name)
        scatter(libraries, tensors)
        load(ours.fc, name, tensors)
    return ours, model, layer, x


@pytest.mark.parametrize("weights", [None, (0.5, -2.0)], ids=["", "weights"])
@pytest.mark.parametrize("kind, option", [("Linear", "plain"), ("Linear", "lora_bias"), ("Embedding", "plain"),
                                          ("Conv1d", "plain"), ("Conv2d", "plain")], ids=": ".join)
def test_two_adapters_at_once(libraries, kind, option, weights):
    ours, model, layer, x = several(libraries, kind, option)
    model.base_model.set_adapter(["one", "two"])
    lora.activate(ours, "one", "two", weights=weights)
    for name, weight in zip(("one", "two"), weights or ()):
        layer.set_scale(name, weight)
    pairs = [(f"{name} {key}", getattr(ours.fc.adapters[name], key), q) for name in ("one", "two")
             for key, q in adapter_tensors(layer, name).items()]
    compare(libraries, f"{kind}: {option}, two active{', weights' if weights else ''}", ours, model, x, pairs)


@pytest.mark.parametrize("kind, option", [("Linear", "plain"), ("Linear, no bias", "plain"), ("Linear", "lora_bias"),
                                          ("Embedding", "plain"), ("Conv2d", "plain"), ("Conv1d", "plain")], ids=": ".join)
def test_mixed_batch(device, libraries, kind, option):
    """PEFT does this in evaluation, and refuses DoRA there."""
    ours, model, layer, x = several(libraries, kind, option)
    x = np.concatenate([x, x[::-1]])[:3 if len(x) == 2 else 4]
    names = ["two", "__base__", "one", "two"][:len(x)]
    ours.eval(), model.eval()
    model.base_model.set_adapter(["one", "two"])
    lora.activate(ours, "one", "two")
    pairs = [(f"{name} {key}", getattr(ours.fc.adapters[name], key), q) for name in ("one", "two")
             for key, q in adapter_tensors(layer, name).items()]
    with lora.mixed(ours, names):
        compare(libraries, f"{kind}: {option}, mixed batch", ours, model, x, pairs, adapter_names=names)


def test_disabled(libraries):
    ours, model, _, x = several(libraries, "Linear")
    with model.disable_adapter(), lora.disabled(ours):
        differ("Linear: disabled", ours(minilora.tensor(place(x))), model(libraries.torch.tensor(x)), "output")


# -- whole modules, biases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_modules_to_save_and_biases(libraries, bias):
    torch = libraries.torch
    settings = settings_of("plain", modules_to_save=["head"], bias=bias)
    model, before = wrap(libraries, lambda: torch.nn.Linear(7, 5), settings, head=lambda: torch.nn.Linear(5, 3))
    ours = inject(lambda: nn.Linear(7, 5), lora.Config.from_dict(libraries.peft.LoraConfig(**settings).to_dict()), before,
                  head=lambda: nn.Linear(5, 3))
    layer, wrapper = layer_of(model), layer_of(model, "head")
    tensors = adapter_tensors(layer, "default")
    copy = wrapper.modules_to_save["default"]
    scatter(libraries, {**tensors, "weight": copy.weight, "bias": copy.bias})
    load(ours.fc, "default", tensors)
    for key in ("weight", "bias"):
        getattr(ours.head.copies["default"], key).data = place(getattr(copy, key).detach().numpy())
    pairs = [(key, getattr(ours.fc.adapter, key), q) for key, q in tensors.items()]
    pairs += [(f"head {key}", getattr(ours.head.copies["default"], key), getattr(copy, key)) for key in ("weight", "bias")]
    pairs += [(key, getattr(ours.fc, key), getattr(layer.base_layer, key)) for key in ("weight", "bias")]
    compare(libraries, f"Linear: modules_to_save, bias {bias}", ours, model, draw(4, 7), pairs)
    lora.activate(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the biases were trained
        with model.disable_adapter():
            x = draw(4, 7)
            differ(f"Linear: modules_to_save, bias {bias}", ours(minilora.tensor(place(x))), model(torch.tensor(x)), "off")


# -- where PEFT does something else -------------------------------------------------------------------------------------


def test_dilation(libraries):
    """PEFT's lora_A has no dilation (its issue 3697), so it fails or reads other places; so against the formula itself."""
    torch = libraries.torch
    model, before = wrap(libraries, lambda: torch.nn.Conv2d(3, 5, 2, dilation=(2, 3)), settings_of("plain"))
    ours = inject(lambda: nn.Conv2d(3, 5, 2, dilation=(2, 3)), lora.Config(**settings_of("plain")), before)
    layer, x = layer_of(model), draw(2, 3, 6, 7)
    tensors = adapter_tensors(layer, "default")
    scatter(libraries, tensors)
    load(ours.fc, "default", tensors)
    with pytest.raises(RuntimeError, match="must match"):
        model(torch.tensor(x))
    W, b = layer.base_layer.weight, layer.base_layer.bias
    A, B = tensors["lora_A"], tensors["lora_B"]

    def formula(x):
        D = 1.5 * (B.reshape(5, 4) @ A.reshape(4, -1)).reshape(W.shape)
        return torch.nn.functional.conv2d(x, W + D, b, dilation=(2, 3))

    pairs = [(key, getattr(ours.fc.adapter, key), q) for key, q in tensors.items()]
    compare(libraries, "Conv2d: dilation (formula)", ours, formula, x, pairs)


def test_two_dora_adapters_at_once(libraries):
    """PEFT's second one stretches what the first one made of the output; ours stretches the base's, in whichever order."""
    ours, model, layer, x = several(libraries, "Linear", "dora")
    tensor, leaf, found = libraries.torch.tensor(x), minilora.tensor(place(x)), []
    for names in (["one"], ["two"], ["one", "two"], ["two", "one"]):
        model.base_model.set_adapter(names)
        lora.activate(ours, *names)
        found.append((fetch(ours(leaf)), model(tensor).detach().numpy()))
    one, two, both, turned = found
    with lora.disabled(ours):
        base = fetch(ours(leaf))
    np.testing.assert_allclose(both[0], one[0] + two[0] - base, rtol=0, atol=1e-5)
    np.testing.assert_allclose(turned[0], both[0], rtol=0, atol=1e-5)
    for mine, his in (one, two):
        np.testing.assert_allclose(mine, his, rtol=0, atol=1e-5)
    assert np.abs(both[1] - turned[1]).max() > 0.1 and np.abs(both[1] - both[0]).max() > 0.1


def test_groups(libraries):
    """PEFT's lora_A sees the channels of all groups: an update that no weight of a grouped convolution could hold. Ours can."""
    torch = libraries.torch
    model, before = wrap(libraries, lambda: torch.nn.Conv1d(4, 6, 3, groups=2), settings_of("plain"))
    ours = inject(lambda: nn.Conv1d(4, 6, 3, groups=2), lora.Config(**settings_of("plain")), before)
    assert tuple(layer_of(model).lora_A["default"].weight.shape) == (4, 4, 3) and ours.fc.lora_A.shape == (4, 2, 3)
    ours.fc.lora_B.data[...] = place(draw(6, 2, 1))
    leaf, W = torch.tensor(draw(2, 4, 8), requires_grad=True), torch.tensor(before["fc.weight"])
    A, B = (torch.tensor(fetch(p), requires_grad=True) for p in (ours.fc.lora_A, ours.fc.lora_B))

    def formula(x):
        D = torch.cat([B[:3, :, 0] @ A[:2].reshape(2, -1), B[3:, :, 0] @ A[2:].reshape(2, -1)]).reshape(W.shape)
        return torch.nn.functional.conv1d(x, W + 1.5 * D, torch.tensor(before["fc.bias"]), groups=2)

    pairs = [("lora_A", ours.fc.lora_A, A), ("lora_B", ours.fc.lora_B, B)]
    compare(libraries, "Conv1d: groups (formula)", ours, formula, leaf.detach().numpy(), pairs)


def test_orthogonal_starts_alike(libraries):
    """Two random starts: both give B A = 0 and the same spread."""
    torch = libraries.torch
    model, _ = wrap(libraries, lambda: torch.nn.Linear(400, 300), settings_of("orthogonal", r=8))
    tensors = adapter_tensors(layer_of(model), "default")
    layer = lora.Linear(400, 300, r=8, init_lora_weights="orthogonal", rng=0)
    for A, B in ((layer.lora_A, layer.lora_B), (tensors["lora_A"], tensors["lora_B"])):
        A, B = (fetch(p) if isinstance(p, minilora.Tensor) else p.detach().numpy() for p in (A, B))
        assert np.abs(B @ A).max() < 1e-6 and np.linalg.matrix_rank(A) == np.linalg.matrix_rank(B) == 4
        np.testing.assert_allclose([A.std(), B.std()], 0.5 ** 0.5 / 10, rtol=0.1)


def test_lora_plus(libraries):
    """The same rates for A, for B, and for vectors, which count as B. (PEFT gives embeddings a rate of their own.)"""
    from peft.optimizers import create_loraplus_optimizer

    torch = libraries.torch
    settings = settings_of("dora", bias="lora_only")
    model, before = wrap(libraries, lambda: torch.nn.Linear(7, 5), settings)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)].split("fc.")[1]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {"lora_A.default.weight": 1e-3, "lora_B.default.weight": 16e-3, "base_layer.bias": 16e-3,
                     "lora_magnitude_vector.default.weight": 16e-3}
    ours = inject(lambda: nn.Linear(7, 5), lora.Config(**settings), before)
    names = {id(p): name for name, p in ours.named_parameters()}
    groups = lora.lora_plus_groups(ours, 1e-3, 16)
    found = {names[id(p)].split("fc.")[1]: group["lr"] for group in groups for p in group["params"]}
    assert found == {"adapters.default.lora_A": 1e-3, "adapters.default.lora_B": 16e-3, "bias": 16e-3,
                     "adapters.default.magnitude": 16e-3}
