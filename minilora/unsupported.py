"""What other libraries write and tensors and packages here do not have: each refusal names what to write instead."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy

from .errors import ArgumentError, DTypeError

__all__ = ["ATTRIBUTES", "InPlaceRefusals", "KEYWORDS", "NAMES", "OF_LOSS_SCALES", "OF_OPTIMIZERS", "OF_PARAMETERS",
           "OF_SCHEDULERS", "Refusals", "explain_absent", "explain_missing", "no_such_name", "refuse_keywords"]

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
    "contiguous": "x, which every operation takes as it lies", "masked_fill": "minilora.ops.where(x > 0, value, x)",
    "chunk": "minilora.ops.split(x, 3)", "unbind": "list(x)", "index_select": "x[index]", "gather": "x[index]",
    "clamp": "minilora.ops.clip(x, -1.0, 1.0)", "amax": "minilora.ops.max(x)", "amin": "minilora.ops.min(x)",
    "unsqueeze_": "x[None]", "eq": "x == y", "ne": "x != y", "lt": "x < y", "le": "x <= y", "gt": "x > y", "ge": "x >= y",
    "loss": "x, which is the loss already: a model that is given labels returns it, and no object around it",
    "logits": "x, which is the logits already: a model returns a tensor, and no object around it",
    "new_zeros": "minilora.tensor(numpy.zeros((2, 3), x.dtype))", "new_ones": "minilora.tensor(numpy.ones((2, 3), x.dtype))",
    "new_tensor": "minilora.tensor(value)", "erf": "minilora.ops.gelu(x, 'none'), which has it inside",
    "is_contiguous": "x.data.flags.c_contiguous", "element_size": "x.dtype.itemsize", "pin_memory": "x",
    "byte": "x.astype('uint8')", "softplus": "minilora.ops.log(minilora.ops.exp(x) + 1.0)",
}
OF_PARAMETERS = {
    "requires_grad": "write x.trainable", "requires_grad_": "write x.trainable = False  # or True",
    "add_": "write x.data += y", "sub_": "write x.data -= y", "mul_": "write x.data *= y", "div_": "write x.data /= y",
}
ALL_AXES = "x.transpose(axes), all axes in their new order"
KEYWORDS = {"dim": "axis={}", "keepdim": "keepdims={}", "shape": "x.reshape({})", "axes": "x.transpose({})", "dim0": ALL_AXES,
            "dim1": ALL_AXES, "dtype": "x.astype({}) before, and leave it out",
            "out": "y = ..., and leave it out: a new tensor comes back"}
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
    "manual_seed": "rng=..., given to each thing that draws", "set_grad_enabled": "minilora.no_grad()",
    "TaskType": "minilora.lora.Config(task_type='CAUSAL_LM')", "zeros": "minilora.tensor(numpy.zeros((2, 3), 'float32'))",
    "ones": "minilora.tensor(numpy.ones((2, 3), 'float32'))", "full": "minilora.tensor(numpy.full((2, 3), 1.0, 'float32'))",
    "arange": "minilora.tensor(numpy.arange(5))", "eye": "minilora.tensor(numpy.eye(3, dtype='float32'))",
    "randn": "minilora.tensor(rng.standard_normal((2, 3), 'float32'))",
    "rand": "minilora.tensor(rng.random((2, 3), 'float32'))",
    **{name: f"the text '{name}' as a dtype" for name in ("float16", "float32", "float64", "bfloat16", "int32", "int64")},
    "long": "the text 'int64' as a dtype", "init": "p.data[...] = values, with values drawn by NumPy",
    "utils": "optimizer.clip_grad_norm(1.0)", "Identity": "minilora.nn.Sequential()",
    "BatchNorm1d": "minilora.nn.LayerNorm(channels)",
    "BatchNorm2d": "minilora.nn.GroupNorm(groups, channels)",
    "NLLLoss": "minilora.nn.CrossEntropyLoss()", "LeakyReLU": "minilora.ops.maximum(x, 0.01 * x)",
    "TransformerEncoderLayer": "minilora.models.BertLayer", "TransformerEncoder": "minilora.models.Bert",
    "Buffer": "state_names = ('mask',) in the class, and self.mask = array",
    **dict.fromkeys(("RMSprop", "Adagrad", "Adafactor", "Lion", "NAdam", "RAdam"), "minilora.optim.AdamW(params)"),
    "BitsAndBytesConfig": "minilora.quant.quantize(model)", "safe_open": "minilora.formats.open_state(path)",
    "save_file": "minilora.formats.save_state(path, state)", "load_file": "minilora.formats.load_state(path)",
    "Dataset": "minilora.train.data.Arrays", "TensorDataset": "minilora.train.data.Arrays",
}

ROOMS = ("ops", "nn", "optim", "lora", "formats", "models", "train", "tuners", "quant", "testing")  # in which it may be

# What is looked for in an optimizer, a schedule, a loss scale: see `explain_absent`.
OF_OPTIMIZERS = {
    "add_param_group": "make the optimizer again, with all groups", "state": "write optimizer.state_dict()",
    "defaults": "write optimizer.groups[0].settings", "clip_grad_norm_": "write optimizer.clip_grad_norm(1.0)",
    "backward": "write loss.backward()",
}
OF_SCHEDULERS = dict.fromkeys(("get_last_lr", "get_lr"), "write optimizer.groups[0].settings['lr']")
OF_LOSS_SCALES = {
    "scale": "write scaler.scaled(loss).backward()", "unscale_": "write scaler.unscale(optimizer)",
    "update": "write scaler.step(optimizer, norm), which does that too",
}


class Absent:
    """An attribute that a class lacks, as a descriptor: to Python it does not exist, and an instance may have its own."""

    def __init__(self, name: str, cure: str) -> None:
        self.name = name
        self.cure = cure

    def __get__(self, x: Any, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}: {self.cure}")


def explain_absent(cls: type, cures: Mapping[str, str]) -> None:
    """Let a class answer to names that it lacks."""
    for name, cure in cures.items():
        setattr(cls, name, Absent(name, cure))


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
    known = NAMES.get(name) or elsewhere_here(name)
    ours = f": minilora has {known}" if known else ""
    return AttributeError(f"module {package!r} has no attribute {name!r}{ours}")


def elsewhere_here(name: str) -> str:
    """The public name of another room, where one is looked for in the wrong one: ``minilora.exp`` is ops.exp.

    Nothing is loaded for it: Python asks a package for each file that is imported from it.
    """
    rooms = filter(None, (sys.modules.get(f"{__package__}.{room}") for room in ROOMS))
    return next((f"{room.__name__}.{name}" for room in rooms if name in getattr(room, "__all__", ())
                 and (name.islower() or room.__name__ != f"{__package__}.ops")), "")


def refuse_keywords(function: str, given: Mapping[str, Any]) -> None:
    """Raise for keyword arguments that a method does not have; None is what NumPy passes for those it does not use."""
    lines = []
    for name, value in given.items():
        cure = f": write {KEYWORDS[name].format(repr(value))}" if name in KEYWORDS else ""
        lines += [f"{function}() has no argument {name}{cure}"] if value is not None else []
    if lines:
        raise ArgumentError("\n  ".join(lines))


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
