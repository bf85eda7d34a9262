"""Following the advice of an error must work: each line that a message tells the user to write is executed here."""
import math
import re

import numpy
import numpy as np
import pytest
from coming_from import ANY, resolve
from conftest import place

import minilora
from minilora import Parameter, Tensor, errors, formats, lora, models, nn, ops, optim, train, tuners
from minilora.unsupported import ATTRIBUTES, NAMES, OF_PARAMETERS


def names(device):
    """What an advice may name, of the right kind."""
    return {"minilora": minilora, "numpy": numpy, "math": math, "x": Tensor(place(np.ones((3, 3), "float32"))),
            "y": Tensor(place(np.full((3, 3), 2.0, "float32"))), "p": Parameter(place(np.ones((3, 3), "float32"))),
            "axes": (1, 0), "shape": (9, 1), "dtype": "float64", "device": device,
            "value": 2.0, "number": 2.0, "index": (0, slice(None))}


def follow(advice, given):
    """Run each alternative of an advice: a line, or an expression and the context in which it stands."""
    for line in re.split(r", or (?:for another device |for a tensor )?|, whose | to change|, for ", advice):
        line = line.split(", which")[0]
        if re.match(r"switch is|has ", line):
            continue
        line, _, context = line.partition(" under ")
        given["y"] = Tensor(given["y"].data)
        with minilora.use(given["device"]):
            exec(line, given)
        assert not context or eval(context, given)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_line_for_another_librarys_name_can_be_written(name):
    given = names("cpu")
    with pytest.raises(AttributeError, match=f"'Tensor' object has no attribute '{name}': write ") as caught:
        getattr(given["x"], name)
    advice = str(caught.value).partition(": write ")[2]
    assert advice == ATTRIBUTES[name]
    follow(advice.replace("'gpu'", "'cpu'"), given)


def test_no_line_stands_for_what_there_is():
    for x in (Tensor(np.ones(2)), Parameter(np.ones(2))):
        lines = {name for name in ATTRIBUTES if type(x) is Tensor or name not in ("grad", "trainable")}
        assert not lines & set(ops.__all__) and not lines & set(dir(x)) and not any(hasattr(x, name) for name in lines)
        assert {"data", "T", "sum", "astype", "__add__"} <= set(dir(x))


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name[0].islower() and not hasattr(Tensor, name)])
def test_an_operation_is_named(name):
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}': write minilora\.ops\.{name}\(x\)"):
        getattr(Tensor(np.ones(2)), name)


@pytest.mark.parametrize("name", ["strides", "std", "cumsum", "argsort", "any", "all"])
def test_what_the_array_has_is_named(name):
    with pytest.raises(AttributeError, match=rf"x\.data\.{name}, whose values are constants"):
        getattr(Tensor(np.ones(2)), name)


@pytest.mark.parametrize("name", ["nonsense", "__nonsense__", "_private"])
def test_what_nobody_has_is_an_ordinary_error(name):
    for x in (Tensor(np.ones(2)), Parameter(np.ones(2)), Tensor.__new__(Tensor)):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'$"):
            getattr(x, name)
        assert not hasattr(x, name)


def test_an_explanation_costs_nothing():
    """With __getattr__ every look at x.data would be 1.5 times slower, and the chain of 1,000 nodes 6 per cent."""
    assert not hasattr(Tensor, "__getattr__") and Tensor.__getattribute__ is object.__getattribute__
    assert Tensor.__setattr__ is object.__setattr__


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_a_parameter_has_names_of_its_own(name):
    p = Parameter(np.ones(2))
    with pytest.raises(AttributeError, match="write ") as caught:
        getattr(p, name)
    exec(str(caught.value).partition(": write ")[2], {"x": p, "y": 2.0})


def test_requires_grad_is_not_set_in_vain():
    p = Parameter(np.ones(2))
    with pytest.raises(AttributeError, match="write x.trainable"):
        p.requires_grad = False
    with pytest.raises(AttributeError, match="trainable"):
        Tensor(np.ones(2)).requires_grad = True
    with pytest.raises(AttributeError, match="minilora.Parameter"):
        Tensor(np.ones(2)).trainable = False
    for other in ("is_frozen", "shape"):
        with pytest.raises(AttributeError):
            setattr(p, other, True)
    assert p.trainable and not hasattr(p, "requires_grad")


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean], ids=lambda reduce: reduce.__name__)
@pytest.mark.parametrize(("name", "value"), [("dim", 1), ("keepdim", True), ("dtype", "float64")])
def test_keywords_of_another_library(reduce, name, value, device):
    x = Tensor(place(np.ones((2, 3))))
    with pytest.raises(errors.ArgumentError, match=rf"{reduce.__name__}\(\) has no argument {name}") as caught:
        reduce(x, **{name: value})
    if name in ("dim", "keepdim"):
        eval(f"reduce(x, {str(caught.value).partition(': write ')[2]})", {"reduce": reduce, "x": x})


# -- operators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["x % y", "2.0 % x", "x // 2.0", "2.0 // x", "divmod(x, y)", "divmod(5, x)", "2.0 ** x",
                                  "x[0] = 1.0", "p += x", "p -= 1.0", "p *= x", "p /= 2.0"])
def test_what_no_operator_does_says_what_does(line, device):
    given = names(device)
    with pytest.raises(errors.DTypeError, match="write |compute with") as caught:
        exec(line, given)
    given["y"] = given["x"].data
    if "p.data" in str(caught.value):
        given["x"] = given["x"].data
    lines = re.findall(r"((?:x\.data|p\.data|y =|minilora\.)[^,]*?)(?: to change| for |,|$)", str(caught.value))
    assert lines
    for advice in lines:
        exec(advice, given)
    assert type(given["p"]) is Parameter


# -- advice in the messages of the engine --------------------------------------------------------------------------------

INTEGERS, HALF = np.arange(6).reshape(2, 3), np.ones((2, 3), "float16")
FAILING = {  # what fails, in terms of v; the values for which it does
    "minilora.ops.exp(v)": [Tensor(INTEGERS), INTEGERS],
    "minilora.ops.mean(v)": [Tensor(INTEGERS), Tensor(INTEGERS > 2), INTEGERS],
    "minilora.ops.relu(v)": [[1.0, 2.0], np.float64(2.0), 2.0],
    "minilora.Parameter(v)": [INTEGERS, Tensor(INTEGERS), [True, False], INTEGERS > 2],
    "minilora.Tensor(v)": [[1.0, 2.0], 2.0, Tensor(np.ones(2))],
    "minilora.ops.add(minilora.tensor([[1.0] * 3]), v)": [HALF, Tensor(HALF), Parameter(HALF), Tensor(INTEGERS)],
    "minilora.to_host(v)": [[1.0, 2.0], Tensor(np.ones(2))],
    "minilora.to_device(v)": [[1.0, 2.0], 3.0, Tensor(np.ones(2))],
    "minilora.ops.embedding(v, minilora.Parameter([[1.0]] * 9))": [np.ones((2, 2)), Tensor(np.ones(3))],
}
LINES = [  # an advice as it stands in a message, and the value that it makes of v
    (r"minilora\.tensor\(value, dtype='float32'\)", "minilora.tensor(v, dtype='float32')"),
    (r"minilora\.tensor\(value\)", "minilora.tensor(v)"), (r"numpy\.asarray\(value\)", "numpy.asarray(v)"),
    (r"\.astype\('int64'\)", "v.astype('int64')"), (r"\.astype\(\.\.\.\)", "v.astype('float32')"), (r"tensor\.data", "v.data"),
]


@pytest.mark.parametrize("call", FAILING)
def test_following_an_errors_advice_works(call):
    for value in FAILING[call]:
        with pytest.raises((errors.DTypeError, errors.DeviceError)) as caught:
            eval(call, {"minilora": minilora, "v": value})
        advised = [line for pattern, line in LINES if re.search(pattern, str(caught.value))]
        assert advised, f"no advice in: {caught.value}"
        made = eval(advised[0], {"minilora": minilora, "numpy": numpy, "v": value})
        if call in ("minilora.Tensor(v)", "minilora.to_host(v)") and isinstance(made, Tensor):
            made = made.data  # what these two make is made already
        eval(call, {"minilora": minilora, "v": made})


@pytest.mark.parametrize("device", ["standin", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_advice_about_two_devices_works(device):
    p = Parameter(place(np.ones(3)))
    for value, pattern in [(np.ones(3), r"minilora\.to_device\(array\)"),
                           (Tensor(np.ones(3)), r"minilora\.tensor\(x\.numpy\(\)\)")]:
        with pytest.raises(errors.DeviceError, match=pattern) as caught:
            p * value
        line = re.search(pattern, str(caught.value))[0]
        p * eval(line, {"minilora": minilora, "array": value, "x": value})


PACKAGES = (minilora, formats, lora, models, nn, ops, optim, train, tuners)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_names_ours_for_another_librarys_name(name):
    lacking = [package for package in PACKAGES if not hasattr(package, name)]
    assert lacking, f"{name} is everywhere: its line in NAMES is never shown"
    for package in lacking:
        with pytest.raises(AttributeError) as caught:
            getattr(package, name)
        assert str(caught.value) == f"module {package.__name__!r} has no attribute {name!r}: minilora has {NAMES[name]}"
    if not NAMES[name].startswith(("a plain ", "rng=", "the text ", "p.data[...]", "state_names")):
        things = dict.fromkeys("array axes config data every folder high k low model name optimizer q schedule "
                               "sections step total v x xs y channels groups params path state rng p numpy mask "
                               "array values".split(), ANY)
        resolve(NAMES[name].split(", ")[0] if name == "einsum" else NAMES[name], {"minilora": minilora} | things)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_any_other_name_is_just_not_there(package):
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'$"):
        package.no_such_thing
    assert set(package.__all__) <= set(dir(package))
