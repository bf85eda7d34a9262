"""TF32 as a card computes it (-m gpu), and on the emulator, which cuts factors off. The switch: test_tensor_cores.py."""
import emulator
import numpy as np
import pytest
from conftest import fetch, need_gpu, place

import minilora
from minilora import backend, lora, nn, ops, optim

E = 2.0 ** -10


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def name(request):
    if request.param == "emulated":
        with emulator.emulated_device():
            yield backend.current_device().name
    else:
        need_gpu()
        import cupy
        if int(cupy.cuda.Device().compute_capability) < 80:
            pytest.skip("this card has no TF32: it computes in true float32 then")
        with backend.use("gpu", tf32=False):
            yield "gpu"


@pytest.mark.parametrize("shape", [(64, 256, 32), (2, 3, 64, 96, 32)], ids=["matrices", "stacks"])
def test_a_product_is_off_by_no_more_than_the_bound_and_by_more_than_float32(name, shape):
    *lead, n, k, m = shape
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((*lead, *part)).astype("float32") for part in ((n, k), (k, m)))
    exact, sums = np.matmul(a.astype("float64"), b), np.matmul(abs(a).astype("float64"), abs(b))
    one, two = place(a), place(b)
    sizes = {}
    for tf32 in (False, True):
        with backend.use(name, tf32=tf32) as device:
            error = abs(fetch(device.xp.matmul(one, two)) - exact)
            assert (error <= (tf32 * 2.1 * E + k * 2.0 ** -23) * sums).all()
            sizes[tf32] = float((error / sums).max())
            assert abs(fetch(device.exact.matmul(one, two)) - exact).max() < 1e-4
    assert sizes[False] < 2e-6 and sizes[True] > 1e-5


def test_a_training_step_is_near_that_of_float32(name):
    losses = []
    for tf32 in (False, True):
        with backend.use(name, tf32=tf32):
            rng = np.random.default_rng(0)
            x, y = (place(rng.standard_normal((64, n)), "float32") for n in (48, 24))
            layer = lora.adapt(nn.Linear(48, 24, rng=1), r=4, lora_alpha=8, rng=2)
            optimizer = optim.Adam([p for p in layer.parameters() if p.trainable], lr=1e-2)
            losses.append([])
            for _ in range(5):
                loss = ops.mse(layer(minilora.Tensor(x)), minilora.Tensor(y))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)
    assert losses[1] != losses[0]


def test_merging_has_the_same_bits(name):
    merged = []
    for tf32 in (False, True):
        with backend.use(name, tf32=tf32):
            layer = lora.adapt(nn.Linear(96, 64, rng=1), r=8, lora_alpha=8, rng=2)
            layer.lora_B.data[...] = place(np.random.default_rng(3).standard_normal((64, 8)), "float32")
            before = fetch(layer.weight).tobytes()
            delta = fetch(lora.gradient.delta(layer.lora_A.data, layer.lora_B.data, 1.0)).tobytes()
            layer.merge()
            merged.append((delta, fetch(layer.weight).tobytes()))
            layer.unmerge()
            assert fetch(layer.weight).tobytes() == before
    assert merged[0] == merged[1]


def test_a_recorded_step_follows_the_switch(name):
    x = np.full((32, 32), 1.0 + 2.0 ** -20, "float32")
    step = minilora.record(lambda x: ops.matmul(minilora.Tensor(x), minilora.Tensor(x)))
    given, seen = place(x), {False: set(), True: set()}
    for tf32 in (False, True, False, True):
        with backend.use(name, tf32=tf32):
            seen[tf32] |= {fetch(step(given)).tobytes() for _ in range(4)}
    assert len(seen[False]) == len(seen[True]) == 1 and seen[False] != seen[True]
