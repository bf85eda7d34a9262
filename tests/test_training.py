"""Training as a whole: engine, layers and optimizer against a loop of plain NumPy, and what a step costs."""
import numpy as np
import pytest
from conftest import fetch, place
from standin import capturing, counting

import minilora
from minilora import lora, nn, ops, optim

STEPS, N, N_IN, OUT, R, ALPHA = 30, 16, 6, 4, 2, 3.0


def problem(seed=0):
    """Batches from a teacher that a layer can nearly learn, and the weights to start from; all float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((STEPS, N, N_IN))
    teacher = rng.standard_normal((OUT, N_IN))
    target = x @ teacher.T + 0.1 * rng.standard_normal((STEPS, N, OUT))
    W, b = 0.3 * rng.standard_normal((OUT, N_IN)), 0.1 * rng.standard_normal(OUT)
    A = 0.4 * rng.standard_normal((R, N_IN))
    return x, target, W, b, A, np.zeros((OUT, R))


# -- the loops, written out ---------------------------------------------------------------------------------


def plain_linear(lr=0.1, momentum=0.9):
    """y = x W^T + b, mean squared error, SGD with momentum; yields loss and weights after every step."""
    x, target, W, b, _, _ = problem()
    vW, vb = np.zeros_like(W), np.zeros_like(b)
    for t in range(STEPS):
        d = x[t] @ W.T + b - target[t]
        loss = (d * d).sum() / d.size
        dy = 2.0 * d / d.size
        vW = momentum * vW + dy.T @ x[t]
        vb = momentum * vb + dy.sum(axis=0)
        W, b = W - lr * vW, b - lr * vb
        yield loss, {"weight": W, "bias": b}


def plain_lora(lr=0.05, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.02):
    """y = x W^T + b + s (x A^T) B^T with W and b frozen, mean squared error, AdamW."""
    x, target, W, b, A, B = problem()
    s = ALPHA / R
    mA, vA, mB, vB = np.zeros_like(A), np.zeros_like(A), np.zeros_like(B), np.zeros_like(B)
    for t in range(STEPS):
        z = x[t] @ A.T
        d = x[t] @ W.T + b + s * z @ B.T - target[t]
        loss = (d * d).sum() / d.size
        dy = 2.0 * d / d.size
        dB = s * dy.T @ z
        dA = s * (dy @ B).T @ x[t]
        c1, c2 = 1.0 - beta1 ** (t + 1), 1.0 - beta2 ** (t + 1)
        mA, vA = beta1 * mA + (1 - beta1) * dA, beta2 * vA + (1 - beta2) * dA ** 2
        mB, vB = beta1 * mB + (1 - beta1) * dB, beta2 * vB + (1 - beta2) * dB ** 2
        A = A - lr * decay * A - lr * (mA / c1) / (np.sqrt(vA / c2) + eps)
        B = B - lr * decay * B - lr * (mB / c1) / (np.sqrt(vB / c2) + eps)
        yield loss, {"weight": W, "bias": b, "adapters.default.lora_A": A, "adapters.default.lora_B": B}


# -- the same with the library ------------------------------------------------------------------------------


def make_linear(dtype):
    _, _, W, b, _, _ = problem()
    layer = nn.Linear(N_IN, OUT, dtype=dtype)
    layer.load_state_dict({"weight": W.astype(dtype), "bias": b.astype(dtype)})
    return layer, optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)


def make_lora(dtype):
    _, _, W, b, A, B = problem()
    layer = lora.Linear(N_IN, OUT, r=R, lora_alpha=ALPHA, dtype=dtype)
    arrays = {"weight": W, "bias": b, "adapters.default.lora_A": A, "adapters.default.lora_B": B}
    layer.load_state_dict({name: array.astype(dtype) for name, array in arrays.items()})
    return layer, optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.02)


def train(make, dtype="float64"):
    layer, optimizer = make(dtype)
    loss_of = nn.MSELoss()
    x, target, *_ = problem()
    for t in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(layer(minilora.tensor(x[t].astype(dtype))), minilora.tensor(target[t].astype(dtype)))
        loss.backward()
        optimizer.step()
        yield float(loss), {name: fetch(p) for name, p in layer.named_parameters()}


RUNS = {"Linear": (make_linear, plain_linear), "lora.Linear": (make_lora, plain_lora)}
runs = pytest.mark.parametrize("make, loop", RUNS.values(), ids=RUNS)


@runs
def test_equals_the_plain_loop_step_by_step(device, make, loop):
    for t, ((loss, arrays), (plain_loss, plain)) in enumerate(zip(train(make), loop(), strict=True)):
        assert abs(loss - plain_loss) <= 1e-12 * plain_loss, t
        for name, value in plain.items():
            np.testing.assert_allclose(arrays[name], value, rtol=1e-12, atol=1e-12, err_msg=f"{name}, step {t}")


@runs
def test_float32_stays_near_the_plain_float64_loop(device, make, loop):
    """A step adds a few rounding errors to weights of order 1, and the loop damps or keeps those of the past."""
    eps = 2.0 ** -23
    for t, ((loss, arrays), (plain_loss, plain)) in enumerate(zip(train(make, "float32"), loop(), strict=True)):
        assert abs(loss - plain_loss) <= 16 * (t + 2) * eps * plain_loss, t
        for name, value in plain.items():
            assert arrays[name].dtype == np.float32
            assert np.abs(arrays[name] - value).max() <= 16 * (t + 2) * eps, (name, t)


@runs
def test_the_loss_falls(make, loop):
    losses = [loss for loss, _ in loop()]
    assert losses[-1] < 0.5 * losses[0]  # else the runs above would prove little


def test_frozen_weights_keep_every_bit(device):
    _, _, W, b, _, _ = problem()
    *_, (_, arrays) = train(make_lora)
    assert arrays["weight"].tobytes() == W.tobytes() and arrays["bias"].tobytes() == b.tobytes()


@runs
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_device_follows_the_cpu(device, make, loop, dtype):
    """To rounding: Adam's version for the CPU groups its factors otherwise. SGD on the stand-in gives the same bits."""
    with minilora.use("cpu"):
        on_cpu = list(train(make, dtype))
    tolerance = 0.0 if make is make_linear and device != "gpu" else 64 * np.finfo(dtype).eps
    for (loss, arrays), (cpu_loss, cpu) in zip(train(make, dtype), on_cpu, strict=True):
        assert abs(loss - cpu_loss) <= tolerance * cpu_loss
        for name, value in cpu.items():
            np.testing.assert_allclose(arrays[name], value, rtol=tolerance, atol=tolerance)


@runs
def test_a_seed_repeats(device, make, loop):
    one, two = list(train(make, "float32")), list(train(make, "float32"))
    for (loss, arrays), (other_loss, other) in zip(one, two, strict=True):
        assert loss == other_loss
        assert {name: a.tobytes() for name, a in arrays.items()} == {name: a.tobytes() for name, a in other.items()}


@pytest.mark.parametrize("sizes", [(16,), (8, 8), (4, 8, 3, 1), (1,) * 16], ids=str)
def test_unequal_micro_batches_add_up_to_the_batch(device, sizes):
    """Weighted by their counts. Integer-valued and 16 rows: no rounding."""
    rng = np.random.default_rng(1)
    layer, _ = make_lora("float64")
    layer.load_state_dict({name: rng.integers(-4, 5, p.shape).astype("float64")
                           for name, p in layer.named_parameters()})
    layer.adapter.scaling = 2.0
    x, target = rng.integers(-4, 5, (N, N_IN)).astype("float64"), rng.integers(-4, 5, (N, OUT)).astype("float64")

    def gradients(parts):
        start = 0
        for n in parts:
            here = slice(start, start + n)
            loss = nn.MSELoss()(layer(minilora.tensor(x[here])), minilora.tensor(target[here]))
            (loss * (n * OUT)).backward()  # the sum over this part
            start += n
        found = fetch(layer.lora_A.grad), fetch(layer.lora_B.grad)
        layer.lora_A.grad = layer.lora_B.grad = None
        return found

    for got, whole in zip(gradients(sizes), gradients((N,)), strict=True):
        np.testing.assert_allclose(got, whole, rtol=1e-13)


# -- resuming -----------------------------------------------------------------------------------------------


def noisy_run(seed):
    """A model whose steps depend on counters: dropout, dropout before an adapter, and a running mean."""
    class Centred(nn.Module):
        state_names = ("mean", "calls")

        def __init__(self):
            self.mean, self.calls = place(np.zeros(8)), 0

        def forward(self, x):
            if self.training:
                self.calls += 1
                self.mean = 0.5 * self.mean + 0.5 * x.data.mean(axis=0)
            return x - minilora.Tensor(self.mean)

    rng = np.random.default_rng(seed)
    model = nn.Sequential(nn.Linear(N_IN, 8, dtype="float64", rng=rng), Centred(), nn.Dropout(0.3, rng=rng),
                          nn.Sequential(nn.Linear(8, OUT, dtype="float64", rng=rng)))
    lora.inject(model, lora.Config(r=R, lora_dropout=0.4, target_modules=["3.0"]), rng=rng)
    model[0].requires_grad()
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    return model, optimizer, optim.Scheduler(optimizer, optim.cosine(total=STEPS, warmup=3))


def steps(run, first, last):
    model, optimizer, scheduler = run
    x, target, *_ = problem()
    losses = []
    for t in range(first, last):
        optimizer.zero_grad()
        loss = ops.mse(model(minilora.tensor(x[t])), minilora.tensor(target[t]))
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("at", [0, 1, 11])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(device, at, tmp_path):
    whole, first, second = noisy_run(0), noisy_run(0), noisy_run(1)
    losses = steps(whole, 0, 20)
    assert steps(first, 0, at) == losses[:at]
    np.savez(tmp_path / "model.npz", **first[0].state_dict())
    with np.load(tmp_path / "model.npz", allow_pickle=False) as state:
        assert second[0].load_state_dict(dict(state)) == []
    for part, other in zip(first[1:], second[1:]):
        other.load_state_dict(part.state_dict())
    assert steps(second, at, 20) == losses[at:]
    state, other = whole[0].state_dict(), second[0].state_dict()
    assert {name: a.tobytes() for name, a in state.items()} == {name: a.tobytes() for name, a in other.items()}
    assert (state["1.calls"], state["2.step"], state["3.0.adapters.default.lora_dropout.step"]) == (20, 20, 20)


def test_adapter_files_hold_no_counters():
    """What is exchanged are A and B: the names of loralib stay what they are."""
    assert list(lora.lora_state_dict(noisy_run(0)[0])) == ["3.0.lora_A", "3.0.lora_B"]


# -- what a step costs on a device --------------------------------------------------------------------------

# Launches of one step of lora.Linear with bias, MSE and AdamW. A change that adds one has to say why, here.
FORWARD, BACKWARD, STEP = 9, 10, 11


def one_step(dropout=0.0):
    """The parts of a training step whose data is on the device already."""
    layer = lora.Linear(N_IN, OUT, r=R, lora_alpha=ALPHA, lora_dropout=dropout, rng=np.random.default_rng(0))
    optimizer = optim.AdamW(layer.parameters())
    x, target, *_ = problem()
    batch = minilora.tensor(x[0].astype("float32")), minilora.tensor(target[0].astype("float32"))
    losses = []

    def forward():
        losses[:] = [nn.MSELoss()(layer(batch[0]), batch[1])]

    def backward():
        optimizer.zero_grad()
        losses[0].backward()

    return forward, backward, optimizer


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_launches_of_a_step(device):
    forward, backward, optimizer = one_step()
    found = []
    for part in (forward, backward, optimizer.step) * 2:
        with counting() as counts:
            part()
        assert (counts.syncs, counts.h2d, counts.d2h) == (0, 0, 0), counts
        found.append(counts.launches)
        print(part.__name__, counts.launches, dict(counts.calls))
    assert found[:3] == found[3:]
    assert found[0] <= FORWARD and found[1] <= BACKWARD and found[2] <= STEP, found[:3]


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_never_waits_for_the_device(device, dropout):
    forward, backward, optimizer = one_step(dropout)
    scheduler = optim.Scheduler(optimizer, optim.cosine(total=10, warmup=2))
    with capturing():
        for _ in range(3):
            forward()
            backward()
            optimizer.clip_grad_norm(1.0)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_first_step_of_a_deep_model_never_waits(device):
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(N_IN, 8, rng=rng).requires_grad(False), nn.GELU(),
                          lora.Linear(8, 8, r=R, lora_dropout=0.1, rng=rng), nn.Tanh(), nn.Dropout(0.1, rng=rng),
                          nn.Linear(8, OUT, rng=rng), nn.LogSoftmax())
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x, target = place(np.ones((N, N_IN), "float32")), place(np.ones((N, OUT), "float32"))
    with capturing():
        minilora.ops.mse(model(minilora.Tensor(x)), target).backward()
        optimizer.step()
