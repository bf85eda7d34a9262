"""The errors that minilora raises.

Each class also derives from the builtin that fits it, so ``except ValueError`` and ``except minilora.errors.ShapeError``
both work. A message says where, what was expected, what came, the likely cause, and the line to type.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ConfigError",
    "DTypeError",
    "DeviceError",
    "DivergedError",
    "FileError",
    "FormatError",
    "GraphError",
    "MiniloraError",
    "OutOfRangeError",
    "ShapeError",
    "StateDictError",
    "StateError",
]


class MiniloraError(Exception):
    """Base class of every error that minilora raises on purpose.

    Attributes
    ----------
    path : str
        Dotted path of the layer in which the error arose (``"encoder.0.fc"``), empty outside a model. Filled in by
        `minilora.nn.Module` while the error travels up, so that a layer need not know its own name.
    """

    path: str = ""
    origin: object = None

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.path}: {text}" if self.path else text


class ShapeError(MiniloraError, ValueError):
    """Two shapes do not fit together."""


class DTypeError(MiniloraError, TypeError):
    """An array of the wrong type, or two types that NumPy would promote silently."""


class ArgumentError(MiniloraError, TypeError):
    """A call with an argument that is not there, too many of them, or one too few."""


class DeviceError(MiniloraError, RuntimeError):
    """A device that cannot be used, or arrays on two devices in one operation."""


class GraphError(MiniloraError, RuntimeError):
    """A backward pass that cannot be done: no graph, a graph already used, or no scalar to start from."""


class StateError(MiniloraError, RuntimeError):
    """A call that does not fit the object's present state, such as merging twice."""


class ConfigError(MiniloraError, ValueError):
    """A setting outside its range, found when the object is made."""


class StateDictError(MiniloraError, ValueError):
    """A state dict that does not match: every missing, unexpected or misshapen key is listed."""


class OutOfRangeError(MiniloraError, IndexError):
    """A token id or a label that names no row or class."""


class FileError(MiniloraError, OSError):
    """A file or folder that cannot be read or written."""


class FormatError(MiniloraError, ValueError):
    """A file whose contents are not what its format asks for, or say something that minilora does not understand."""


class DivergedError(MiniloraError, ArithmeticError):
    """A training run whose loss, gradients or weights are not finite any more.

    Attributes
    ----------
    advice : str
        The end of the message: what may help.
    """

    advice: str = ""
