"""Attributes, methods and operators of the device array that follow one pattern each."""
from __future__ import annotations

import numpy as np

from .arrays import again, launch, ndarray, operand
from .counts import count, perform
from .functions import xp

ATTRIBUTES = "shape ndim dtype size itemsize nbytes strides".split()
METHODS = """sum mean max min any all prod argmax argmin cumsum cumprod var std dot take clip ravel squeeze
    swapaxes repeat diagonal trace""".split()
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide,
              "floordiv": np.floor_divide, "mod": np.remainder, "pow": np.power, "matmul": np.matmul,
              "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift,
              "rshift": np.right_shift}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal}
UNARY = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}


def _attribute(name):
    return property(lambda self: getattr(self._host, name))


def _method(name):
    function = getattr(xp, name)
    return lambda self, *args, **options: function(self, *args, **options)


def _forward(ufunc):
    def operation(self, other):
        known = isinstance(other, (ndarray, bool, int, float, complex, np.generic, np.ndarray))
        # `==` with an unknown type must not fall back to comparing identities.
        if not known and ufunc not in (np.equal, np.not_equal):
            return NotImplemented
        return launch(ufunc.__name__, ufunc, 2, (self, other), {})
    return operation


def _reflected(ufunc):
    def operation(self, other):
        if not isinstance(other, (bool, int, float, complex, np.generic, np.ndarray)):
            return NotImplemented
        return launch(ufunc.__name__, ufunc, 2, (other, self), {})
    return operation


def _in_place(ufunc):
    def operation(self, other):
        host = operand(other, [])
        if np.broadcast_shapes(self.shape, np.shape(host)) != self.shape:
            raise ValueError(f"{ufunc.__name__}: an array of {self.shape} cannot hold a result with {np.shape(host)}")
        count(ufunc.__name__, "launches")
        perform(lambda: again(lambda: ufunc(self._host, host, out=self._host), [], {}))
        return self
    return operation


def _unary(ufunc):
    return lambda self: launch(ufunc.__name__, ufunc, 1, (self,), {})


for _name in ATTRIBUTES:
    setattr(ndarray, _name, _attribute(_name))
for _name in METHODS:
    setattr(ndarray, _name, _method(_name))
for _name, _ufunc in ARITHMETIC.items():
    setattr(ndarray, f"__{_name}__", _forward(_ufunc))
    setattr(ndarray, f"__r{_name}__", _reflected(_ufunc))
    if _name != "matmul":
        setattr(ndarray, f"__i{_name}__", _in_place(_ufunc))
for _name, _ufunc in COMPARISONS.items():
    setattr(ndarray, f"__{_name}__", _forward(_ufunc))
for _name, _ufunc in UNARY.items():
    setattr(ndarray, f"__{_name}__", _unary(_ufunc))


def power(base, exponent):
    if np.iscomplexobj(base):
        return np.exp(np.log(base) * exponent)  # as CuPy: an imaginary part of 1e-20 is lost where the real one is negative
    return base ** exponent  # not np.power: NumPy's operator goes its own way for -1, 0.5 and 2


ndarray.__pow__ = _forward(power)
