"""docs/coming_from.md: our names are there, calls fit, and what it says is refused is refused, with the words to go on with."""
import argparse
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
from coming_from import ANY, PAGE, Of, Row, Wrong, code, resolve, table_rows

import minilora
from minilora import backend, engine, errors, formats, half, lora, models, nn, ops, optim, quant, testing, train, tuners

ROWS = table_rows()
ROOMS = dict(minilora=minilora, lora=lora, nn=nn, ops=ops, optim=optim, formats=formats, models=models, train=train,
             quant=quant, tuners=tuners, testing=testing, engine=engine, half=half, backend=backend, np=np, print=print)
THINGS = {
    "x": Of(minilora.Tensor), "y": Of(minilora.Tensor), "loss": Of(minilora.Tensor), "p": Of(minilora.Parameter),
    "model": Of(models.CausalLM), "base": Of(models.CausalLM), "optimizer": Of(optim.Optimizer), "Op": engine.Op,
    **dict.fromkeys("array b both c comm config data f folder ids labels layer logits other parameters path state step updates "
                    "gradient".split(), ANY),
}
FIELDS = {field.name for field in dataclasses.fields(lora.Config)}


def result(function):
    """What a function gives, by the name of the class in its signature."""
    wanted = str(getattr(function, "__annotations__", {}).get("return", "")).strip("'")
    for module in (*ROOMS.values(), inspect.getmodule(function)):
        if isinstance(getattr(module, wanted, None), type):
            return Of(getattr(module, wanted))
    return ANY


def check(text):
    """Raise `Wrong` if a piece of our code has a name that is not there, or a call that does not fit."""
    if text.startswith(("minilora ", "mpiexec")):
        return command(text)
    if setting := re.fullmatch(r"(\w+)(=.+)?", text):
        if setting[1] in FIELDS:
            return lora.Config(**{setting[1]: eval(setting[2][1:])}) if setting[2] else None
    return resolve(text, ROOMS | THINGS, result)


def command(text):
    """The verb is there, and its parser knows the options."""
    from minilora.cli.main import VERBS

    words = text[text.index("minilora "):].split() if "minilora " in text else []
    if words:
        verb = importlib.import_module(f"minilora.cli.{words[1]}") if words[1] in VERBS else None
        if verb is None:
            raise Wrong(f"there is no verb {words[1]}")
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        known = set(parser._option_string_actions)
        if unknown := [word for word in words if word.startswith("-") and word not in known]:
            raise Wrong(f"minilora {words[1]} has no {unknown[0]}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.line}")
def test_our_side_is_there(row):
    assert row.nothing != bool(row.ours), "a row has code in the middle, or a dash"
    for text in row.ours:
        check(text)
    if row.nothing:
        assert row.says, "a dash needs a reason"


def test_what_the_right_column_names_is_there():
    """Code there may be about either side; what begins with a room of ours is ours."""
    rooms = [name for name in ROOMS if name not in ("np", "print", "nn")]
    checked = 0
    for row in ROWS:
        for text in code(row.says):
            if re.match(rf"({'|'.join(rooms)})\.\w", text) or text.startswith("minilora "):
                check(text)
                checked += 1
    assert checked > 15


def test_the_tables_are_read_whole():
    assert len(ROWS) > 130 and len({row.section for row in ROWS}) == 9
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("\n|") == len(ROWS) + 2 * 9


def test_every_field_of_our_config_is_in_the_table():
    told = {text.partition("=")[0] for row in ROWS if row.section == "LoraConfig, field by field" for text in row.ours}
    assert told == FIELDS


@pytest.mark.parametrize("text, problem", [
    ("ops.cat([x, x])", "no cat"), ("lora.inject(model)", "missing a required argument"), ("x.squeeze()", "no squeeze"),
    ("ops.sum(x, dim=1)", "dim"), ("optimizer.stepp()", "no stepp"), ("minilora.summary(model).lines", "no lines"),
    ("minilora training MODEL", "no verb training"), ("minilora train --mask-prompt", "no --mask-prompt"), ("zz.x", "no zz"),
    ("formats.read_adapter(folder).settings", "no settings"), ("model.cuda()", "no cuda"),
    ("p.requires_grad", "no requires_grad"),
])
def test_a_planted_fault_is_found(text, problem):
    with pytest.raises(Wrong, match=problem):
        check(text)


def test_a_row_is_read_by_its_cells():
    (row,) = table_rows("# One\n| a | b | what differs |\n|---|---|---|\n| `f(x)`, `g` | – | refused |\n")
    assert row == Row("One", 4, ["f(x)", "g"], [], "refused", True)


def layers():
    return nn.Sequential(nn.Linear(3, 4, rng=0), nn.ReLU(), nn.Linear(4, 2, rng=0))


def adapted(**settings):
    model = layers()
    lora.inject(model, lora.Config(r=2, target_modules=["0"], **settings), rng=0)
    return model


def tensor(*shape):
    return minilora.tensor(np.ones(shape, "float32"))


def weight():
    return minilora.Parameter(np.ones((2, 3), "float32"))


def assign(index=0):
    tensor(2)[index] = 1.0


def used_twice():
    loss = (weight() * 2.0).sum()
    loss.backward()
    loss.backward()


# What the page says is refused or answered: its words, the call, and what the message says.
REFUSED = [
    ("an entry that hits nothing is an error", lambda: lora.inject(layers(), lora.Config(target_modules=["0", "seven"])),
     errors.ConfigError, "'seven' matches nothing"),
    ("None is an error that lists the layers", lambda: lora.inject(layers(), lora.Config()), errors.ConfigError, "called 0, 2"),
    ("a layer that is not there is an error", lambda: lora.inject(
        layers(), lora.Config(target_modules=["0"], layers_to_transform=[9])), errors.ConfigError, "layers_to_transform"),
    ("a key that hits nothing is an error", lambda: lora.inject(
        layers(), lora.Config(target_modules=["0"], rank_pattern={"seven": 2})), errors.ConfigError, "'seven' matches no"),
    ("refused by `lora.inject`", lambda: adapted(init_lora_weights="eva"), errors.ConfigError, "begins none"),
    ("The message has PEFT's call", lambda: lora.Config(init_lora_weights="corda"), errors.ConfigError,
     "path_initial_model_for_weight_conversion"),
    ("refused in `lora.Config(...)`", lambda: lora.Config(eva_config={"rho": 2.0}), errors.ConfigError, "leave it out"),
    ("left out: it is always LORA", lambda: lora.Config(peft_type="LORA"), errors.ConfigError, "leave it out"),
    ("refused: experts", lambda: lora.Config(target_parameters=["w"]), errors.ConfigError, "feature of PEFT is not part"),
    ("refused if it is on", lambda: lora.Config.from_dict({"ensure_weight_tying": True}), errors.ConfigError,
     "feature of PEFT"),
    ("refused: these methods", lambda: lora.Config(use_bdlora=True), errors.ConfigError, "feature of PEFT is not part"),
    ("refused if they are on", lambda: lora.Config.from_dict({"use_qalora": True}), errors.ConfigError, "feature of PEFT"),
    ("their files are refused by `peft_type`", lambda: lora.Config.from_dict({"peft_type": "IA3"}), errors.ConfigError,
     "another method's file"),
    ("says\n`write x[None]`", lambda: tensor(2).unsqueeze(0), AttributeError, r"write x\[None\]"),
    ("that says `model.to('gpu')`", lambda: layers().cuda(), AttributeError, r"model\.to\('gpu'\)"),
    ("that says `minilora.lora.merge(model)`", lambda: adapted().merge_adapter(), AttributeError, r"lora\.merge\(model\)"),
    ("**Two dtypes are an error**", lambda: tensor(2) + minilora.tensor(np.ones(2)), errors.DTypeError, "two dtypes"),
    ("refused, for a graph may hold it", assign, errors.DTypeError, r"x\.data\[index\] = value"),
    ("a second `backward()` is refused and says so", used_twice, errors.GraphError, "run the forward pass again"),
    ("of a value in the middle is an error", lambda: (weight() * 2.0).grad, AttributeError, r"x\.retain_grad\(\)"),
    ("needed unless x is one number", lambda: (weight() * 2.0).backward(), errors.GraphError, r"gradient="),
    ("All labels ignored: an error", lambda: ops.cross_entropy(tensor(2, 3), [-100, -100]), errors.ShapeError,
     "is ignore_index"),
    ("equal shapes only", lambda: ops.mse(tensor(2, 3), tensor(2, 1)), errors.ShapeError, "not broadcast"),
    ("a step without any gradient is an error", lambda: optim.SGD([weight()], lr=1.0).step(), errors.StateError, "backward"),
    ("the state of other parameters is refused", lambda: optim.Adam([weight()]).load_state_dict(
        optim.Adam([minilora.Parameter(np.ones(5, "float32"))]).state_dict()), errors.StateDictError, "shape|numbers|fit"),
    ("dtypes must fit too", lambda: nn.Linear(2, 2).load_state_dict({"weight": np.ones((2, 2)), "bias": np.ones(2)}),
     errors.StateDictError, "expected float32"),
    ("a model without LoRA is an error", lambda: lora.mark_only_lora_as_trainable(layers()), errors.ConfigError,
     "no LoRA layer"),
    ("strict about what belongs to LoRA", lambda: lora.load_lora_state_dict(adapted(), {}), errors.StateDictError, "missing"),
    ("`x.size` is a number", lambda: tensor(2).size(0), errors.ArgumentError, r"x\.shape\[0\]"),
]


@pytest.mark.parametrize("words, call, error, message", REFUSED, ids=[words[:40] for words, *_ in REFUSED])
def test_what_the_page_says_is_refused_is_refused(words, call, error, message):
    assert words in PAGE.read_text(encoding="utf-8")
    with pytest.raises(error, match=message):
        call()


def test_every_refusal_of_the_tables_is_tried():
    told = [row for row in ROWS if re.search(r"refused|is an error|are an error", row.says)]
    untried = [row.line for row in told if not any(words in row.says for words, *_ in REFUSED)
               and "an update that would be lost" not in row.says]  # that one is at home in tests/lora/merging
    assert not untried and len(told) > 15


@pytest.mark.parametrize("name", sorted({*lora.config_checks.KNOWN_ELSEWHERE}))
def test_every_field_of_peft_that_we_lack_is_answered_the_same_way(name):
    with pytest.raises(errors.ConfigError, match=f"{name}: this feature of PEFT is not part of minilora: leave it out"):
        lora.Config(**{name: True})


def test_the_silent_differences_are_as_told():
    x = tensor(2, 3)
    assert x.transpose(0, 1).shape == (2, 3) and x.transpose(1, 0).shape == (3, 2)
    assert [part.shape for part in ops.split(tensor(6, 2), 2)] == [(3, 2), (3, 2)]
    assert (minilora.tensor([1, 2]) + 1.5).dtype == "float64" and minilora.tensor([1.0]).dtype == "float32"
    assert isinstance(x > 0, np.ndarray) and isinstance(x == x, np.ndarray)
    logits = minilora.tensor(np.zeros((2, 5, 3), "float32"))
    assert abs(ops.cross_entropy(logits, np.zeros((2, 5), "int64")).item() - np.log(3.0)) < 1e-6
    assert inspect.signature(ops.gelu).parameters["approximate"].default == "tanh" and nn.RMSNorm(4).eps == 1e-6
    factor = optim.cosine(total=100)
    assert factor(100) == factor(150) == 0.0
    assert [path for path, _ in adapted().named_parameters()][:2] == [path for path, _ in layers().named_parameters()][:2]


def test_rooms_inside_rooms_need_no_import_of_their_own():
    code = ("import minilora; minilora.train.data.Arrays, minilora.train.checkpoints.load_run, minilora.train.sanity, "
            "minilora.tuners.intrinsic.Subspace")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_becomes_active():
    model = adapted()
    lora.inject(model, lora.Config(r=2, target_modules=["2"]), "b", rng=0)
    assert {row.path: list(row.active) for row in lora.status(model).rows} == {"0": [], "2": ["b"]}
    lora.remove(model, "b")
    assert not any(row.active for row in lora.status(model).rows)
    assert not any(p.trainable for p in model.parameters())


def test_a_mixed_batch_trains():
    model = adapted()
    with lora.mixed(model, adapter_names=["default", "__base__"]):
        model(tensor(2, 3)).sum().backward()
    assert model[0].lora_B.grad is not None


def test_a_merge_is_no_part_of_a_mode():
    model = adapted()
    before = model[0].weight.data.copy()
    model.train().eval()
    assert (model[0].weight.data == before).all() and not model[0].merged
