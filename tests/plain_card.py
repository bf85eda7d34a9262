"""The stand-in as a GPU of which only graphs and products are a GPU's, and all else the reference: quick, and with numbers."""
import contextlib

import pytest
import standin

from minilora import versions
from minilora.device import array_module
from minilora.graphs import played
from minilora.kernels.cublas import products
from minilora.optim.adam import adam_update

OWN = (array_module, played)


def without_if(theta, g, m, v, beta1, beta2, size, eps, keep):
    """`adam_update`, whose reference looks at `keep`: where that is in the device's memory it would wait."""
    m *= beta1
    m += g
    v *= beta2
    v += g * g
    step = m / (v ** 0.5 + eps)
    step *= size
    theta *= keep
    theta -= step


@contextlib.contextmanager
def plain_card(*more):
    """That device as the current one, `card`; `more` are references whose overrides for the GPU it has, too."""
    everything = versions.load("gpu")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(versions._registry, "gpu",
                        {**{reference: everything[reference] for reference in (*OWN, *more)}, adam_update: without_if})
    monkeypatch.setattr(products, "WORKSPACE", 256)  # of each stream, and filled with NaN
    try:
        with standin.card() as device:
            yield device
    finally:
        monkeypatch.undo()
