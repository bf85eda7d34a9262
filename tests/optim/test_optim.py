"""Optimizers against the textbook, and what they promise about memory, failures and resuming."""
import copy
import math
import pickle

import numpy as np
import pytest
from conftest import PROOF, fetch, place
from hypothesis import given, strategies as st

import minilora
from minilora import nn, optim
from minilora.errors import (ConfigError, DeviceError, DTypeError, MiniloraError, ShapeError, StateDictError,
                             StateError)


def draw(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def parameter(values, trainable=True):
    return minilora.Parameter(place(values), trainable)


def give(p, values):
    """A gradient as backward delivers it: into the optimizer's own memory."""
    minilora.ops.sum(p * place(values)).backward()


def snapshot(optimizer, *others):
    parts = []
    for group in optimizer.groups:
        parts += [fetch(p).tobytes() for p in group.parameters]
        parts += [None if p.grad is None else fetch(p.grad).tobytes() for p in group.parameters]
        parts += [fetch(array).tobytes() for array in group.state.values()]
        parts += [tuple(group.steps), copy.deepcopy(group.settings)]
    return parts + [fetch(p).tobytes() for p in others]


# -- the textbook -------------------------------------------------------------------------------------------
# One scalar loop a rule, in the form in which the papers print it.


def sgd(theta, gradients, lr, momentum=0.0, weight_decay=0.0):
    v = np.zeros_like(theta)
    for g in gradients:
        g = g + weight_decay * theta
        v = momentum * v + g
        theta = theta - lr * v
        yield theta


def adam(theta, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False):
    m, v, t = np.zeros_like(theta), np.zeros_like(theta), 0
    for g in gradients:
        t += 1
        if decoupled:
            theta = theta - lr * weight_decay * theta
        else:
            g = g + weight_decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)
        yield theta


def adamw(theta, gradients, weight_decay=1e-2, **settings):
    return adam(theta, gradients, weight_decay=weight_decay, decoupled=True, **settings)


RULES = {
    "SGD": (optim.SGD, sgd, dict(lr=0.1)),
    "SGD momentum": (optim.SGD, sgd, dict(lr=0.1, momentum=0.9)),
    "SGD decay": (optim.SGD, sgd, dict(lr=0.1, weight_decay=0.05)),
    "SGD both": (optim.SGD, sgd, dict(lr=0.03, momentum=0.7, weight_decay=0.05)),
    "Adam": (optim.Adam, adam, {}),
    "Adam lr": (optim.Adam, adam, dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3)),
    "Adam decay": (optim.Adam, adam, dict(lr=0.05, weight_decay=0.1)),
    "Adam betas 0": (optim.Adam, adam, dict(lr=0.05, betas=(0.0, 0.0))),
    "AdamW": (optim.AdamW, adamw, {}),
    "AdamW lr": (optim.AdamW, adamw, dict(lr=0.1, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.3)),
    "AdamW no decay": (optim.AdamW, adamw, dict(lr=0.1, weight_decay=0.0)),
}
rules = pytest.mark.parametrize("rule, textbook, options", RULES.values(), ids=RULES)


@rules
@PROOF
def test_textbook_over_100_steps(device, rule, textbook, options):
    shapes = [(3, 4), (5,), (), (2, 1, 3)]
    starts = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [[draw(*shape, seed=100 * i + t + 7) * 3.0 ** (t % 5 - 2) for t in range(100)]
                 for i, shape in enumerate(shapes)]
    parameters = [parameter(start) for start in starts]
    optimizer = rule(parameters, **options)
    expected = zip(*(list(textbook(start, gs, **options)) for start, gs in zip(starts, gradients)))
    for t, step in enumerate(expected):
        optimizer.zero_grad()
        for p, gs in zip(parameters, gradients):
            give(p, gs[t])
        optimizer.step()
        for p, value in zip(parameters, step):
            assert p.shape == value.shape
            np.testing.assert_allclose(fetch(p), value, rtol=1e-12, atol=1e-12)


@rules
def test_float32_stays_float32_and_near_float64(device, rule, textbook, options):
    start, gradients = draw(6), [draw(6, seed=t + 1) for t in range(20)]
    p = parameter(start.astype("float32"))
    optimizer = rule([p], **options)
    for g in gradients:
        optimizer.zero_grad()
        give(p, g.astype("float32"))
        optimizer.step()
    *_, expected = textbook(start, gradients, **options)
    assert fetch(p).dtype == np.float32
    assert {array.dtype.name for group in optimizer.groups for array in group.state.values()} == {"float32"}
    np.testing.assert_allclose(fetch(p), expected, rtol=2e-5, atol=2e-5)


@rules
def test_numpy_numbers_as_settings_give_the_same_bits(device, rule, textbook, options):
    """A numpy.float64 in a formula would promote float32 arrays, and a GPU refuses it."""
    def run(options):
        p = parameter(draw(50, dtype="float32"))
        optimizer = rule([p], **{"lr": 0.1, **options})
        for t in range(5):
            optimizer.zero_grad()
            give(p, draw(50, seed=t + 1, dtype="float32"))
            optimizer.step()
        return fetch(p).tobytes()

    as_numpy = {name: tuple(map(np.float64, value)) if isinstance(value, tuple) else np.float64(value)
                for name, value in options.items()}
    assert run({"lr": np.float64(0.1), **as_numpy}) == run(options)


@rules
def test_one_seed_gives_the_same_run_on_both_devices(device, rule, textbook, options):
    """The CPU's blocked Adam regroups products, so: to rounding."""
    def run():
        p = parameter(draw(64, dtype="float32"))
        optimizer = rule([p], **options)
        for t in range(10):
            optimizer.zero_grad()
            give(p, draw(64, seed=t + 1, dtype="float32"))
            optimizer.step()
        return fetch(p)

    with minilora.use("cpu"):
        on_cpu = run()
    np.testing.assert_allclose(run(), on_cpu, rtol=1e-5, atol=1e-6)


# -- properties of Adam -------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.data(), st.floats(1e-4, 1.0),
       st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.25)]))
def test_adam_first_step_moves_by_lr_against_the_sign(sizes, data, lr, betas):
    g = np.array([size * data.draw(st.sampled_from([-1, 1])) for size in sizes])
    p = minilora.Parameter(np.zeros(len(g)))
    optimizer = optim.Adam([p], lr=lr, betas=betas, eps=1e-8)
    p.grad = g.copy()
    optimizer.step()
    # lr |g| / (|g| + eps): short of lr by lr eps / |g| at most; rounding of about ten operations besides.
    bound = lr * 1e-8 / np.abs(g) + 16 * np.finfo(float).eps * lr
    assert (np.abs(p.data + lr * np.sign(g)) <= bound).all()


@given(st.integers(-20, 20), st.sampled_from(["float32", "float64"]), st.integers(0, 2 ** 32 - 1))
def test_adam_does_not_see_a_power_of_two_in_the_gradient(k, dtype, seed):
    rng = np.random.default_rng(seed)
    start, gradients = rng.standard_normal(9).astype(dtype), rng.standard_normal((6, 9)).astype(dtype)

    def run(factor):
        p = minilora.Parameter(start.copy())
        optimizer = optim.Adam([p], lr=0.1, eps=0.0)
        for g in gradients:
            p.grad = g * factor
            optimizer.step()
        return p.data.tobytes()

    assert run(2.0 ** k) == run(1.0)


@rules
def test_zero_gradient_without_decay_leaves_theta(device, rule, textbook, options):
    p = parameter(draw(5))
    before = fetch(p).tobytes()
    optimizer = rule([p], **{**options, "lr": 0.1, "weight_decay": 0.0})
    for _ in range(3):
        optimizer.zero_grad()
        give(p, np.zeros(5))
        optimizer.step()
    assert fetch(p).tobytes() == before


def test_weight_decay_touches_only_its_group(device):
    a, b = parameter(draw(4)), parameter(draw(4))
    before = fetch(b).tobytes()
    optimizer = optim.AdamW([{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.0}])
    give(a, np.zeros(4))
    give(b, np.zeros(4))
    optimizer.step()
    assert fetch(b).tobytes() == before
    np.testing.assert_allclose(fetch(a), draw(4) * (1 - 1e-3 * 0.5), rtol=1e-15)


def test_lr_0_changes_nothing(device):
    p = parameter(draw(4))
    optimizer = optim.AdamW([p], lr=0.0, weight_decay=0.5)
    give(p, draw(4, seed=1))
    optimizer.step()
    assert np.array_equal(fetch(p), draw(4))


# -- the flat array -----------------------------------------------------------------------------------------


def test_parameters_and_gradients_are_views_of_two_flat_arrays(device):
    parameters = [parameter(draw(2, 3)), parameter(draw(4)), parameter(draw())]
    optimizer = optim.SGD(parameters, lr=1.0)
    (group,) = optimizer.groups
    assert group.data.shape == group.grad.shape == (11,)
    assert np.array_equal(fetch(group.data), np.concatenate([draw(2, 3).ravel(), draw(4), draw().ravel()]))
    for p in parameters:
        give(p, np.ones(p.shape))
        assert p.data.base is group.data.base and p.gathered.base is group.grad.base
    assert np.array_equal(fetch(group.grad), np.ones(11))
    group.data[...] = 7.0
    assert all((fetch(p) == 7.0).all() for p in parameters)


def test_views_stay_through_training_and_loading(device):
    model = nn.Linear(3, 2, rng=np.random.default_rng(0))
    optimizer = optim.Adam(model.parameters())
    x = minilora.tensor(draw(5, 3, dtype="float32"))
    arrays = [p.data for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        assert all(p.gathered.base is optimizer.groups[0].grad.base for p in model.parameters())
        optimizer.step()
        model.load_state_dict(model.state_dict())
    assert all(p.data is array for p, array in zip(model.parameters(), arrays))


def test_zero_grad_writes_nothing(device):
    p = parameter(draw(4))
    optimizer = optim.SGD([p], lr=1.0)
    give(p, draw(4, seed=1))
    optimizer.zero_grad()
    assert p.grad is None
    assert np.array_equal(fetch(optimizer.groups[0].grad), draw(4, seed=1))
    give(p, draw(4, seed=2))
    assert np.array_equal(fetch(p.grad), draw(4, seed=2))


def test_gradients_accumulate_until_zero_grad(device):
    p = parameter(draw(4))
    optimizer = optim.SGD([p], lr=1.0)
    give(p, np.ones(4))
    give(p, 2 * np.ones(4))
    assert p.gathered.base is optimizer.groups[0].grad.base and np.array_equal(fetch(p.grad), 3 * np.ones(4))


def test_gradient_from_before_the_optimizer_is_kept(device):
    p = parameter(np.zeros(3))
    give(p, np.ones(3))
    optimizer = optim.SGD([p], lr=1.0)
    optimizer.step()
    assert np.array_equal(fetch(p), -np.ones(3))


def test_gradient_assigned_by_the_user(device):
    a, b = parameter(np.zeros((2, 2))), parameter(np.zeros(2))
    optimizer = optim.SGD([a, b], lr=1.0)
    give(b, np.ones(2))
    g = draw(2, 2)
    a.grad = place(g)
    optimizer.step()
    assert np.array_equal(fetch(a), -g) and np.array_equal(fetch(b), -np.ones(2))
    assert np.array_equal(fetch(a.grad), g)


def test_step_leaves_gradients(device):
    p = parameter(draw(4))
    optimizer = optim.Adam([p], weight_decay=0.1)
    give(p, draw(4, seed=1))
    optimizer.step()
    assert np.array_equal(fetch(p.grad), draw(4, seed=1))


def test_data_of_several_dtypes_need_several_groups(device):
    a, b = parameter(draw(2)), parameter(draw(2, dtype="float32"))
    before = [fetch(p).tobytes() for p in (a, b)]
    with pytest.raises(DTypeError, match="float64 and float32.*separate groups"):
        optim.SGD([a, b], lr=1.0)
    assert [fetch(p).tobytes() for p in (a, b)] == before
    assert a.room is None and a.data.base is None
    optimizer = optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    give(a, np.ones(2))
    give(b, np.ones(2, "float32"))
    optimizer.step()
    np.testing.assert_allclose(fetch(b), draw(2, dtype="float32") - 1, rtol=1e-6)


def test_rejected_second_group_leaves_the_first_parameters_alone(device):
    a, b, c = parameter(draw(2)), parameter(draw(2)), parameter(draw(2, dtype="float32"))
    array = a.data
    with pytest.raises(DTypeError):
        optim.SGD([{"params": [a]}, {"params": [b, c]}], lr=1.0)
    assert a.data is array and a.room is None


# -- parameters without a gradient --------------------------------------------------------------------------


@rules
def test_parameter_without_gradient_is_left_alone_with_its_moments(device, rule, textbook, options):
    """Torch's rule. The textbook of each parameter sees only the steps in which it had a gradient."""
    pattern = ["111", "101", "010", "110", "011", "001", "111", "100", "111"]
    starts = [draw(3, seed=i) for i in range(3)]
    parameters = [parameter(start) for start in starts]
    optimizer = rule(parameters, **options)
    gradients = [[], [], []]
    for t, mask in enumerate(pattern):
        optimizer.zero_grad()
        for i, p in enumerate(parameters):
            if mask[i] == "1":
                gradients[i].append(draw(3, seed=10 * t + i + 50))
                give(p, gradients[i][-1])
        optimizer.step()
    for p, start, gs in zip(parameters, starts, gradients):
        *_, expected = textbook(start, gs, **options)
        np.testing.assert_allclose(fetch(p), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.groups[0].steps == [len(gs) for gs in gradients] == [6, 6, 6]


def runs_of(optimizer):
    return [tuple(run) for run in optimizer.groups[0].runs()]


def test_runs_join_neighbours_of_equal_step():
    a, b, c, d = (parameter(np.zeros(n)) for n in (2, 3, 4, 5))
    optimizer = optim.Adam([a, b, c, d])
    for p in (a, b, d):
        give(p, np.ones(p.shape))
    assert runs_of(optimizer) == [(1, 0, 5, 0), (1, 9, 14, 3)]
    give(c, np.ones(4))
    assert runs_of(optimizer) == [(2, 0, 5, 0), (1, 5, 9, 2), (2, 9, 14, 3)]
    optimizer.zero_grad()
    give(c, np.ones(4))
    assert runs_of(optimizer) == [(2, 5, 9, 2)]
    for p in (a, b, d):
        give(p, np.ones(p.shape))
    assert runs_of(optimizer) == [(3, 0, 14, 0)]
    optimizer.zero_grad()
    assert runs_of(optimizer) == []


def test_frozen_parameters_are_left_out(device):
    frozen, free = parameter(draw(3), trainable=False), parameter(draw(3))
    array = frozen.data
    optimizer = optim.AdamW([frozen, free], weight_decay=0.5)
    assert optimizer.groups[0].parameters == [free] and optimizer.groups[0].data.size == 3
    give(free, np.ones(3))
    optimizer.step()
    assert frozen.data is array and np.array_equal(fetch(frozen), draw(3)) and frozen.grad is None


def test_group_of_frozen_parameters_is_left_out(device):
    frozen, free = parameter(draw(3), trainable=False), parameter(draw(3))
    optimizer = optim.SGD([{"params": [frozen]}, {"params": [free]}], lr=1.0)
    assert [group.parameters for group in optimizer.groups] == [[free]]


def test_groups_have_their_own_settings(device):
    a, b = parameter(draw(4)), parameter(draw(4, seed=1))
    optimizer = optim.Adam([{"params": [a], "lr": 0.1, "betas": (0.5, 0.5)}, {"params": [b]}], lr=0.01)
    gradients = [draw(4, seed=t + 2) for t in range(5)]
    for g in gradients:
        optimizer.zero_grad()
        give(a, g)
        give(b, g)
        optimizer.step()
    *_, first = adam(draw(4), gradients, lr=0.1, betas=(0.5, 0.5))
    *_, second = adam(draw(4, seed=1), gradients, lr=0.01)
    np.testing.assert_allclose(fetch(a), first, rtol=1e-12)
    np.testing.assert_allclose(fetch(b), second, rtol=1e-12)


def test_groups_given_are_not_changed(device):
    given = [{"params": [parameter(draw(2))], "lr": 0.5}]
    optim.SGD(given, lr=0.1)
    assert set(given[0]) == {"params", "lr"}


def test_generator_of_parameters(device):
    model = nn.Sequential(nn.Linear(2, 3, rng=np.random.default_rng(0)), nn.Linear(3, 1, bias=False))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    assert optimizer.groups[0].data.size == 12
    assert [id(p) for p in optimizer.groups[0].parameters] == [id(p) for p in model.parameters()]


# -- clipping -----------------------------------------------------------------------------------------------


def clipped(gradients, max_norm, dtype="float64"):
    parameters = [parameter(np.zeros(np.shape(g), dtype)) for g in gradients]
    optimizer = optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}]
                          if len(parameters) > 2 else parameters, lr=1.0)
    for p, g in zip(parameters, gradients):
        give(p, np.asarray(g, dtype))
    norm = optimizer.clip_grad_norm(max_norm)
    assert norm.shape == ()
    return float(norm), [fetch(p.grad) for p in parameters]


def test_clip_is_over_all_groups(device):
    gradients = [draw(3, 2), draw(4, seed=1), draw(2, seed=2), draw(seed=3)]
    flat = np.concatenate([g.ravel() for g in gradients])
    norm, after = clipped(gradients, 0.5)
    assert math.isclose(norm, np.sqrt((flat ** 2).sum()), rel_tol=1e-14)
    for g, new in zip(gradients, after):
        np.testing.assert_allclose(new, g * 0.5 / norm, rtol=1e-13)
    assert math.isclose(math.sqrt(sum((g ** 2).sum() for g in after)), 0.5, rel_tol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clip_below_the_bound_changes_no_bit(device, dtype):
    gradients = [draw(100, seed=1, dtype=dtype), np.array([-0.0, 1e-30, 3.0], dtype)]
    norm, after = clipped(gradients, 1e6, dtype)
    assert [g.tobytes() for g in after] == [g.tobytes() for g in gradients]
    # At the bound itself too: 3-4-5.
    norm, after = clipped([np.array([3.0, 4.0], dtype)], 5.0, dtype)
    assert norm == 5.0 and after[0].tolist() == [3.0, 4.0]


@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=6), st.floats(1e-3, 1e4))
def test_clip_bounds_the_norm_and_keeps_the_direction(g, max_norm):
    g = np.array(g)
    norm, (after,) = clipped([g], max_norm)
    eps = np.finfo(float).eps
    assert np.sqrt((after * after).sum()) <= max_norm * (1 + 10 * eps)
    if norm <= max_norm:
        assert after.tobytes() == g.tobytes()
    else:
        np.testing.assert_allclose(after, g * (max_norm / norm), rtol=4 * eps, atol=1e-300)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_clip_of_zero_gradients(device, dtype):
    norm, after = clipped([np.zeros(3), np.zeros(2)], 1.0, dtype)
    assert norm == 0.0 and not any(g.any() for g in after)


def test_clip_in_float16_does_not_overflow(device):
    """300^2 is beyond float16, the norm is not."""
    norm, (after,) = clipped([[300.0, 400.0]], 5.0, "float16")
    assert norm == 500.0
    np.testing.assert_allclose(after, [3.0, 4.0], rtol=2e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clip_reports_a_gradient_that_is_not_finite(device, bad):
    with np.errstate(invalid="ignore"):
        norm, after = clipped([[1.0, bad], [2.0]], 1.0)
    assert not math.isfinite(norm)
    assert all((np.isnan(g) | (g == 0)).all() for g in after)


def test_clip_returns_the_norm_on_the_device_without_waiting(device):
    p = parameter(draw(3))
    optimizer = optim.SGD([p], lr=1.0)
    give(p, np.array([0.0, 3.0, 4.0]))
    if device == "standin":
        from standin import capturing
        with capturing():
            norm = optimizer.clip_grad_norm(1.0)
        assert type(norm) is p.device.array_type
    else:
        norm = optimizer.clip_grad_norm(1.0)
    assert float(norm) == 5.0


def test_clip_takes_gradients_assigned_by_the_user(device):
    p = parameter(np.zeros(2))
    optimizer = optim.SGD([p], lr=1.0)
    p.grad = place([3.0, 4.0])
    assert float(optimizer.clip_grad_norm(1.0)) == 5.0
    optimizer.step()
    np.testing.assert_allclose(fetch(p), [-0.6, -0.8], rtol=1e-15)


def test_clip_leaves_out_parameters_without_gradient(device):
    a, b = parameter(np.zeros(2)), parameter(np.zeros(2))
    optimizer = optim.SGD([a, b], lr=1.0)
    give(b, np.array([100.0, 0.0]))
    optimizer.zero_grad()
    give(a, np.array([3.0, 4.0]))
    assert float(optimizer.clip_grad_norm(10.0)) == 5.0 and b.grad is None


@pytest.mark.parametrize("max_norm", [0, 0.0, -1, math.nan, math.inf, "1", None, True])
def test_clip_bound(device, max_norm):
    p = parameter(np.zeros(2))
    optimizer = optim.SGD([p], lr=1.0)
    give(p, np.ones(2))
    with pytest.raises(ConfigError, match=r"max_norm must be a number in \(0, inf\)"):
        optimizer.clip_grad_norm(max_norm)
    assert np.array_equal(fetch(p.grad), np.ones(2))


def test_clip_without_gradients(device):
    with pytest.raises(StateError, match="clip_grad_norm: no parameter has a gradient"):
        optim.SGD([parameter(np.zeros(2))], lr=1.0).clip_grad_norm(1.0)


# -- resuming -----------------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_resume_gives_the_same_bits(device, rule, textbook, options, dtype):
    def start():
        model = nn.Linear(4, 3, dtype=dtype, rng=np.random.default_rng(0))
        return model, rule(model.parameters(), **options)

    def train(model, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            loss = (model(minilora.tensor(draw(6, 4, seed=t, dtype=dtype))) ** 2).mean()
            if t == 3:  # unequal step numbers
                model.bias.trainable = False
                loss = (model(minilora.tensor(draw(6, 4, seed=t, dtype=dtype))) ** 2).mean()
                model.bias.trainable = True
            loss.backward()
            optimizer.step()

    whole, whole_optimizer = start()
    train(whole, whole_optimizer, range(10))
    first, optimizer = start()
    train(first, optimizer, range(5))
    saved, moments = first.state_dict(), optimizer.state_dict()
    train(first, optimizer, range(3))  # what was saved is a copy
    second, optimizer = start()
    second.load_state_dict(saved)
    optimizer.load_state_dict(moments)
    assert optimizer.groups[0].steps == [5, 4]
    train(second, optimizer, range(5, 10))
    assert fetch(whole.weight).tobytes() == fetch(second.weight).tobytes()
    assert fetch(whole.bias).tobytes() == fetch(second.bias).tobytes()
    assert snapshot(optimizer) == snapshot(whole_optimizer)


def test_state_dict_lives_on_the_host_and_is_a_copy(device):
    p = parameter(draw(3))
    optimizer = optim.Adam([p], lr=0.5)
    give(p, np.ones(3))
    optimizer.step()
    state = optimizer.state_dict()
    (group,) = state["groups"]
    assert group["settings"] == {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert group["steps"] == [1] and list(group["state"]) == ["m", "v"]
    assert all(type(array) is np.ndarray for array in group["state"].values())
    before = snapshot(optimizer)
    group["state"]["m"][...] = 9.0
    group["steps"][0] = 9
    group["settings"]["lr"] = 9.0
    assert snapshot(optimizer) == before


def test_load_copies(device):
    p = parameter(draw(3))
    optimizer = optim.Adam([p])
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    before = snapshot(optimizer)
    state["groups"][0]["state"]["m"][...] = 9.0
    state["groups"][0]["steps"][0] = 9
    state["groups"][0]["settings"]["lr"] = 9.0
    assert snapshot(optimizer) == before


def damaged(change):
    def make(state):
        change(state["groups"])
        return state
    return make


LOADS = {
    "None": lambda state: None,
    "empty": lambda state: {},
    "groups None": lambda state: {"groups": None},
    "group None": lambda state: {"groups": [None, None]},
    "group empty": lambda state: {"groups": [{}, {}]},
    "one group": damaged(lambda groups: groups.pop()),
    "three groups": damaged(lambda groups: groups.append(groups[0])),
    "setting missing": damaged(lambda groups: groups[1]["settings"].pop("eps")),
    "setting unknown": damaged(lambda groups: groups[1]["settings"].update(momentum=0.9)),
    "lr NaN": damaged(lambda groups: groups[1]["settings"].update(lr=math.nan)),
    "betas too many": damaged(lambda groups: groups[1]["settings"].update(betas=(0.9, 0.9, 0.9))),
    "steps too few": damaged(lambda groups: groups[1]["steps"].pop()),
    "steps negative": damaged(lambda groups: groups[1].update(steps=[0, -1])),
    "settings None": damaged(lambda groups: groups[1].update(settings=None)),
    "steps None": damaged(lambda groups: groups[1].update(steps=None)),
    "state None": damaged(lambda groups: groups[1].update(state=None)),
    "steps text": damaged(lambda groups: groups[1].update(steps=["0", "1"])),
    "moment missing": damaged(lambda groups: groups[1]["state"].pop("m")),
    "moment unknown": damaged(lambda groups: groups[1]["state"].update(velocity=np.zeros(5))),
    "moment misshapen": damaged(lambda groups: groups[1]["state"].update(m=np.zeros(4))),
    "moment of float32": damaged(lambda groups: groups[1]["state"].update(m=np.zeros(5, "float32"))),
}


@pytest.mark.parametrize("damage", LOADS.values(), ids=LOADS)
def test_rejected_load_changes_nothing(device, damage):
    a, b, c = parameter(draw(4)), parameter(draw(3)), parameter(draw(2))
    optimizer = optim.Adam([{"params": [a]}, {"params": [b, c]}], lr=0.1)
    for p in (a, b, c):
        give(p, np.ones(p.shape))
    state = damage(copy.deepcopy(optimizer.state_dict()))
    if state is not None:
        for group in state.get("groups") or []:
            if group and group.get("state"):
                group["state"] = {name: array + 1 for name, array in group["state"].items()}
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(MiniloraError):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


def test_load_lists_every_problem(device):
    a, b = parameter(draw(4)), parameter(draw(3))
    optimizer = optim.Adam([{"params": [a]}, {"params": [b]}])
    state = optimizer.state_dict()
    state["groups"][0]["state"]["m"] = np.zeros(5)
    state["groups"][1]["steps"] = [1, 2]
    state["groups"][1]["state"].pop("v")
    with pytest.raises(StateDictError) as caught:
        optimizer.load_state_dict(state)
    text = str(caught.value)
    assert "nothing was loaded" in text
    assert "group 0: m: expected float64 (4,), got float64 (5,)" in text
    assert "group 1: steps: expected 1 counts" in text and "group 1: state: expected the keys ['m', 'v']" in text


def test_state_of_another_rule_is_rejected():
    with pytest.raises(StateDictError, match="momentum"):
        optim.Adam([parameter(draw(3))]).load_state_dict(optim.SGD([parameter(draw(3))], lr=0.1).state_dict())


# -- refusals: each leaves everything as it was -------------------------------------------------------------


def test_step_without_any_gradient(device):
    p = parameter(draw(3))
    optimizer = optim.Adam([p])
    before = snapshot(optimizer)
    with pytest.raises(StateError, match=r"Adam\.step\(\): no parameter has a gradient"):
        optimizer.step()
    assert snapshot(optimizer) == before


def replace_by_assignment(p):
    p.data = p.data * 1.0


REPLACED = {
    "assignment": replace_by_assignment,
    "second optimizer": lambda p: optim.SGD([p], lr=0.1),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_step_after_the_array_was_replaced(device, replace):
    a, b = parameter(draw(3)), parameter(draw(2))
    optimizer = optim.Adam([a, b])
    give(a, np.ones(3))
    replace(b)
    before = snapshot(optimizer)
    with pytest.raises(StateError, match="array was replaced.*make the optimizer last"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_step_after_model_to(device):
    model = nn.Linear(2, 2, rng=np.random.default_rng(0))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model.to(dtype="float64")
    model(minilora.tensor(np.ones((1, 2)))).mean().backward()
    with pytest.raises(StateError, match="model.to"):
        optimizer.step()


def test_second_optimizer_works(device):
    p = parameter(draw(3))
    optim.SGD([p], lr=0.1)
    second = optim.SGD([p], lr=0.1)
    give(p, np.ones(3))
    second.step()
    np.testing.assert_allclose(fetch(p), draw(3) - 0.1, rtol=1e-15)


def test_refused_step_in_a_later_group_changes_no_group(device):
    a, b = parameter(draw(3)), parameter(draw(2))
    optimizer = optim.Adam([{"params": [a]}, {"params": [b]}])
    give(a, np.ones(3))
    give(b, np.ones(2))
    replace_by_assignment(b)
    before = snapshot(optimizer)
    with pytest.raises(StateError):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("gap", [False, True])
def test_misshapen_gradient_changes_nothing(device, gap):
    a, b, c = parameter(draw(3)), parameter(draw(2)), parameter(draw(2))
    optimizer = optim.Adam([a, b, c])
    give(a, np.ones(3))
    if not gap:
        give(b, np.ones(2))
    before = snapshot(optimizer)
    with pytest.raises(ShapeError, match=r"\(2,\), like the parameter, got \(2, 1\)"):
        c.grad = place(np.ones((2, 1)))
    assert snapshot(optimizer) == before


def test_gradient_of_an_array_that_the_parameter_had_before(device):
    """Assigned when it fitted; the optimizer was made later, for another array."""
    a, b = parameter(draw(3)), parameter(draw(2))
    b.grad = place(np.ones(2))
    b.data = place(draw(4))
    optimizer = optim.SGD([a, b], lr=0.1)
    give(a, np.ones(3))
    before = snapshot(optimizer)
    with pytest.raises(ShapeError, match=r"\(4,\) has a gradient float64 \(2,\).*zero_grad"):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.zero_grad()  # the advice
    give(b, np.ones(4))
    optimizer.step()


@pytest.mark.parametrize("make", [lambda: [1.0, 1.0], lambda: 1.0, lambda: "text", lambda: minilora.tensor([1.0, 1.0])],
                         ids=["list", "number", "text", "tensor"])
def test_gradient_that_is_no_array(device, make):
    p = parameter(draw(2))
    optimizer = optim.SGD([p], lr=0.1)
    with pytest.raises(DTypeError, match="like the parameter, got"):
        p.grad = make()
    with pytest.raises(StateError, match="no parameter has a gradient"):
        optimizer.step()
    assert np.array_equal(fetch(p), draw(2)) and optimizer.groups[0].steps == [0]


@pytest.mark.parametrize("parameters, error, match", [
    ([], ConfigError, "no trainable parameter was given"),
    ([{"params": []}], ConfigError, "no trainable parameter"),
    ([parameter(np.zeros(2), trainable=False)], ConfigError, "no trainable parameter was given.*frozen"),
    ([parameter(np.zeros(2))] * 2, ConfigError, r"shape \(2,\) was given twice"),
    ([{"params": [p]} for p in [parameter(np.zeros(2))] * 2], ConfigError, "given twice"),
    ([{"params": [parameter(np.zeros(2))], "momentun": 1}], ConfigError, r"unknown settings \['momentun'\].*momentum"),
    ([{"parameters": [parameter(np.zeros(2))]}], ConfigError, "params"),
    ([minilora.Tensor(np.zeros(2))], DTypeError, "Tensor"),
    (parameter(np.zeros(2)), MiniloraError, r"\[parameter\]"),
    (nn.Linear(2, 2), MiniloraError, r"parameters\(\)"),
], ids=["empty", "empty group", "all frozen", "twice", "twice in groups", "unknown setting", "params", "tensor",
        "one parameter", "module"])
def test_parameters_given(parameters, error, match):
    with pytest.raises(error, match=match):
        optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_parameters_on_two_devices(device):
    here, there = parameter(draw(2)), minilora.Parameter(draw(2))
    with pytest.raises(DeviceError, match="standin and cpu"):
        optim.SGD([here, there], lr=0.1)
    assert np.array_equal(fetch(here), draw(2)) and here.room is None and there.room is None


BAD = [-0.1, math.nan, math.inf, -math.inf, "0.1", None, True, (0.1,)]


@pytest.mark.parametrize("rule, name, values", [
    (optim.SGD, "lr", BAD), (optim.Adam, "lr", BAD), (optim.AdamW, "lr", BAD),
    (optim.SGD, "momentum", [*BAD, 1.0, 1]), (optim.SGD, "weight_decay", BAD), (optim.Adam, "weight_decay", BAD),
    (optim.AdamW, "weight_decay", BAD), (optim.Adam, "eps", BAD),
    (optim.Adam, "betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), ("a", "b"), (0.9,), (), 0.9,
                           (0.9, 0.99, 0.999), None]),
], ids=lambda value: value.__name__ if isinstance(value, type) else value if isinstance(value, str) else "")
def test_settings_out_of_range(rule, name, values):
    for value in values:
        p = parameter(draw(2))
        with pytest.raises(ConfigError, match=name):
            rule([p], **{"lr": 0.1, name: value})
        with pytest.raises(ConfigError, match=name):
            rule([{"params": [p], name: value}], lr=0.1)
        assert p.room is None


def test_base_class_says_what_to_define():
    p = parameter(draw(2))
    optimizer = optim.Optimizer([p], lr=0.1)
    give(p, np.ones(2))
    with pytest.raises(TypeError, match="Optimizer has no update: define update"):
        optimizer.step()


# -- versions, readers and copies ---------------------------------------------------------------------------


def test_step_counts_as_a_write_where_there_was_a_gradient(device):
    a, b = parameter(draw(3)), parameter(draw(2))
    optimizer = optim.Adam([a, b])
    for _ in range(2):
        optimizer.zero_grad()
        give(a, np.ones(3))
        optimizer.step()
    assert (a.version, b.version) == (2, 0)


def test_a_gradient_read_is_the_gradient_until_it_is_given_up(device):
    """Whoever reads may edit, clip and assign: the step uses it, and the next backward leaves it alone."""
    edits = {
        "in place": lambda p: p.grad.__imul__(0.5), "augmented": lambda p: setattr(p, "grad", p.grad.__imul__(0.5)),
        "assigned": lambda p: setattr(p, "grad", p.grad * 0.5), "elements": lambda p: p.grad.__setitem__(..., p.grad * 0.5),
    }
    for shape in ((4,), ()):
        for edit in edits.values():
            p = parameter(draw(*shape))
            optimizer = optim.SGD([p], lr=1.0)
            give(p, np.ones(shape))
            edit(p)
            give(p, np.ones(shape))  # adds up
            optimizer.step()
            np.testing.assert_allclose(fetch(p), draw(*shape) - 1.5, rtol=1e-15)
            held, before = p.grad, fetch(p.grad)
            optimizer.zero_grad()
            give(p, 3 * np.ones(shape))
            assert float(optimizer.clip_grad_norm(1.0)) > 1.0
            optimizer.step()
            assert fetch(held).tobytes() == before.tobytes()


def test_clip_scales_what_was_read(device):
    p = parameter(draw(2))
    optimizer = optim.SGD([p], lr=1.0)
    give(p, np.array([3.0, 4.0]))
    held = p.grad
    optimizer.clip_grad_norm(1.0)
    assert p.grad is held
    np.testing.assert_allclose(fetch(held), [0.6, 0.8], rtol=1e-15)


def copied_by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle])
@pytest.mark.parametrize("order", [1, -1])
@rules
def test_a_copy_of_model_and_optimizer_trains_like_them_and_apart(copied, order, rule, textbook, options):
    def train(model, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            (model(minilora.tensor(draw(6, 4, seed=t))) ** 2).mean().backward()
            optimizer.step()

    model = nn.Linear(4, 3, dtype="float64", rng=np.random.default_rng(0))
    optimizer = rule(model.named_parameters(), **options)
    train(model, optimizer, range(3))
    before = snapshot(optimizer)
    pair = copied([model, optimizer][::order])[::order]
    (group,) = pair[1].groups
    assert [p is q for p, q in zip(pair[0].parameters(), group.parameters)] == [True, True]
    assert all(p.grad is None and p.data.base is group.data.base and p.room.base is group.grad.base for p in group.parameters)
    assert group.names == ["weight", "bias"]
    train(*pair, range(3, 6))
    assert snapshot(optimizer) == before
    train(model, optimizer, range(3, 6))
    assert snapshot(pair[1]) == snapshot(optimizer)


def test_a_copy_of_the_model_alone_has_no_optimizer():
    model = nn.Linear(2, 2, rng=np.random.default_rng(0))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    alone = copy.deepcopy(model)
    assert all(p.room is None and p.grad is None for p in alone.parameters())
    assert all(p.room is not None for p in optimizer.groups[0].parameters)


def test_an_optimizer_whose_arrays_were_replaced_is_not_copied():
    p = parameter(draw(3))
    optimizer = optim.SGD([p], lr=0.1)
    p.data = p.data * 1.0
    with pytest.raises(StateError, match="make the optimizer last"):
        copy.deepcopy(optimizer)


# -- shapes and names in the state --------------------------------------------------------------------------


def test_state_of_other_shapes_of_the_same_size_is_refused(device):
    def make(*shapes):
        return optim.Adam([parameter(draw(*shape)) for shape in shapes])

    state = make((2, 3), (4,)).state_dict()
    assert state["groups"][0]["shapes"] == [(2, 3), (4,)]
    for shapes in [((3, 2), (4,)), ((4,), (2, 3)), ((6,), (4,)), ((5,), (5,))]:
        optimizer = make(*shapes)
        before = snapshot(optimizer)
        with pytest.raises(StateDictError, match="shapes: expected.*in this order, got"):
            optimizer.load_state_dict(state)
        assert snapshot(optimizer) == before
    make((2, 3), (4,)).load_state_dict(state)
    state["groups"][0]["shapes"] = [[2, 3], [4]]  # as JSON keeps them
    make((2, 3), (4,)).load_state_dict(state)


def test_state_without_shapes_is_refused_and_the_advice_works(device):
    optimizer = optim.Adam([parameter(draw(2, 3)), parameter(draw(4))])
    state = optimizer.state_dict()
    for group in state["groups"]:
        del group["shapes"], group["names"]
    with pytest.raises(StateDictError, match=r"no 'shapes'.*state\['groups'\]\[i\]\['shapes'\] = optimizer"):
        optimizer.load_state_dict(state)
    for i, group in enumerate(state["groups"]):
        group["shapes"] = optimizer.groups[i].shapes
    optimizer.load_state_dict(state)


def test_names_are_part_of_the_state_where_they_were_given(device):
    a, b = parameter(draw(3)), parameter(draw(3, seed=1))
    state = optim.Adam([("a", a), ("b", b)]).state_dict()
    assert state["groups"][0]["names"] == ["a", "b"]
    with pytest.raises(StateDictError, match="names: expected 'b' where 'a' is.*another order"):
        optim.Adam([("b", b), ("a", a)]).load_state_dict(state)
    optim.Adam([a, b]).load_state_dict(state)  # nothing to compare
    optim.Adam([{"params": [("a", a), ("b", b)]}]).load_state_dict(state)


# -- half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-7, 0.1, 300.0, 6e4])
@rules
def test_float16_parameters_have_float32_moments_and_arithmetic(device, rule, textbook, options, size):
    start = draw(6).astype("float16")
    gradients = [(draw(6, seed=t + 1).clip(-1, 1) * size).astype("float16") for t in range(5)]
    p, lr = parameter(start), options.get("lr", 1e-3)
    if rule is optim.SGD:
        lr = min(lr, 1e2 / size)  # what is right must be a float16
    optimizer = rule([p], **{**options, "lr": lr})
    largest = np.abs(start.astype("float64"))
    wide = [g.astype("float64") for g in gradients]
    for t, theta in enumerate(textbook(start.astype("float64"), wide, **{**options, "lr": lr})):
        optimizer.zero_grad()
        p.grad = place(gradients[t])
        optimizer.step()
        got = fetch(p)
        assert got.dtype == np.float16 and np.isfinite(got).all()
        largest = np.maximum(largest, np.abs(theta))
        assert (np.abs(got - theta) <= 2 * (t + 1) * 2.0 ** -11 * largest + 1e-6).all()  # theta is rounded once a step
    state = optimizer.state_dict()["groups"][0]["state"]
    assert {array.dtype.name for array in state.values()} == {"float32"}
    assert all(np.isfinite(array).all() for array in state.values())
    assert [optimizer.groups[0].data.dtype, optimizer.groups[0].grad.dtype] == ["float16", "float32"]
    optimizer.load_state_dict(optimizer.state_dict())


def test_adam_first_step_of_float16_is_that_of_float64(device):
    g = np.array([1e-6, 1e-3, 0.1, 255.0, 300.0, -6e4, 6e4, 0.0])
    p = parameter(np.zeros(8, "float16"))
    optimizer = optim.Adam([p], lr=0.125)
    p.grad = place(g.astype("float16"))
    optimizer.step()
    exact = g.astype("float16").astype("float64")
    np.testing.assert_allclose(fetch(p), -0.125 * exact / (np.abs(exact) + 1e-8), rtol=1e-3)


def test_resume_of_float16_gives_the_same_bits(device):
    def start():
        return optim.AdamW([parameter(draw(5).astype("float16"))], lr=0.1)

    def train(optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            give(optimizer.groups[0].parameters[0], draw(5, seed=t, dtype="float16"))
            optimizer.step()

    whole, first, second = start(), start(), start()
    train(whole, range(6))
    train(first, range(3))
    second.groups[0].parameters[0].data[...] = first.groups[0].parameters[0].data
    second.load_state_dict(first.state_dict())
    train(second, range(3, 6))
    assert snapshot(second) == snapshot(whole)


# -- as it reads --------------------------------------------------------------------------------------------


def test_repr_shows_the_settings():
    a, b = parameter(np.zeros((2, 3))), parameter(np.zeros(4))
    assert repr(optim.SGD([a, b], lr=0.1)) == "SGD(lr=0.1, momentum=0.0, weight_decay=0.0; 2 parameters, 10 numbers)"
    lines = repr(optim.AdamW([{"params": [a], "lr": 0.5}, {"params": [b]}])).splitlines()
    assert len(lines) == 4 and lines[0] == "AdamW(" and lines[3] == ")"
    assert lines[1] == "  lr=0.5, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01; 1 parameters, 6 numbers"


def test_the_groups_name_of_another_library_names_ours():
    optimizer = optim.SGD([parameter(np.zeros(2))], lr=0.1)
    with pytest.raises(AttributeError, match=r"optimizer\.groups.*optimizer\.groups\[0\]\.settings\['lr'\]"):
        optimizer.param_groups
    assert not hasattr(optimizer, "param_groups") and optimizer.groups[0].settings["lr"] == 0.1


@pytest.mark.parametrize("lr", [np.float16(0.125), np.float32(0.125), np.float64(0.125), np.longdouble(0.125), 1, np.int64(1),
                                np.uint8(1)], ids=lambda value: type(value).__name__)
def test_any_real_number_is_a_setting(lr):
    optimizer = optim.SGD([parameter(np.zeros(2))], lr=lr, momentum=np.float32(0.5))
    assert type(optimizer.groups[0].settings["lr"]) is float and optimizer.groups[0].settings["lr"] == float(lr)


@pytest.mark.parametrize("lr", [True, np.True_, np.array(0.1), np.float32(np.nan), np.complex64(0.1), "0.1"],
                         ids=lambda value: type(value).__name__)
def test_what_is_no_real_number_is_no_setting(lr):
    with pytest.raises(ConfigError, match="lr must be a number"):
        optim.SGD([parameter(np.zeros(2))], lr=lr)


@pytest.mark.parametrize("call", [lambda optimizer: optimizer.step(), lambda optimizer: optimizer.clip_grad_norm(1.0)])
def test_an_optimizer_made_before_its_parameters_were_frozen_says_so(call):
    """As lora.inject freezes them; the advice of the message works."""
    model = nn.Sequential(nn.Linear(3, 3, rng=np.random.default_rng(0)))
    optimizer = optim.Adam(model.parameters())
    minilora.lora.inject(model, minilora.lora.Config(r=2, lora_alpha=2, target_modules=["0"]))
    x = minilora.tensor(draw(4, 3, dtype="float32"))
    (model(x) ** 2).mean().backward()
    with pytest.raises(StateError, match=r"frozen since.*adapters.*optimizer = Adam\(model\.parameters\(\)"):
        call(optimizer)
    optimizer = optim.Adam(model.parameters())
    (model(x) ** 2).mean().backward()
    call(optimizer)


@pytest.mark.parametrize("old, new, loss", [
    *[((2,), shape, lambda p: (p * p).sum()) for shape in [(1,), (3,), (), (0,), (2, 1)]],
    ((2, 2), (2, 3), lambda p: minilora.ops.linear(minilora.tensor(np.ones((6, p.shape[1]))), p).sum()),
    ((2, 2), (1, 2), lambda p: minilora.ops.linear(minilora.tensor(np.ones((6, p.shape[1]))), p).sum()),
], ids=["(1,)", "(3,)", "()", "(0,)", "(2, 1)", "a weight (2, 3)", "a weight (1, 2)"])
def test_a_gradient_for_an_array_of_another_shape_stays_out_of_the_flat_array(old, new, loss, device):
    """It would not fit, or be spread over the room of the old one; the step says what happened."""
    p = minilora.Parameter(place(np.ones(old)))
    optimizer = optim.SGD([p], lr=0.1)
    p.data = place(np.full(new, 3.0))
    for times in (1, 2):
        loss(p).backward()
        assert p.grad.shape == p.shape and (fetch(p.grad) == 6.0 * times).all()
    for _ in range(2):
        with pytest.raises(StateError, match="array was replaced.*make the optimizer last"):
            optimizer.step()
    optimizer.zero_grad()
    assert p.grad is None and (fetch(p) == 3.0).all()
