"""Bad input: one row a mistake. Each row states the error's class, what its message must name, and where it arose.

For every row: the class is exactly the one promised; the builtin that it derives from catches it too; the message names
the numbers; the layer's path is right; and nothing that the user holds has changed, in any bit. All rows are run once
more by ``python -O``, which drops assert statements: no check of the library may be one.
"""
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import errors, lora, nn, ops, optim
from minilora.errors import (ArgumentError, ConfigError, DeviceError, DTypeError, GraphError, MiniloraError, OutOfRangeError,
                             ShapeError, StateDictError, StateError)

BUILTINS = {ArgumentError: TypeError, ShapeError: ValueError, DTypeError: TypeError, DeviceError: RuntimeError,
            GraphError: RuntimeError, StateError: RuntimeError, ConfigError: ValueError, StateDictError: ValueError,
            OutOfRangeError: IndexError}
ROWS = {}


def row(error, *named, path="", id=None):
    """Register a mistake: a function of a `World` that prepares it and returns the call that goes wrong."""
    def register(function):
        name = id or function.__name__
        if name in ROWS:
            raise KeyError(f"two rows named {name}")
        ROWS[name] = SimpleNamespace(error=error, named=named, path=path, prepare=function)
        return function
    return register


def rows(error, name, make, *values, named=()):
    """The same mistake with several values; the message must name the value."""
    for value in values:
        row(error, *(named or [repr(value)]), id=f"{name} {value!r}"[:60])(
            lambda w, value=value: lambda: make(w, value))


class World:
    """A small model in the middle of training, and whatever else an error could damage."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.model = nn.Sequential(
            nn.Linear(12, 6, rng=rng), nn.Tanh(),
            nn.Sequential(lora.Linear(6, 5, r=2, lora_alpha=4, rng=rng), nn.Linear(5, 3, rng=rng)))
        self.lora = self.model[2][0]
        self.merged = lora.Linear(12, 3, r=2, rng=rng)
        self.merged.merge()
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = optim.Scheduler(self.optimizer, optim.cosine(total=10))
        self.x, self.target = self.tensor(rng.standard_normal((8, 12))), self.tensor(rng.standard_normal((8, 3)))
        for _ in range(2):  # gradients, moments and step numbers that are not zero
            self.optimizer.zero_grad()
            ops.mse(self.model(self.x), self.target).backward()
            self.optimizer.step()
        self.scheduler.step()
        self.frozen = self.parameter(3, trainable=False)
        self.others = [self.frozen]

    def tensor(self, values, dtype="float32"):
        return minilora.Tensor(place(values, dtype))

    def zeros(self, *shape, dtype="float32"):
        return self.tensor(np.zeros(shape), dtype)

    def parameter(self, *shape, trainable=True, dtype="float32"):
        return minilora.Parameter(place(np.ones(shape), dtype), trainable)

    def watch(self, *parameters):
        """Parameters made by a row, to be compared too."""
        self.others += parameters
        return parameters[0]

    def snapshot(self):
        parameters = dict(self.model.named_parameters())
        parameters |= {f"merged.{name}": p for name, p in self.merged.named_parameters()}
        parameters |= {f"other {i}": p for i, p in enumerate(self.others)}
        arrays = {name: p.data for name, p in parameters.items()}
        arrays |= {f"{name}.grad": p.grad for name, p in parameters.items()}
        arrays |= {f"state {name}": a for group in self.optimizer.groups for name, a in group.state.items()}
        arrays |= {"x": self.x.data, "target": self.target.data}
        found = {name: None if a is None else (id(a), a.shape, str(a.dtype), fetch(a).tobytes())
                 for name, a in arrays.items()}
        modules = [*self.model.named_modules(), ("merged", self.merged)]
        return found | {
            "settings": [(dict(group.settings), list(group.steps)) for group in self.optimizer.groups],
            "schedule": self.scheduler.state_dict(),
            "training": [module.training for _, module in modules],
            "merged": [module.merged for _, module in modules if isinstance(module, lora.Linear)],
            "trainable": {name: p.trainable for name, p in parameters.items()},
            "dropout steps": [module.step for _, module in modules if isinstance(module, nn.Dropout)],
            "globals": (minilora.current_device().name, minilora.engine.is_recording()),
        }


def complaint(name):
    """What is wrong with a row, or None. No assert statements: this runs under ``python -O`` too."""
    expected = ROWS[name]
    world = World()
    call = expected.prepare(world)
    before = world.snapshot()
    try:
        result = call()
    except MiniloraError as error:
        caught = error
    except Exception as error:
        return f"a builtin error came out of the library: {type(error).__name__}: {error}"
    else:
        return f"no error; the call gave {result!r}"
    text = str(caught)
    if type(caught) is not expected.error:
        return f"expected {expected.error.__name__}, got {type(caught).__name__}: {text}"
    if not isinstance(caught, BUILTINS[expected.error]):
        return f"{BUILTINS[expected.error].__name__} does not catch it"
    here = world.x.device.name
    named = [here if part == "standin" and here != "cpu" else part for part in expected.named]  # the other may be a GPU
    missing = [part for part in named if part not in text]
    if missing:
        return f"the message does not name {missing}: {text}"
    if caught.path != expected.path or not text.startswith(expected.path):
        return f"expected the path {expected.path!r}, got {caught.path!r}: {text}"
    after = world.snapshot()
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    return f"the failed call changed {changed}" if changed else None


# -- shapes -------------------------------------------------------------------------------------------------


@row(ShapeError, "linear", "last axis 12", "(6, 12)", "(8, 10)", path="0")
def input_of_another_width(w):
    return lambda: w.model(w.zeros(8, 10))


@row(ShapeError, "last axis 12", "(12, 8)", "transposed", path="0")
def input_transposed(w):
    return lambda: w.model(w.zeros(12, 8))


@row(ShapeError, "last axis 12", "()", path="0")
def input_without_axes(w):
    return lambda: w.model(w.zeros())


@row(ShapeError, "last axis 6", "(5, 6)", "(2, 4, 7)", path="2.0")
def input_of_another_width_inside(w):
    w.model[0], w.model[1] = nn.Linear(12, 7, rng=np.random.default_rng(0)), nn.ReLU()
    return lambda: w.model(w.zeros(2, 4, 12))


@row(ShapeError, "last axis 12", "(3, 12)", "(8, 6)")
def input_of_another_width_merged(w):
    w.merged.eval()
    return lambda: w.merged(w.zeros(8, 6))


@row(ShapeError, "mse", "(8,)", "(8, 1)", "not broadcast", "target.reshape(8,)")
def mse_of_a_column(w):
    return lambda: ops.mse(w.zeros(8), w.zeros(8, 1))


@row(ShapeError, "(8, 3)", "(8, 4)")
def mse_of_other_widths(w):
    return lambda: nn.MSELoss()(w.model(w.x), w.zeros(8, 4))


@row(ShapeError, "nothing to average", "(0, 3)", "empty")
def mse_of_an_empty_batch(w):
    y = w.model(w.zeros(0, 12))  # the forward pass itself is fine
    return lambda: ops.mse(y, w.zeros(0, 3))


@row(ShapeError, "nothing to average", "(0, 3)", "empty")
def mean_of_an_empty_batch(w):
    return lambda: w.model(w.zeros(0, 12)).mean()


@row(ShapeError, "bias of shape (3,)", "(4,)")
def bias_of_another_length(w):
    return lambda: ops.linear(w.zeros(8, 12), w.zeros(3, 12), w.zeros(4))


@row(ShapeError, "A (r, 12)", "B (3, r)", "A (12, 2)", "B (3, 2)", "transpose")
def lora_A_transposed(w):
    return lambda: lora.lora_linear(w.x, w.zeros(3, 12), None, w.zeros(12, 2), w.zeros(3, 2), 1.0)


@row(ShapeError, "A (2, 12)", "B (3, 4)")
def lora_B_of_another_rank(w):
    return lambda: lora.lora_linear(w.x, w.zeros(3, 12), None, w.zeros(2, 12), w.zeros(3, 4), 1.0)


@row(ShapeError, "(8, 12) @ (3, 12)", "12 and 3", "transpose")
def matmul_without_transpose(w):
    return lambda: w.x @ w.zeros(3, 12)


@row(ShapeError, "(8, 12)", "(5,)")
def sum_of_shapes_that_do_not_broadcast(w):
    return lambda: w.x + w.zeros(5)


@row(ShapeError, "(8, 12)", "96", "(5, 5)")
def reshape_to_another_size(w):
    return lambda: w.x.reshape(5, 5)


@row(ShapeError, "(8, 12)", "(7, 11)")
def concatenate_of_unequal_shapes(w):
    return lambda: ops.concatenate([w.x, w.zeros(7, 11)])


@row(ShapeError, "(8, 3)", "(3, 8)")
def cotangent_of_another_shape(w):
    y = w.model(w.x)
    return lambda: y.backward(place(np.ones((3, 8), "float32")))


@row(ShapeError, "one element", "(8, 12)")
def item_of_many(w):
    return lambda: w.x.item()


@row(ShapeError, "(12,)", "(12, 1)")
def gradient_of_another_shape(w):
    p = w.watch(w.parameter(12))
    return lambda: setattr(p, "grad", place(np.ones((12, 1), "float32")))


# -- dtypes -------------------------------------------------------------------------------------------------


for _dtype in ("int64", "uint8", "bool", "complex128"):
    row(DTypeError, "floating-point", _dtype, "float32", id=f"parameter of {_dtype}")(
        lambda w, dtype=_dtype: lambda: minilora.Parameter(place(np.ones(3), dtype)))
for _value, _named in ((np.array([None, 1]), "object"), (np.array(["a"]), "<U1"), ([[1.0], [1.0, 2.0]], "list"),
                       (2j, "complex"), (None, "NoneType"), ("text", "str")):
    row(DTypeError, _named, id=f"parameter of {_named}")(lambda w, value=_value: lambda: minilora.Parameter(value))
for _value, _named in (([None, 1], "object"), (["a"], "<U1"), (None, "object"), ("text", "<U4")):
    row(DTypeError, _named, id=f"tensor of {_value}")(lambda w, value=_value: lambda: minilora.tensor(value))


@row(DTypeError, "list", "minilora.tensor")
def handle_on_a_list(w):
    return lambda: minilora.Tensor([1.0])


@row(DTypeError, "Linear", "float64 (8, 12)", "float32 (6, 12)", "astype", path="0")
def input_in_float64(w):
    return lambda: w.model(w.zeros(8, 12, dtype="float64"))


@row(DTypeError, "int64 (8, 12)", "float32", path="0")
def input_of_integers(w):
    return lambda: w.model(w.zeros(8, 12, dtype="int64"))


@row(DTypeError, "LoRALinear", "float64 (8, 6)", "float32 (5, 6)", path="0")
def input_of_the_adapter_in_float64(w):
    return lambda: w.model[2](w.zeros(8, 6, dtype="float64"))


@row(DTypeError, "MSE", "float32 (8, 3)", "float64 (8, 3)")
def target_in_float64(w):
    return lambda: ops.mse(w.model(w.x), w.zeros(8, 3, dtype="float64"))


@row(DTypeError, "list", path="0")
def input_as_a_list(w):
    return lambda: w.model([[1.0] * 12])


@row(DTypeError, "list", path="0")
def input_of_the_adapter_as_a_list(w):
    return lambda: w.model[2]([[1.0] * 6])


@row(DTypeError, "floating-point", "int32")
def layer_of_integers(w):
    return lambda: nn.Linear(3, 2, dtype="int32")


@row(DTypeError, "floating-point", "int32")
def model_to_integers(w):
    return lambda: w.model.to(dtype="int32")


@row(DTypeError, "Parameter", "Tensor")
def optimizer_of_tensors(w):
    return lambda: optim.SGD([w.x], lr=0.1)


@row(DTypeError, "float32", "float64", "groups")
def optimizer_of_two_dtypes(w):
    one, two = w.parameter(3), w.parameter(3, dtype="float64")
    w.watch(one, two)
    return lambda: optim.SGD([one, two], lr=0.1)


@row(DTypeError, "float32", "float64")
def gradient_in_float64(w):
    p = w.watch(w.parameter(3))
    return lambda: setattr(p, "grad", place(np.ones(3), "float64"))


@row(DTypeError, "float64", "float32")
def cotangent_in_float64(w):
    y = w.model(w.x)
    return lambda: y.backward(place(np.ones((8, 3)), "float64"))


@row(DTypeError, "nn.Linear", "ReLU")
def adapt_an_activation(w):
    return lambda: lora.adapt(nn.ReLU(), r=2)


@row(DTypeError, "this Linear has an update already", "lora.inject(model, config, name=...)")
def adapt_twice(w):
    return lambda: lora.adapt(w.lora, r=2)


@row(DTypeError, "exponent", "str")
def power_of_text(w):
    return lambda: w.x ** "2"


# -- devices ------------------------------------------------------------------------------------------------


def other_array(w, values):
    """An array on the device that the world is not on; the CPU's world needs the stand-in for that."""
    import standin
    if w.x.device.name == "cpu":
        return standin.xp.asarray(values)
    return values


@row(DeviceError, "Linear", "(8, 12)", "(6, 12)", "cpu", "standin", "Nothing is copied silently", path="0")
def input_on_another_device(w):
    x = minilora.Tensor(other_array(w, np.zeros((8, 12), "float32")))
    return lambda: w.model(x)


@row(DeviceError, "LoRALinear", "(8, 6)", "cpu", "standin", path="0")
def input_of_the_adapter_on_another_device(w):
    x = minilora.Tensor(other_array(w, np.zeros((8, 6), "float32")))
    return lambda: w.model[2](x)


@row(DeviceError, "MSE", "cpu", "standin")
def target_on_another_device(w):
    target = minilora.Tensor(other_array(w, np.zeros((8, 3), "float32")))
    return lambda: ops.mse(w.model(w.x), target)


@row(DeviceError, "two devices", "cpu", "standin")
def optimizer_of_two_devices(w):
    one, two = w.parameter(3), minilora.Parameter(other_array(w, np.ones(3, "float32")))
    w.watch(one, two)
    return lambda: optim.SGD([one, two], lr=0.1)


@row(DeviceError, "cpu", "standin")
def cotangent_on_another_device(w):
    y = w.model(w.x)
    return lambda: y.backward(other_array(w, np.ones((8, 3), "float32")))


@row(ConfigError, "'tpu'", "cpu, gpu, auto")
def unknown_device(w):
    return lambda: minilora.use("tpu")


@row(ConfigError, "'tpu'")
def model_to_an_unknown_device(w):
    return lambda: w.model.to("tpu")


# -- the graph ----------------------------------------------------------------------------------------------


@row(GraphError, "earlier backward()", "MSE", "()")
def backward_twice(w):
    loss = ops.mse(w.model(w.x), w.target)
    loss.backward()
    return loss.backward


@row(GraphError, "earlier backward()", "Linear", "(8, 6)")
def backward_through_a_part_that_is_gone(w):
    hidden = w.model[0](w.x)
    (hidden * 1.0).sum().backward()
    loss = ops.tanh(hidden).sum()
    return loss.backward


@row(GraphError, "scalar", "(8, 3)", ".mean()", "gradient=")
def backward_from_many_numbers(w):
    y = w.model(w.x)
    return lambda: y.backward()


@row(GraphError, "no trainable parameter", "trainable=True")
def backward_of_constants(w):
    return lambda: (w.x * 2.0).sum().backward()


@row(GraphError, "no_grad()")
def backward_of_what_was_not_recorded(w):
    with minilora.no_grad():
        loss = ops.mse(w.model(w.x), w.target)
    return loss.backward


# -- settings -----------------------------------------------------------------------------------------------


rows(ConfigError, "in_features", lambda w, n: nn.Linear(n, 3), 0, -1, 2.5, True, "3", None)
rows(ConfigError, "out_features", lambda w, n: nn.Linear(3, n), 0, -1, 2.5)
rows(ConfigError, "lora in_features", lambda w, n: lora.Linear(n, 3, r=1), 0, -1, 2.5)
rows(ConfigError, "r", lambda w, r: lora.Linear(3, 3, r=r), 0, -1, 2.5, 2.0, True, "8", None)
rows(ConfigError, "adapt r", lambda w, r: lora.adapt(w.model[0], r=r), 0, -1, 2.5, True, "8")
rows(ConfigError, "lora_alpha", lambda w, a: lora.Linear(3, 3, r=1, lora_alpha=a), math.nan, math.inf, -math.inf, "16",
     None)
rows(ConfigError, "lora_alpha", lambda w, a: lora.Linear(3, 3, r=1, lora_alpha=a), 0, 0.0,
     named=["nothing would ever train"])
rows(ConfigError, "adapt alpha", lambda w, a: lora.adapt(w.model[0], r=1, lora_alpha=a), math.nan, math.inf)
rows(ConfigError, "lora_dropout", lambda w, p: lora.Linear(3, 3, r=1, lora_dropout=p), 1, 1.0,
     -0.1, 1.5, math.nan, math.inf, "0.1")
rows(ConfigError, "adapt dropout", lambda w, p: lora.adapt(w.model[0], r=1, lora_dropout=p), 1.0, -0.1, math.nan)
rows(ConfigError, "Dropout", lambda w, p: nn.Dropout(p), 1, -0.1, math.nan, None)
rows(ConfigError, "ops.dropout", lambda w, p: ops.dropout(w.x, p, 0), 1.0, -0.1, math.nan)
rows(ConfigError, "init_lora_weights", lambda w, i: lora.Linear(3, 3, r=1, init_lora_weights=i), "eva", "pissa2",
     None, 0, 1)
rows(ConfigError, "lr", lambda w, lr: optim.SGD(w.model.parameters(), lr=lr), -0.1, math.nan, math.inf, "0.1", None,
     True)
rows(ConfigError, "Adam lr", lambda w, lr: optim.Adam(w.model.parameters(), lr=lr), -1e-3, math.nan)
rows(ConfigError, "betas", lambda w, b: optim.Adam(w.model.parameters(), betas=b), (1.0, 0.9), (0.9, 1.5), (-0.1, 0.9),
     (0.9, math.nan), (0.9,), (0.9, 0.99, 0.999), 0.9, named=["betas"])
rows(ConfigError, "eps", lambda w, eps: optim.Adam(w.model.parameters(), eps=eps), -1e-8, math.nan, math.inf)
rows(ConfigError, "momentum", lambda w, m: optim.SGD(w.model.parameters(), lr=0.1, momentum=m), 1.0, -0.1, math.nan)
rows(ConfigError, "weight_decay", lambda w, d: optim.AdamW(w.model.parameters(), weight_decay=d), -0.1, math.nan)
rows(ConfigError, "max_norm", lambda w, n: w.optimizer.clip_grad_norm(n), 0, -1.0, math.nan, math.inf)
rows(ConfigError, "warmup", lambda w, n: optim.cosine(10, warmup=n), 10, -1,
     named=["warmup must be in [0, total)", "total=10"])


@row(ConfigError, "unknown settings ['learning_rate']", "'lr'")
def group_with_an_unknown_setting(w):
    return lambda: optim.SGD([{"params": [w.parameter(3)], "learning_rate": 0.1}], lr=0.1)


@row(ConfigError, "no trainable parameter", "frozen")
def optimizer_of_frozen_parameters(w):
    return lambda: optim.AdamW([w.frozen])


@row(ConfigError, "no trainable parameter")
def optimizer_of_nothing(w):
    return lambda: optim.AdamW([])


@row(ConfigError, "(3,)", "given twice")
def optimizer_of_a_parameter_twice(w):
    p = w.watch(w.parameter(3))
    return lambda: optim.SGD([p, p], lr=0.1)


# -- states -------------------------------------------------------------------------------------------------


@row(StateError, "merged already", "unmerge() first")
def merge_twice(w):
    return w.merged.merge


@row(StateError, "not merged", "merge() first")
def unmerge_of_what_is_not_merged(w):
    return w.lora.unmerge


@row(StateError, "training while merged", "unmerge() first", "eval()")
def train_while_merged(w):
    return lambda: w.merged(w.x)


@row(StateError, "training while merged", path="2.0")
def train_while_merged_inside(w):
    w.lora.merge()
    return lambda: w.model(w.x)


for _name in ("lora_A", "lora_B", "weight"):
    for _value in (math.nan, math.inf):
        def _poisoned(w, name=_name, value=_value):
            p = getattr(w.lora, name)
            p.data = p.data * 1.0
            p.data[0, 1] = value
            return w.lora.merge
        row(StateError, "NaN or inf", _name, "Nothing was changed", id=f"merge of {_value} in {_name}")(_poisoned)


@row(StateError, "NaN or inf", "overflows float16", "Nothing was changed")
def merge_that_overflows(w):
    layer = lora.Linear(3, 2, r=2, lora_alpha=2, dtype="float16")
    layer.lora_A.data[...], layer.lora_B.data[...] = 300.0, 300.0
    w.watch(*layer.parameters())
    return layer.merge


@row(StateError, "merged", "unmerge() first", path="")
def conversion_while_merged(w):
    return lambda: w.merged.to(dtype="float64")


@row(StateError, "merged", "unmerge() first", path="2.0")
def conversion_of_a_model_while_merged(w):
    w.lora.merge()
    return lambda: w.model.to(dtype="float64")


@row(StateError, "merged", path="2.0")
def load_while_merged(w):
    state = w.model.state_dict()
    w.lora.merge()
    return lambda: w.model.load_state_dict({name: value + 1 for name, value in state.items()})


@row(StateError, "merged", path="2.0")
def move_while_merged(w):
    w.lora.merge()
    return lambda: w.model.to(dtype="float64")


@row(StateError, "AdamW.step()", "no parameter has a gradient", "backward()")
def step_without_gradients(w):
    w.optimizer.zero_grad()
    return w.optimizer.step


@row(StateError, "clip_grad_norm", "no parameter has a gradient")
def clip_without_gradients(w):
    w.optimizer.zero_grad()
    return lambda: w.optimizer.clip_grad_norm(1.0)


@row(StateError, "replaced", "make the optimizer last")
def step_after_moving_the_model(w):
    w.model.to(dtype="float64")
    ops.mse(w.model(w.zeros(8, 12, dtype="float64")), w.zeros(8, 3, dtype="float64")).backward()
    return w.optimizer.step


# -- saved states -------------------------------------------------------------------------------------------


def damaged_model(change):
    def prepare(w):
        state = {name: value + 1 for name, value in w.model.state_dict().items()}
        change(state)
        return lambda: w.model.load_state_dict(state)
    return prepare


def damaged_optimizer(change):
    def prepare(w):
        state = w.optimizer.state_dict()
        group = state["groups"][0]
        group["state"] = {name: value + 1 for name, value in group["state"].items()}
        group["settings"]["lr"] = 9.0
        change(group)
        return lambda: w.optimizer.load_state_dict(state)
    return prepare


row(StateDictError, "missing", "2.0.adapters.default.lora_A (2, 6)", "nothing was loaded", id="state dict with a missing key")(
    damaged_model(lambda state: state.pop("2.0.adapters.default.lora_A")))
row(StateDictError, "unexpected", "ghost (2, 2)", id="state dict with an unexpected key")(
    damaged_model(lambda state: state.update(ghost=np.zeros((2, 2)))))
row(StateDictError, "0.weight", "float32 (6, 12)", "float32 (12, 6)", id="state dict with a transposed array")(
    damaged_model(lambda state: state.update({"0.weight": state["0.weight"].T})))
row(StateDictError, "0.weight", "float32 (6, 12)", "float64 (6, 12)", id="state dict in float64")(
    damaged_model(lambda state: state.update({"0.weight": state["0.weight"].astype("float64")})))
row(StateDictError, "missing    0.bias (6,)", "unexpected 0.bais (6,)", "(2, 6), got float32 (3, 6)",
    id="state dict with three faults")(
    damaged_model(lambda state: state.update({"0.bais": state.pop("0.bias"),
                                              "2.0.adapters.default.lora_A": np.zeros((3, 6), "float32")})))
row(StateDictError, "missing", "0.weight", "2.1.bias", id="state dict without keys")(
    damaged_model(lambda state: state.clear()))
row(StateDictError, "m: expected", "(4,)", "nothing was loaded", id="optimizer state misshapen")(
    damaged_optimizer(lambda group: group["state"].update(m=np.zeros(4, "float32"))))
row(StateDictError, "state", "['m', 'v']", id="optimizer state without a moment")(
    damaged_optimizer(lambda group: group["state"].pop("v")))
row(StateDictError, "steps", id="optimizer state without a step number")(
    damaged_optimizer(lambda group: group["steps"].pop()))
row(StateDictError, "settings", "['betas', 'eps', 'lr', 'weight_decay']", id="optimizer state of other settings")(
    damaged_optimizer(lambda group: group["settings"].update(momentum=0.9)))
row(ConfigError, "lr", "nan", id="optimizer state with a rate of NaN")(
    damaged_optimizer(lambda group: group["settings"].update(lr=math.nan)))


@row(StateDictError, "1 groups", "groups")
def optimizer_state_empty(w):
    return lambda: w.optimizer.load_state_dict({})


@row(StateDictError, "1", "[0.1, 0.2]")
def schedule_state_of_other_groups(w):
    return lambda: w.scheduler.load_state_dict({"count": 5, "base": [0.1, 0.2]})


# -- token ids and labels -----------------------------------------------------------------------------------


@row(OutOfRangeError, "token id 12", "position (1, 0)", "0 to 11", "1 more", path="0")
def token_ids_out_of_range(w):
    model = nn.Sequential(nn.Embedding(12, 4, rng=0))
    w.watch(model[0].weight)
    return lambda: model([[3, 0], [12, -1]])


@row(OutOfRangeError, "label -1", "position 2", "0 to 5", "-100")
def label_that_names_no_class(w):
    logits = w.watch(w.parameter(3, 6))
    return lambda: ops.cross_entropy(logits, [0, -100, -1])


@row(OutOfRangeError, "label 6", "position 0", "0 to 5")
def label_of_another_vocabulary(w):
    h = w.watch(w.parameter(1, 12))
    return lambda: ops.linear_cross_entropy(h, w.model[0].weight, [6])


@row(ShapeError, "nothing to average", "3 labels", "-100")
def labels_all_ignored(w):
    return lambda: ops.cross_entropy(w.zeros(3, 6), [-100] * 3)


@row(ShapeError, "(3,)", "(3, 6)", "(2,)")
def labels_of_another_batch(w):
    return lambda: ops.cross_entropy(w.zeros(3, 6), [0, 1])


@row(DTypeError, "integers", "float64")
def labels_that_are_probabilities(w):
    return lambda: ops.cross_entropy(w.zeros(2, 2), [[0.5, 0.5], [1.0, 0.0]])


# -- the tests ----------------------------------------------------------------------------------------------


@pytest.fixture
def both_devices(device):
    """Rows about two devices need the stand-in beside the CPU."""
    import standin
    if device == "cpu":
        standin.register()
    yield
    if device == "cpu":
        minilora.backend.unregister_device("standin")


@pytest.mark.parametrize("name", ROWS)
def test_row(both_devices, name):
    problem = complaint(name)
    assert problem is None, problem


def test_every_error_class_has_rows():
    raised = {row.error for row in ROWS.values()}
    # tests/formats, tests/train and tests/test_calls.py raise these
    elsewhere = {errors.FileError, errors.FormatError, errors.DivergedError, errors.ArgumentError}
    assert raised | elsewhere == {getattr(errors, name) for name in errors.__all__} - {MiniloraError}


@pytest.mark.parametrize("name", errors.__all__)
def test_error_is_an_error_of_minilora_and_of_python(name):
    error = getattr(errors, name)
    assert issubclass(error, MiniloraError)
    assert error is MiniloraError or any(base.__module__ == "builtins" and base is not Exception
                                         for base in error.__mro__[1:-3])


def test_harness_notices_what_it_should(device):
    """Planted faults: the complaints above must not be empty words."""
    planted = {
        "no error": (ShapeError, (), "", lambda w: lambda: 3),
        "a builtin error": (ShapeError, (), "", lambda w: lambda: [][0]),
        "expected ShapeError, got": (ShapeError, (), "", lambda w: lambda: nn.Linear(0, 1)),
        "does not name": (ConfigError, ("wombat",), "", lambda w: lambda: nn.Linear(0, 1)),
        "expected the path": (ConfigError, (), "encoder", lambda w: lambda: nn.Linear(0, 1)),
        "changed": (ConfigError, (), "", lambda w: lambda: (w.model.eval(), nn.Linear(0, 1))),
        "0.weight": (ConfigError, (), "", lambda w: lambda: (w.model[0].weight.data.fill(0.5), nn.Linear(0, 1))),
    }
    for expected, (error, named, path, prepare) in planted.items():
        ROWS["planted"] = SimpleNamespace(error=error, named=named, path=path, prepare=prepare)
        try:
            assert expected in (complaint("planted") or "")
        finally:
            del ROWS["planted"]


def test_rows_hold_without_assert_statements():
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-O", "-W", "error", "-c", "import test_bad_input; test_bad_input.main()"],
                          env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}, cwd=here,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{len(ROWS)} rows, no complaint, without assert statements\n"


def main():
    if __debug__:
        raise SystemExit("run with python -O")
    import standin
    standin.register()
    complaints = [f"{name}: {problem}" for name in ROWS if (problem := complaint(name))]
    if complaints:
        raise SystemExit("\n".join(complaints))
    print(f"{len(ROWS)} rows, no complaint, without assert statements")
