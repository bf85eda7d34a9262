"""A model in d numbers: its gradients, what others see of it, copies, devices, threads (test_subspaces.py has `fit`)."""
import copy
import pickle

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, backend, lora, nn, ops, optim, parallel, testing
from minilora.errors import ConfigError, StateDictError, StateError
from minilora.nn import Module
from minilora.tuners.intrinsic import Dense, Fastfood, Subspace

KINDS = [dict(method=method, projection=projection) for method in ("did", "said") for projection in ("fastfood", "dense")]
EVERY = pytest.mark.parametrize("settings", KINDS, ids=lambda s: "-".join(s.values()))


class Net(Module):
    """A convolution, a norm, two linear layers and a weight that two of them share."""

    def __init__(self, dtype="float32", p=0.0):
        rng = np.random.default_rng(0)
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1, rng=rng), nn.GroupNorm(2, 2)
        self.one, self.two, self.out = nn.Linear(8, 8, rng=rng), nn.Linear(8, 8, rng=rng), nn.Linear(8, 3, rng=rng)
        self.two.weight = self.one.weight
        self.drop = nn.Dropout(p)
        self.to(dtype=dtype)

    def forward(self, x):
        x = nn.Flatten()(ops.gelu(self.norm(self.conv(x))))
        return self.out(self.drop(ops.gelu(self.two(ops.gelu(self.one(x))))))


SIZE = sum(p.size for p in Net().parameters())
TENSORS = len(list(Net().parameters()))


def images(n=5, dtype="float32"):
    return np.random.default_rng(1).standard_normal((n, 1, 2, 2)).astype(dtype)


def moved(space, seed=2):
    """The space, away from where it began."""
    rng = np.random.default_rng(seed)
    for p in space.own():
        p.data[...] = place(rng.standard_normal(p.shape), p.dtype)
        p.version += 1
    return space


@EVERY
def test_gradients(settings):
    space = moved(Subspace(Net("float64"), 12, **settings))
    report = testing.gradcheck(space, images(dtype="float64"), parameters=space.named_parameters())
    assert report.passed and not report.untested, str(report)


@EVERY
def test_the_gradient_is_that_of_all_weights_projected(settings):
    """The oracle: dθ of an ordinary model with the same weights, times P as a matrix."""
    space = moved(Subspace(Net("float64"), 12, **settings))
    x, dy = images(dtype="float64"), np.random.default_rng(4).standard_normal((5, 3))
    y = space(minilora.tensor(x))
    y.backward(dy)
    plain = Net("float64")
    theta = fetch(space.weights().data)
    at = 0
    for p in plain.parameters():
        p.data, at = theta[at:at + p.size].reshape(p.shape), at + p.size
    other = plain(minilora.tensor(x))
    np.testing.assert_array_equal(fetch(y), fetch(other))
    other.backward(dy)
    dtheta = np.concatenate([p.grad.ravel() for p in plain.parameters()])
    P = np.stack([space.projection(minilora.tensor(column)).data for column in np.eye(len(space.v))], axis=1)
    z, scales = P @ space.v.data, np.ones(TENSORS) if space.scales is None else space.scales.data
    sizes = [p.size for p in plain.parameters()]
    np.testing.assert_allclose(space.v.grad, P.T @ (np.repeat(scales, sizes) * dtheta), rtol=1e-10, atol=1e-12)
    if space.scales is not None:
        ends = np.cumsum(sizes)[:-1]
        expected = [a @ b for a, b in zip(np.split(z, ends), np.split(dtheta, ends))]
        np.testing.assert_allclose(space.scales.grad, expected, rtol=1e-10, atol=1e-12)


@EVERY
def test_it_begins_as_the_model_is(settings):
    model = Net()
    y = fetch(model(minilora.tensor(images())))
    space = Subspace(model, 12, **settings)
    np.testing.assert_array_equal(fetch(space(minilora.tensor(images()))), y)
    assert space.d == 12 and [name for name, p in space.named_parameters() if p.trainable] == (
        ["v"] if settings["method"] == "did" else ["v", "scales"])
    assert minilora.summary(space).trained == 12 and minilora.summary(space).frozen == SIZE
    assert not any(p.trainable for p in model.parameters())


@pytest.mark.parametrize("kind", [Dense, Fastfood])
def test_a_seed_is_one_projection_everywhere(kind, device):
    v = np.random.default_rng(5).standard_normal(7)
    here = fetch(kind(7, 30, 1)(minilora.Tensor(place(v))))
    with backend.use("cpu"):
        there = kind(7, 30, 1)(minilora.tensor(v)).data
        other = kind(7, 30, 2)(minilora.tensor(v)).data
    np.testing.assert_allclose(here, there, rtol=1e-12)
    assert not np.allclose(there, other) and kind(7, 30, 1) == kind(7, 30, 1) != kind(7, 30, 2)
    assert kind(7, 30, 1).digest() == pickle.loads(pickle.dumps(kind(7, 30, 1))).digest() != kind(7, 30, 2).digest()


@pytest.mark.parametrize("kind, settings", [(Dense, {}), (Fastfood, {}), (Fastfood, {"block": 64})])
def test_the_length_is_kept_in_the_mean(kind, settings):
    v = np.random.default_rng(1).standard_normal(5)
    found = [float((kind(5, 40, seed, **settings)(minilora.tensor(v)).data ** 2).sum()) for seed in range(400)]
    assert abs(np.mean(found) - v @ v) < 5 * np.std(found) / len(found) ** 0.5


@EVERY
def test_a_step_and_what_is_written(settings):
    space = Subspace(Net(), 12, **settings)
    optimizer, x = optim.Adam(space.parameters(), lr=0.1), minilora.tensor(images())
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ops.cross_entropy(space(x), np.arange(5) % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    before = fetch(space.model(x))
    space.write()
    inside = fetch(space.model(x))
    with minilora.no_grad():
        np.testing.assert_array_equal(inside, fetch(space(x)))
    assert not np.array_equal(before, inside)  # of the call before the last step
    assert all(p.grad is None for p in space.model.parameters())


def test_gradients_add_up_and_a_graph_is_used_once():
    space = moved(Subspace(Net("float64"), 6))
    x = minilora.tensor(images(dtype="float64"))
    one, two = space(x).sum(), (space(x) * 2.0).sum()
    one.backward()
    first = space.v.grad.copy()
    two.backward()
    np.testing.assert_allclose(space.v.grad, 3.0 * first, rtol=1e-10)
    with pytest.raises(minilora.errors.GraphError, match="earlier backward"):
        one.backward()


def test_an_old_graph_has_the_old_weights():
    space = moved(Subspace(Net("float64"), 6))
    x = minilora.tensor(images(dtype="float64"))
    y = space(x).sum()
    expected = moved(Subspace(Net("float64"), 6))
    expected(x).sum().backward()
    moved(space, seed=9)
    with minilora.no_grad():
        space(x)  # other weights are written meanwhile
    y.backward()
    np.testing.assert_array_equal(space.v.grad, expected.v.grad)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_threads_and_checkpointing(threads, checkpoint):
    space = moved(Subspace(Net("float64"), 12, method="said"))
    expected = moved(Subspace(Net("float64"), 12, method="said"))
    x, labels = images(6, "float64"), np.arange(6) % 3
    ops.cross_entropy(expected(minilora.tensor(x)), labels).backward()
    space.model.one.grad_checkpoint = space.model.conv.grad_checkpoint = checkpoint
    for _ in range(3):
        space.v.grad = space.scales.grad = None
        parallel.backward(lambda part: ops.cross_entropy(space(minilora.tensor(part[0])), part[1]), (x, labels), threads)
        np.testing.assert_allclose(space.v.grad, expected.v.grad, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(space.scales.grad, expected.scales.grad, rtol=1e-9, atol=1e-12)
    space.grad_checkpoint = True  # all of it, computed again
    space.v.grad = None
    ops.cross_entropy(space(minilora.tensor(x)), labels).backward()
    np.testing.assert_allclose(space.v.grad, expected.v.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda space: pickle.loads(pickle.dumps(space))], ids=["copy", "pickle"])
@EVERY
def test_copies(again, settings):
    space = moved(Subspace(Net(), 12, **settings))
    x = minilora.tensor(images())
    y = fetch(space(x))
    other = again(space)
    np.testing.assert_array_equal(fetch(other.model(x)), y)
    np.testing.assert_array_equal(fetch(other(x)), y)
    moved(other, seed=8)
    assert not np.array_equal(fetch(other(x)), y)
    other(x).sum().backward()
    assert other.v.grad is not None and space.v.grad is None
    np.testing.assert_array_equal(fetch(space(x)), y)


def test_half_precision_rounds_the_weights_and_nothing_else():
    space = Subspace(Net(), 12, method="said").to(dtype="float16")
    assert space.v.dtype == space.scales.dtype == "float32"
    x = minilora.tensor(images(dtype="float16"))
    space(x).sum().backward()
    assert {p.dtype.name for p in space.model.parameters()} == {"float16"} and space.v.grad.dtype == "float32"
    for _ in range(200):  # each step is far below what float16 resolves; together they are not
        space.v.data += 1e-5
        space.v.version += 1
    space.write()
    start = {path: p for path, p in space.named_parameters() if path.startswith("model.")}
    changed = [not np.array_equal(p.data, start[f"model.{path}"].data) for path, p in space.model.named_parameters()]
    assert any(changed)
    half = Subspace(Net("float16"), 12)  # that began so
    assert half.v.dtype == "float32" and half(x).dtype == "float16"


def test_to_another_device(device):
    name = backend.current_device().name
    with backend.use("cpu"):
        space = moved(Subspace(Net(), 12, method="said"))
        y = fetch(space(minilora.tensor(images())))
    space.to(name)
    assert {p.device.name for p in (*space.parameters(), *space.model.parameters())} == {name}
    again = space(minilora.tensor(images()))
    np.testing.assert_allclose(fetch(again), y, rtol=1e-5, atol=1e-5)
    again.sum().backward()
    assert space.v.grad is not None


def test_state_is_v_and_where_it_began():
    space = moved(Subspace(Net(), 12, method="said"))
    state, x = space.state_dict(), minilora.tensor(images())
    assert list(state)[:2] == ["v", "scales"] and set(state) - {"v", "scales"} == {
        f"model.{name}" for name in Net().state_dict()}
    np.testing.assert_array_equal(state["model.one.weight"], Net().one.weight.data)
    other = Subspace(Net(), 12, method="said")
    for p in other.written.start:
        p.data = p.data + 1.0
    other.load_state_dict(state)
    np.testing.assert_array_equal(fetch(other(x)), fetch(space(x)))
    np.testing.assert_array_equal(fetch(other.model(x)), fetch(space(x)))
    with pytest.raises(StateDictError, match="missing    v"):
        other.load_state_dict({name: value for name, value in state.items() if name != "v"})


def test_only_what_is_trained_is_moved_and_the_rest_may_train_beside():
    model = Net()
    model.out.requires_grad(False)
    space = Subspace(model, 12)
    assert space.projection.size == SIZE - sum(p.size for p in model.out.parameters())
    model.out.requires_grad(True)
    x = minilora.tensor(images())
    space(x).sum().backward()
    assert space.v.grad is not None and model.out.weight.grad is not None
    weight = model.out.weight.data
    moved(space)(x)
    assert model.out.weight.data is weight


def test_adapters_in_a_subspace():
    model = Net()
    lora.inject(model, lora.Config(r=2, target_modules=["one", "out"]), rng=0)
    trained = [path for path, p in model.named_parameters() if p.trainable]
    space = moved(Subspace(model, 5))
    assert space.written.paths == trained and all("adapters" in path for path in trained)
    space(minilora.tensor(images())).sum().backward()
    assert space.v.grad.any()


def test_fold():
    space = moved(Subspace(Net(), 12, method="said"))
    x = minilora.tensor(images())
    y = fetch(space(x))
    model = space.fold()
    np.testing.assert_array_equal(fetch(model(x)), y)
    assert isinstance(model, Net) and all(p.trainable is True for p in model.parameters())
    assert model.two.weight is model.one.weight
    model(x).sum().backward()
    assert model.one.weight.grad is not None
    for call in (lambda: space(x), space.write, space.fold, space.weights):
        with pytest.raises(StateError, match="was folded"):
            call()
    assert Subspace(model, 3).d == 3  # another one around it


def test_writing_into_the_model_inside_is_refused():
    space, x = moved(Subspace(Net(), 12)), minilora.tensor(images())
    space(x)
    space.model.load_state_dict(Net().state_dict())
    for call in (lambda: space(x), space.write):
        with pytest.raises(StateError, match="conv.weight, conv.bias, norm.weight ...: the array was replaced"):
            call()


def test_freezing():
    space = Subspace(Net(), 12, method="said").requires_grad(False)
    assert space(minilora.tensor(images())).node is None
    space.requires_grad()
    assert [p.trainable for p in space.own()] == [True, True] and not any(p.trainable for p in space.written.start)
    assert space.train().training and not space.eval().model.drop.training


@pytest.mark.parametrize("arguments, text", [
    (dict(d=0), "d must be an int >= 1"), (dict(d=True), "d must be an int >= 1"), (dict(d=1.5), "d must be an int >= 1"),
    (dict(d=SIZE + 1), f"d must lie between 1 and {SIZE}"),
    (dict(d=TENSORS, method="said"), f"d must lie between {TENSORS + 1} and"),
    (dict(d=5, method="SAID", projection="walsh", seed=0), "method must be one of did, said, got 'SAID'; projection must be"),
    (dict(d=5, seed=-1), "seed must be an int >= 0"),
])
def test_refused_settings(arguments, text):
    model = Net()
    with pytest.raises(ConfigError, match=text):
        Subspace(model, **arguments)
    assert all(p.trainable is True for p in model.parameters())


def test_refused_models():
    for model in (Net().requires_grad(False), Subspace(Net(), 3).model):
        with pytest.raises(ConfigError, match="nothing in the model is trained"):
            Subspace(model, 3)
    with pytest.raises(ConfigError, match="expected a model, got list"):
        Subspace([], 3)
    with pytest.raises(ConfigError, match="block must be a power of 2"):
        Fastfood(9, 20, block=8)
    merged = Net()
    lora.inject(merged, lora.Config(r=2, target_modules=["out"]), rng=0)
    lora.merge(merged)
    merged.one.requires_grad(True)
    with pytest.raises(StateError, match="merged"):
        Subspace(merged, 3)


def test_the_largest_and_the_smallest_space():
    for d in (1, SIZE):
        space = Subspace(Net(), d, projection="dense" if d == SIZE else "fastfood")
        space(minilora.tensor(images())).sum().backward()
        assert space.v.grad.shape == (d,)
    one = Module()
    one.p = Parameter(np.asarray(2.0, "float32"))
    assert Subspace(one, 1).weights().shape == (1,)
