"""Adam, with its bias correction."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
Adam keeps a running mean m of the gradients and v of their squares:

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2

Both start at 0, so in step t = 1, 2, ... they are too small by the factors
(1 - beta1^t) and (1 - beta2^t). Divide these out (m and v themselves stay
as they are), and step:

    theta <- theta - lr m' / (sqrt(v') + eps)

theta, g, m, v    of one shape; the others are numbers
return            the new theta, m, v

In the first step every element moves by lr, whatever the size of its
gradient. That is why Adam's step does not feel how s scales dA and dB.

>>> theta, m, v = step(np.array([0.0]), np.array([50.0]), np.array([0.0]),
...                    np.array([0.0]), 1, 0.1, 0.9, 0.999, 0.0)
>>> print(theta.round(6))
[-0.1]
"""

CODE = """
import numpy as np


def step(theta, g, m, v, t, lr, beta1, beta2, eps):
    <blank>
    return theta, m, v
"""

MORE = "three steps"


def points(draw: Draw) -> dict[str, Any]:
    shape = draw.size(), draw.size()
    return {"theta": draw.normal(*shape), "gradients": [draw.normal(*shape) for _ in range(3 if draw.case == MORE else 1)],
            "lr": 0.3, "beta1": 0.83, "beta2": 0.97, "eps": 0.1}  # 1 / (1 - beta) is no length of an axis


def run(answer: Any, inputs: dict[str, Any]) -> Any:
    theta, gradients, *numbers = inputs.values()
    m = v = theta * 0.0
    for t, g in enumerate(gradients, 1):
        given = answer(theta, g, m, v, t, *numbers)
        if not isinstance(given, tuple) or len(given) != 3:
            return given
        theta, m, v = given
    return theta, m, v


def right(theta: Any, gradients: list[Any], lr: float, beta1: float, beta2: float, eps: float) -> Any:
    from ...backend import to_host
    from ...optim import Adam
    from ...tensor import Parameter

    parameter = Parameter(theta)
    optimizer = Adam([parameter], lr=lr, betas=(beta1, beta2), eps=eps)
    m = sum((1.0 - beta1) * beta1 ** k * g for k, g in enumerate(reversed(gradients)))
    v = sum((1.0 - beta2) * beta2 ** k * (g * g) for k, g in enumerate(reversed(gradients)))
    for g in gradients:
        parameter.grad = g
        optimizer.step()
    return to_host(parameter.data).copy(), m, v


MEANS = "m = beta1 * m + (1.0 - beta1) * g\nv = beta2 * v + (1.0 - beta2) * g * g\n"
HATS = "m_hat, v_hat = m / (1.0 - beta1 ** t), v / (1.0 - beta2 ** t)\n"
STEP = "theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)"

puzzle = Function(
    name="adam", teaches="an optimizer's first step: Adam's bias correction", task=TASK, find="step", code=CODE,
    answer=MEANS + HATS + STEP,
    mistakes=(
        Mistake(MEANS + "theta = theta - lr * m / (np.sqrt(v) + eps)",
                "The bias correction is missing: m and v start at 0 and are too small at first, by different factors."),
        Mistake(MEANS + HATS + "theta = theta - lr * m_hat / np.sqrt(v_hat + eps)",
                "eps is inside the root. It is added to the root."),
        Mistake(MEANS + HATS + "theta = theta + lr * m_hat / (np.sqrt(v_hat) + eps)",
                "It steps uphill: theta minus lr times the step."),
        Mistake(MEANS + "m_hat, v_hat = m / (1.0 - beta1), v / (1.0 - beta2)\n" + STEP,
                "The correction is that of step 1 in every step: beta1 ** t and beta2 ** t."),
        Mistake(MEANS.replace("g * g", "g") + HATS + STEP, says="not finite"),
        Mistake(MEANS + "m = m / (1.0 - beta1 ** t)\nv = v / (1.0 - beta2 ** t)\ntheta = theta - lr * m / (np.sqrt(v) + eps)",
                "m and v were returned corrected, and would be corrected again in the next step. Keep them, and give the "
                "corrected ones other names."),
        Mistake("m += (1.0 - beta1) * (g - m)\nv += (1.0 - beta2) * (g * g - v)\n" + HATS
                + "theta -= lr * m_hat / (np.sqrt(v_hat) + eps)", says="theta changed"),
    ),
    hints=("Four lines: m, v, their corrected forms under other names, theta.",
           "m_hat = m / (1 - beta1 ** t), and the same for v with beta2.",
           "theta - lr * m_hat / (np.sqrt(v_hat) + eps), with a new array each: theta = theta - ..., not theta -= ..."),
    see="minilora/optim/adam.py: Adam", points=points, cases=("", MORE, "float32"), outputs=("theta", "m", "v"), right=right,
    run=run)
