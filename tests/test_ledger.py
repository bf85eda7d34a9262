"""How a ledger is printed, and what it says of kernels."""
import functools

import numpy as np
import pytest
from cases import CASES

import minilora
from minilora import Parameter, Tensor, engine, lora, nn, ops, versions
from minilora.engine import Op, apply
from minilora.ops.attention import ScaledDotProduct
from minilora.recording import watcher


def adapted(n, width):
    rng = np.random.default_rng(0)
    layer = lora.Linear(width, width, r=2, rng=rng)
    return layer(minilora.tensor(rng.standard_normal((n, width)).astype("float32")))


def test_a_star_says_that_a_kernel_stood_in():
    y = adapted(1100, 128)
    assert [(row.op, row.kernel) for row in engine.ledger(y).rows] == [("LoRALinear", "BlockedLoRALinear")]
    assert str(engine.ledger(y)).splitlines()[1].startswith("LoRALinear*    (1100, 128)")
    assert str(engine.ledger(y)).splitlines()[-1] == \
        '* by a kernel; minilora.use("cpu", kernels=False) runs the operation itself'
    with minilora.use("cpu", kernels=False):
        y = adapted(1100, 128)
    assert [(row.op, row.kernel) for row in engine.ledger(y).rows] == [("LoRALinear", "")]
    assert "*" not in str(engine.ledger(y))


def test_a_small_product_is_left_to_the_reference():
    assert [(row.op, row.kernel) for row in engine.ledger(adapted(10, 128)).rows] == [("LoRALinear", "")]


@pytest.mark.parametrize("kernels", [True, False])
def test_no_line_is_wider_than_80(kernels):
    model = nn.GPT2(nn.GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=1, n_head=4), rng=0)
    lora.inject(model, lora.Config(r=3, target_modules="all-linear"), rng=0)
    ids = np.random.default_rng(0).integers(0, 97, (3, 12))
    with minilora.use("cpu", kernels=kernels):
        lines = str(engine.ledger(model(ids, labels=ids))).splitlines()
    assert max(map(len, lines)) <= 80 and ("*" in lines[-1]) is kernels


def test_many_arrays_are_broken_between_two_of_them():
    class Keeps(Op):
        """y = x"""

        def forward(self, x):
            self.save(*(np.ones((i + 1, 1)) for i in range(5)))
            return x * 1.0

    text = str(engine.ledger(apply(Keeps, minilora.Parameter(np.ones(3)))))
    assert text.splitlines()[1:3] == [
        "Keeps          (3,)             (1, 1) float64, (2, 1) float64,              120",
        "                                (3, 1) float64, (4, 1) float64,"]
    assert text.splitlines()[3].strip() == "(5, 1) float64" and len(text.splitlines()) == 5


def test_a_long_name_takes_room_from_the_kept_arrays():
    class AnOperationWithAVeryLongName(Op):
        """y = x"""

        def forward(self, x):
            self.save(x * 1.0)
            return x * 1.0

    w = minilora.Parameter(np.ones((2, 3, 4, 5)))
    lines = str(engine.ledger(apply(AnOperationWithAVeryLongName, w))).splitlines()
    assert lines[1].startswith("AnOperationWithAVeryLongName (2, 3, 4, 5)     (2, 3, 4, 5) float64") and len(lines[1]) <= 84


# -- every kernel of the CPU: it says that it ran, or that it left the work to the reference ----------------------------

OVERRIDES = {reference: version for reference, version in versions.load("cpu").items() if isinstance(reference, type)}
BLOCKED_ANYWAY = {ops.LinearCrossEntropy}  # where it leaves forward to the reference, its passes are still the kernel's


@pytest.mark.parametrize("reference", OVERRIDES.keys() - BLOCKED_ANYWAY, ids=lambda reference: reference.__name__)
def test_a_kernel_says_where_the_reference_ran(reference, monkeypatch):
    owner, name = (ScaledDotProduct, "attend") if issubclass(reference, ScaledDotProduct) else (reference, "forward")
    plain, ran, seen = getattr(owner, name), [], []

    @functools.wraps(plain)
    def counted(self, *arrays):
        ran.append(self)
        return plain(self, *arrays)

    monkeypatch.setattr(owner, name, counted)
    monkeypatch.setattr("minilora.kernels.cpu.low_rank.BLOCK", 16)  # outputs: more are the kernel's
    token = watcher.set(lambda op, inputs, y: seen.append(op))
    try:
        for case in [case for case in CASES if case.op is reference]:
            for dtype in ("float64", "float32", "float16", "complex128"):
                leaf = Tensor if dtype == "complex128" else Parameter
                arrays = [a.astype(dtype) for a in case.inputs(np.random.default_rng(0), "float64")]
                case.call(*map(leaf, arrays))
                case.call(*[leaf(np.asfortranarray(a)) for a in arrays])
    finally:
        watcher.reset(token)
    own = [op for op in seen if isinstance(op, reference)]
    assert own and {"", OVERRIDES[reference].__name__} == {op.kernel for op in own}
    for op in own:
        assert (op.kernel == "") == (op in ran), (op.kernel, op.saved)
