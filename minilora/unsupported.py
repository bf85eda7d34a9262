"""What other libraries write and tensors and packages here do not have: each refusal names what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy

from .errors import DTypeError

__all__ = ["ATTRIBUTES", "InPlaceRefusals", "KEYWORDS", "NAMES", "OF_PARAMETERS", "Refusals", "explain_missing", "no_such_name",
           "refuse_keywords"]

# name: what to write for a tensor x. An operation of the same name (x.exp) needs no line, nor what arrays have (x.strides).
ATTRIBUTES = {
    "view": "x.reshape(shape)", "view_as": "x.reshape(y.shape)", "flatten": "x.reshape(-1)", "ravel": "x.reshape(-1)",
    "squeeze": "x.reshape(shape)", "unsqueeze": "x[None]", "permute": "x.transpose(axes)", "swapaxes": "x.transpose(axes)",
    "t": "x.T", "mT": "x.T", "dim": "x.ndim", "numel": "x.size", "nelement": "x.size", "ndimension": "x.ndim",
    "type": "x.astype(dtype)", "float": "x.astype('float32')", "double": "x.astype('float64')", "half": "x.astype('float16')",
    "long": "x.astype('int64')", "int": "x.astype('int32')", "bool": "x.astype('bool')", "type_as": "x.astype(y.dtype)",
    "to": "x.astype(dtype), or for another device minilora.tensor(x.numpy()) under minilora.use(device)",
    "cpu": "x.numpy(), or for a tensor minilora.tensor(x.numpy()) under minilora.use('cpu')",
    "cuda": "minilora.tensor(x.numpy()) under minilora.use('gpu')", "is_cuda": "x.device.name",
    "get": "x.numpy()", "tolist": "x.numpy().tolist()", "clone": "minilora.tensor(x)", "copy": "minilora.tensor(x)",
    "mm": "x @ y", "bmm": "x @ y", "dot": "x @ y", "square": "x ** 2", "norm": "(x * x).sum() ** 0.5",
    "requires_grad": "minilora.Parameter(x.data), whose switch is trainable", "is_leaf": "isinstance(x, minilora.Parameter)",
    "requires_grad_": "minilora.Parameter(x.data), whose switch is trainable", "grad_fn": "x.node", "detach_": "x.detach()",
    "trainable": "minilora.Parameter(x.data), which has .trainable",
    "zero_": "x.data[...] = 0.0", "fill_": "x.data[...] = value", "copy_": "x.data[...] = y.data",
    "add_": "x + y, which is a new tensor", "sub_": "x - y, which is a new tensor", "mul_": "x * y, which is a new tensor",
    "div_": "x / y, which is a new tensor", "expand": "x + y, which broadcasts x: no copies are needed",
    "expand_as": "x + y, which broadcasts x: no copies are needed", "nbytes": "x.data.nbytes",
}
OF_PARAMETERS = {
    "requires_grad": "write x.trainable", "requires_grad_": "write x.trainable = False  # or True",
    "add_": "write x.data += y", "sub_": "write x.data -= y", "mul_": "write x.data *= y", "div_": "write x.data /= y",
}
KEYWORDS = {"dim": "axis", "keepdim": "keepdims"}
# What is looked for in a package, lora.LoraConfig or ops.cat, whichever it is: the call that does it here.
NAMES = {
    "LoraConfig": "minilora.lora.Config", "get_peft_model": "minilora.lora.inject(model, config)",
    "inject_adapter_in_model": "minilora.lora.inject(model, config)", "LoraModel": "minilora.lora.inject(model, config)",
    "PeftModel": "minilora.formats.load_adapter(model, folder)", "PeftConfig": "minilora.formats.read_adapter(folder)",
    "AutoModelForCausalLM": "minilora.models.load(folder)", "AutoModel": "minilora.models.load(folder)",
    "AutoModelForSequenceClassification": "minilora.models.load(folder)", "from_pretrained": "minilora.models.load(folder)",
    "AutoTokenizer": "minilora.models.Tokenizer(folder)", "PrefixTuningConfig": "minilora.tuners.PrefixConfig",
    "PromptTuningConfig": "minilora.tuners.PromptConfig", "Trainer": "minilora.train.fit(model, data)",
    "TrainingArguments": "minilora.train.Settings", "DataLoader": "minilora.train.data.Arrays",
    "ModuleList": "a plain list as an attribute of a module", "ModuleDict": "a plain dict as an attribute of a module",
    "ParameterList": "a plain list as an attribute of a module", "ParameterDict": "a plain dict as an attribute of a module",
    "Parameter": "minilora.Parameter", "functional": "minilora.ops", "cat": "minilora.ops.concatenate(xs)",
    "chunk": "minilora.ops.split(x, sections)", "clamp": "minilora.ops.clip(x, low, high)", "amax": "minilora.ops.max(x)",
    "permute": "minilora.ops.transpose(x, axes)", "mse_loss": "minilora.ops.mse(x, y)", "mm": "x @ y", "bmm": "x @ y",
    "einsum": "x @ y, with reshape and transpose", "scaled_dot_product_attention": "minilora.ops.attention(q, k, v)",
    "interpolate": "minilora.ops.upsample(x, 2)", "clip_grad_norm_": "optimizer.clip_grad_norm(1.0)",
    "lr_scheduler": "minilora.optim.Scheduler(optimizer, schedule)",
    "LambdaLR": "minilora.optim.Scheduler(optimizer, schedule)",
    "CosineAnnealingLR": "minilora.optim.Scheduler(optimizer, minilora.optim.cosine(total))",
    "LinearLR": "minilora.optim.linear(total)", "StepLR": "minilora.optim.step_decay(every)",
    "GradScaler": "minilora.optim.LossScale()", "autocast": "minilora.half.mixed()", "inference_mode": "minilora.no_grad()",
    "from_numpy": "minilora.Tensor(array)", "as_tensor": "minilora.tensor(array)", "cuda": "minilora.use('gpu')",
    "device": "minilora.use(name)", "set_default_device": "minilora.use(name)", "gradcheck": "minilora.testing.gradcheck",
    "checkpoint": "minilora.nn.grad_checkpoint(model)", "compile": "minilora.record(step)",
    "manual_seed": "rng=..., given to each thing that draws",
}


class Missing:
    """An attribute that tensors lack, as a descriptor: it costs nothing where it is not used, which `__getattr__` would.

    To Python it does not exist: it raises `AttributeError`, so that `hasattr` is False.
    """

    def __init__(self, name: str, cure: str) -> None:
        self.name = name
        self.cure = cure

    def __get__(self, x: Any, owner: type) -> NoReturn:
        cure = OF_PARAMETERS.get(self.name, self.cure) if issubclass(owner, InPlaceRefusals) else self.cure
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}: {cure}")

    def __set__(self, x: Any, value: Any) -> NoReturn:
        self.__get__(x, type(x))  # p.requires_grad = False must not be lost in silence


def explain_missing(ops: ModuleType) -> None:
    """Enter into `Refusals` what a tensor lacks: the lines of the tables, operations, and the attributes of arrays."""
    cures = {name: f"its array has, x.data.{name}, whose values are constants without a gradient"
             for name in dir(numpy.ndarray) if not name.startswith("_") and name != "data"}
    cures |= {name: f"write minilora.ops.{name}(x)" for name in ops.__all__ if name.islower()}
    cures |= {name: f"write {line}" for name, line in ATTRIBUTES.items()}
    for name, cure in cures.items():
        setattr(Refusals, name, Missing(name, cure))


def no_such_name(package: str, name: str) -> AttributeError:
    """The error for a name that a package lacks; for one that PyTorch or PEFT has, with ours."""
    ours = f": minilora has {NAMES[name]}" if name in NAMES else ""
    return AttributeError(f"module {package!r} has no attribute {name!r}{ours}")


def refuse_keywords(function: str, given: Mapping[str, Any]) -> None:
    """Raise for keyword arguments that a method does not have; None is what NumPy passes for those it does not use."""
    for name, value in given.items():
        if value is not None:
            cure = f": write {KEYWORDS[name]}={value!r}" if name in KEYWORDS else ""
            raise DTypeError(f"{function}() has no argument {name}{cure}")


def _whole_numbers(symbol: str) -> Any:
    def refuse(self: Any, other: Any) -> NoReturn:
        raise DTypeError(f"a tensor has no {symbol}, whose gradient is of no use: compute with its array, x.data {symbol} y, "
                         "for a constant")
    return refuse


def _in_place(symbol: str) -> Any:
    def refuse(self: Any, other: Any) -> NoReturn:
        raise DTypeError(f"p {symbol}= x would put a plain tensor, which nothing trains, in the place of the parameter p: "
                         f"write p.data {symbol}= x to change its numbers, or y = p {symbol} x for a new tensor")
    return refuse


if TYPE_CHECKING:  # for an editor, what is refused does not exist
    class Refusals:
        __slots__ = ()

    class InPlaceRefusals:
        __slots__ = ()
else:
    class Refusals:
        """What no tensor can do, as methods that say so."""

        __slots__ = ()
        __mod__ = __rmod__ = _whole_numbers("%")
        __floordiv__ = __rfloordiv__ = _whole_numbers("//")

        def __dir__(self):
            return [name for name in object.__dir__(self) if hasattr(self, name)]

        def __divmod__(self, other):
            raise DTypeError("a tensor has no divmod, whose gradient is of no use: compute with its array, x.data // y, "
                             "x.data % y, for constants")

        __rdivmod__ = __divmod__

        def __rpow__(self, base):
            raise DTypeError("a number to the power of a tensor: write minilora.ops.exp(x * math.log(number))")

        def __setitem__(self, index, value):
            raise DTypeError("the elements of a tensor cannot be assigned, for a graph may hold it: write "
                             "x.data[index] = value to change the numbers of a constant or a parameter, outside any graph")

    class InPlaceRefusals:
        """A parameter is no name for a sum: ``p += x`` would lose it."""

        __slots__ = ()
        __iadd__, __isub__, __imul__, __itruediv__ = map(_in_place, "+-*/")
        __ipow__, __imatmul__ = map(_in_place, ["**", "@"])
