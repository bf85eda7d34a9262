"""Random programs: the gradients of the engine against a complex step through plain NumPy, and whose arrays they are."""
import numpy as np
import programs
import pytest
from conftest import fetch, place, shares
from hypothesis import example, given, settings, strategies as st

from minilora import Parameter, Tensor, optim


def complex_step(program, leaves, dy):
    """dL/d(leaf) for every leaf, L = sum(dy y), element by element."""
    gradients = []
    for i, leaf in enumerate(leaves):
        gradient = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            moved = leaf.astype(complex)
            moved[index] += 1e-30j
            y = programs.run(program, [*leaves[:i], moved, *leaves[i + 1:]], programs.ARRAYS)
            gradient[index] = (dy * np.imag(y)).sum() / 1e-30
        gradients.append(gradient)
    return gradients


def check_alone(parameters, others):
    """No gradient shares memory with another one, with a room of another parameter, or with what the caller holds."""
    held = [p.gathered for p in parameters if p.gathered is not None]
    rooms = [(p, p.room) for p in parameters if p.room is not None]
    for i, p in enumerate(p for p in parameters if p.gathered is not None):
        assert type(p.gathered) is p.device.array_type and p.gathered.shape == p.shape and p.gathered.dtype == p.dtype
        assert not any(shares(p.gathered, array) for array in held[:i] + others)
        assert not any(shares(p.gathered, room) for q, room in rooms if q is not p)


SHARED_NUMBER = [  # (a + b) * 1 + a * 3 of two numbers: one array goes to both, and comes back to one
    ("sum", 0, 0), ("sum", 1, 1), ("add", 2, 3), ("number last", 4, 4), ("add", 5, 2)]


@settings(max_examples=max(150, settings().max_examples))
@given(drawn=programs.programs(), rooms=st.booleans(), look=st.booleans(), again=st.booleans())
@example(drawn=(SHARED_NUMBER, [np.array([0.5]), np.array([0.25])], [True, True], None), rooms=False, look=False, again=False)
@example(drawn=([("add", 0, 1)], [np.array([0.5]), np.array([0.25])], [True, True], None), rooms=False, look=False, again=True)
def test_gradients_of_programs(device, drawn, rooms, look, again):
    """Twice, so that they add up; with and without an optimizer, a reader of `grad`, and a fresh start in between."""
    program, leaves, trained, host_dy = drawn
    f = programs.tensors(place)
    parameters = [Parameter(place(x), trainable=t) for x, t in zip(leaves, trained)]
    optimizer = optim.SGD([p for p in parameters if p.trainable], lr=0.1) if rooms and any(trained) else None
    expected = complex_step(program, leaves, 1.0 if host_dy is None else host_dy)
    total, seen = 0.0, []
    for factor in (1.0, 3.0):
        y = programs.run(program, parameters, f)
        np.testing.assert_allclose(fetch(y), programs.run(program, leaves, programs.ARRAYS), rtol=1e-11, atol=1e-11)
        if y.node is None:
            return
        dy = None if host_dy is None else place(factor * host_dy)
        y.backward(dy)
        total += 1.0 if host_dy is None else factor
        check_alone(parameters, [y.data, *(p.data for p in parameters), *([] if dy is None else [dy])])
        for p, gradient in zip(parameters, expected):
            if p.gathered is None:
                assert not p.trainable or not gradient.any()
                continue
            assert p.trainable
            scale = max(1.0, np.abs(gradient).max(initial=0.0))
            np.testing.assert_allclose(fetch(p.gathered), total * gradient, rtol=0, atol=1e-11 * scale)
        if look:
            seen += [(g, fetch(g)) for g in (p.grad for p in parameters) if g is not None]
        if again and optimizer is not None:
            optimizer.zero_grad()
            total = 0.0
    if again and optimizer is not None:
        assert all(fetch(g).tobytes() == before.tobytes() for g, before in seen)
    for p, x in zip(parameters, leaves):
        np.testing.assert_array_equal(fetch(p), x)
    if dy is not None:
        np.testing.assert_array_equal(fetch(dy), factor * host_dy)


@pytest.mark.parametrize("name", programs.NAMES)
def test_every_step_can_be_drawn(name, device):
    """The table is no dead letter: two shapes fit each step, and both sides agree on its value."""
    fits, step = programs.STEPS[name]
    a, b = next((a, b) for a in programs.SHAPES[::-1] for b in programs.SHAPES[::-1] if 0 not in a + b and fits(a, b))
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, a), rng.uniform(-1, 1, b)
    got = step(programs.tensors(place), Tensor(place(a)), Tensor(place(b)))
    np.testing.assert_allclose(fetch(got), step(programs.ARRAYS, a, b), rtol=1e-12, atol=1e-14)
