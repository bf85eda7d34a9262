"""Checkpoints that are damaged, of another run, or made up: an error that says what to do, and nothing changed."""
import dataclasses
import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import tiny_run
from tiny_run import Rows, advanced, different, model_of, picture, run_of, trained, valid_rows

from minilora import backend, lora, nn, optim, tensor
from minilora.errors import ConfigError, FileError, FormatError, MiniloraError, StateError
from minilora.formats import load_state, save_state
from minilora.train.checkpoints import files, identity, load_run, save_run
from minilora.train.distributed.comm import Serial


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run = advanced(run_of(), 2)
    save_run(folder, run, Serial())
    save_run(folder, advanced(run, 2), Serial())
    return folder


@pytest.fixture
def saved(once, tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    return shutil.copytree(once, tmp_path / "saved")


def place(folder, step=4):
    return folder / "checkpoints" / f"step-{step:06d}"


def refusal(folder, run, *named, error=StateError, permit=()):
    """Load, and give the message of the error that must come, with all that it must name; the run is as it was."""
    before, trainable = picture(run), [p.trainable for p in run.model.parameters()]
    with pytest.raises(error) as caught:
        load_run(folder, run, permit)
    assert isinstance(caught.value, MiniloraError)
    assert different(picture(run), before) == [] and [p.trainable for p in run.model.parameters()] == trainable
    missing = [part for part in named if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return str(caught.value)


# -- of another run ---------------------------------------------------------------------------------------------------


def other_loss(model, inputs):
    return tiny_run.loss(model, inputs) * 2.0


def other_base():
    model = model_of()
    model[0].weight.data[3, 2] += 1e-6
    return model


def other_frozen_norm():
    model = model_of()
    model[5].bias.data[0] = 5e-324  # lost in float32: it is 0 there
    model[5].bias.data[1] = -0.0  # another bit, and another result nowhere: refused all the same
    return model


def other_alpha():
    model = model_of("full")
    lora.inject(model, lora.Config(r=2, lora_alpha=4.000001, lora_dropout=0.2, target_modules=["0", "4"],
                                   modules_to_save=["6"]), rng=np.random.default_rng(0))
    return model


def sgd(params):
    return optim.SGD(params, lr=0.05)


def other_eps(params):
    return optim.AdamW(params, lr=0.05, weight_decay=0.01, eps=1e-6)


def doubled_rate(params):
    return optim.AdamW(params, lr=0.1, weight_decay=0.01)


OTHERS = {
    "steps": (dict(steps=24), "steps: 12 there, 24 here"),
    "learning_rate": (dict(learning_rate=0.1), "learning_rate: 0.05 there, 0.1 here"),
    "batch_size": (dict(batch_size=3), "batch_size: 4 there, 3 here"),
    "accumulation": (dict(accumulation=1), "accumulation: 2 there, 1 here"),
    "schedule": (dict(schedule="linear"), "schedule: 'cosine' there, 'linear' here"),
    "warmup": (dict(warmup=0.0), "warmup: 3.0 there, 0.0 here"),
    "weight_decay": (dict(weight_decay=0.0), "weight_decay: 0.01 there, 0.0 here"),
    "max_grad_norm": (dict(max_grad_norm=None), "max_grad_norm: 1.0 there, None here"),
    "steps_per_eval": (dict(steps_per_eval=2), "steps_per_eval: 3 there, 2 here"),
    "eval_batches": (dict(eval_batches=1), "eval_batches: None there, 1 here"),
    "patience": (dict(patience=3), "patience: None there, 3 here"),
    "seed": (dict(seed=6), "seed: 5 there, 6 here"),
    "threads": (dict(threads=2), "threads of the backward pass: 1 there, 2 here"),
    "data": (dict(data=Rows(3)), "the training data"),
    "valid": (dict(evaluated=False), "the data of the evaluation"),
    "loss": (dict(function=other_loss), "the loss function: 'tiny_run.loss' there, 'test_resume_refused.other_loss' here"),
    "base": (dict(model=other_base), "the frozen weights: 1 of 8", "0.weight"),
    "base ": (dict(model=other_frozen_norm), "the frozen weights: 1 of 8", "5.bias"),
    "model": (dict(model=lambda: model_of(dropout=0.25)), "Dropout(p=0.3)", "Dropout(p=0.25)"),
    "adapter": (dict(model=other_alpha), "lora_alpha in the config of adapter 'default': 4 there, 4.000001 here"),
    "eps": (dict(optimizer=other_eps, weight_decay=0.0), "eps of the optimizer's group 0: 1e-08 there, 1e-06 here"),
    "learning_rate ": (dict(optimizer=doubled_rate, weight_decay=0.0), "the optimizer's learning rates: [0.05] there, [0.1]"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_another_run(name, saved):
    given, *named = OTHERS[name]
    given = {key: value() if key == "model" else value for key, value in given.items()}
    text = refusal(saved, run_of(**given), *named)
    assert f"permit=['{name.strip()}'" in text or f"'{name.strip()}'" in text.rpartition("permit=")[2]
    assert "--permit" in text and str(place(saved)) in text
    advice = text.rpartition("--permit ")[2].split(")")[0].split(",")  # and following the advice works
    given = OTHERS[name][0]
    given = {key: value() if key == "model" else value for key, value in given.items()}
    run = run_of(**given)
    assert load_run(saved, run, advice) and run.step == 4
    advanced(run if run.valid is not None else with_valid(run), 1)


def with_valid(run):
    run.valid = valid_rows()
    return run


NEVER = {
    "another optimizer": (dict(optimizer=sgd, weight_decay=0.0), "the optimizer: 'AdamW' there, 'SGD' here"),
    "another kind": (dict(model=lambda: model_of("dora")), "parameter 0.adapters.default.magnitude: not there"),
    "fully trained": (dict(model=lambda: model_of("full")), "parameter 4.weight: not there, and trained here"),
    "other groups": (dict(loraplus_ratio=2.0), "optimizer: 1 groups there, 2 here"),
    "shorter": (dict(steps=3), "step 4 was made, and the run would end at step 3"),
    "other shapes": (dict(model=lambda: with_rank(3)), "default.lora_A: expected float32 (3, 6), got float32 (2, 6)"),
    "other dtypes": (dict(model=lambda: model_of().to(dtype="float64")), "expected float64 (2, 6), got float32 (2, 6)"),
    "without state": (dict(model=lambda: without_running()), "state 2.mean: there, and not here"),
}


def with_rank(r):
    model = model_of("full")
    lora.inject(model, lora.Config(r=r, lora_alpha=4, lora_dropout=0.2, target_modules=["0", "4"], modules_to_save=["6"]))
    return model


def without_running():
    model = model_of()
    model[2] = nn.Identity() if hasattr(nn, "Identity") else nn.Dropout(0.0)
    return model


@pytest.mark.parametrize("name", NEVER)
def test_what_cannot_be_permitted(name, saved):
    given, *named = NEVER[name]
    given = {key: value() if key == "model" else value for key, value in given.items()}
    text = refusal(saved, run_of(**given), *named, permit=[*identity.PERMITTED, "steps", "weight_decay", "loraplus_ratio"])
    assert "another folder" in text and "permit=" not in text


def test_all_differences_come_at_once(saved):
    run = run_of(data=Rows(3), model=other_base(), seed=6, steps=20)
    text = refusal(saved, run, "steps:", "seed:", "the training data", "the frozen weights")
    assert "permit=['base', 'data', 'seed', 'steps']" in text
    refusal(saved, run, "seed:", permit=["steps", "data", "base"])


def test_settings_that_change_no_bit_may_differ(saved):
    assert load_run(saved, run_of(keep=9, save_every=5, steps_per_report=1))


def test_permits_are_checked(saved):
    for permit, named in ((["stpes"], "'stpes'"), (["keep"], "'keep'"), ([3], "'3'"), ("all", "'all'")):
        refusal(saved, run_of(), named, "expected some of", error=ConfigError, permit=permit)
    assert load_run(saved, run_of(steps=24), "steps")


def test_of_another_machine(saved, monkeypatch):
    run = run_of()
    monkeypatch.setattr(identity.blas, "described", lambda: "a BLAS for Z80")
    monkeypatch.setattr(identity, "__version__", "9.9")
    text = refusal(saved, run, "arithmetic:", "a BLAS for Z80", "versions: 'minilora", "9.9")
    assert "permit=['machine', 'versions']" in text
    assert load_run(saved, run, ["machine", "versions"])


def test_kernels_off_are_other_bits(saved):
    with backend.use("cpu", kernels=False):
        run = run_of()
        refusal(saved, run, "arithmetic:", "without kernels", "permit")
        assert load_run(saved, run, ["machine"])


def test_a_longer_run(tmp_path):
    """More steps than were planned: the schedule is the longer one's, at the same step. With a constant rate it is as if the
    run had been that long from the beginning."""
    whole = trained("lora", tmp_path / "whole", schedule="constant", valid=None, steps_per_report=1)
    trained("lora", tmp_path / "part", schedule="constant", valid=None, steps_per_report=1, steps=5)
    with pytest.raises(StateError, match="permit=.'steps'."):
        trained("lora", tmp_path / "part", schedule="constant", valid=None, steps_per_report=1, resume=True)
    longer = trained("lora", tmp_path / "part", schedule="constant", valid=None, steps_per_report=1, resume=True,
                     permit=["steps"])
    assert different(picture(longer), picture(whole)) == []
    run = run_of(steps=24)
    save_run(tmp_path / "cosine", advanced(run_of(), 12), Serial())
    assert run.optimizer.groups[0].settings["lr"] != 0.0
    load_run(tmp_path / "cosine", run, ["steps"])
    assert run.optimizer.groups[0].settings["lr"] == 0.05 * run.scheduler.schedule(12) > 0.01


def test_permitted_settings_are_the_new_ones(saved):
    run = run_of(learning_rate=0.2, weight_decay=0.5)
    load_run(saved, run, ["learning_rate", "weight_decay"])
    assert run.optimizer.groups[0].settings["lr"] == 0.2 * run.scheduler.schedule(4) and run.scheduler.base == [0.2]
    assert run.optimizer.groups[0].settings["weight_decay"] == 0.5 and run.optimizer.groups[0].steps == [4] * 6


def test_parameters_outside_the_model_are_refused_when_saving(tmp_path):
    extra = nn.Linear(2, 2, rng=0)

    def made(params):
        return optim.AdamW([*params, *((f"extra.{name}", p) for name, p in extra.named_parameters())], lr=0.1)

    with pytest.raises(StateError, match="trains 2 parameters that are not in the model"):
        save_run(tmp_path, run_of(optimizer=made, weight_decay=0.0), Serial())
    assert not list(tmp_path.rglob("state.*"))


# -- damaged ----------------------------------------------------------------------------------------------------------


def test_the_newest_is_damaged(saved):
    """It is not passed over; the message says what to type, and that works."""
    (place(saved) / "state.safetensors").write_bytes((place(saved) / "state.safetensors").read_bytes()[:-9])
    text = refusal(saved, run_of(), "cut off", "step-000002 is whole", error=FormatError)
    command = text.rpartition("remove what is damaged, ")[2].partition(", and")[0]
    assert command == f"rm -r {place(saved)}"
    shutil.rmtree(command.removeprefix("rm -r "))
    run = run_of()
    assert load_run(saved, run) and run.step == 2


def test_all_are_damaged(saved):
    for step in (2, 4):
        (place(saved, step) / "state.json").unlink()
    refusal(saved, run_of(), "state.json", "No other checkpoint of this run is whole", error=FileError)


def test_nothing_in_it(saved):
    place(saved, 7).mkdir()
    text = refusal(saved, run_of(), "step-000004 is whole", error=FileError)
    assert f"rm -r {place(saved, 7)}," in text


def test_names_that_are_no_checkpoints_are_no_matter(saved):
    room = saved / "checkpoints"
    for name in ("step-9", "step-000009x", "step--00009", "notes", ".gone-3"):
        (room / name).mkdir()
    (room / "step-000010").write_text("a file")
    run = run_of()
    assert load_run(saved, run) and run.step == 4


def test_the_folder_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").write_text("")
    assert not load_run(tmp_path / "other", run_of())
    with pytest.raises(FileError, match="this is a file"):
        trained("lora", tmp_path / "run", resume=True)
    with pytest.raises(FileError):
        trained("lora", tmp_path / "other")
    assert (tmp_path / "run").read_text() == ""


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_bytes_cut_off_or_flipped(file, saved, every=41):
    path, run = place(saved) / file, run_of()
    data = path.read_bytes()
    before = picture(run)
    cases = [data[:n] for n in (*range(0, len(data), every), len(data) - 1)] + [data + b"\0", data + b"\n", data + data]
    rng = random.Random(7)
    for n in range(rng.randrange(every), len(data), every):
        flipped = bytearray(data)
        flipped[n] ^= 1 << rng.randrange(8)
        cases.append(bytes(flipped))
    for case in cases:
        path.write_bytes(case)
        with pytest.raises((FormatError, FileError), match=str(place(saved))):
            files.read(place(saved))
    for case in cases[::len(cases) // 10]:
        path.write_bytes(case)
        with pytest.raises(MiniloraError, match="step-000002 is whole"):
            load_run(saved, run, known={})
    assert different(picture(run), before) == []
    path.write_bytes(data)
    assert load_run(saved, run)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_every_byte_cut_off_or_flipped(file, saved):
    test_bytes_cut_off_or_flipped(file, saved, every=1)


def test_of_another_version(saved):
    path = place(saved) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    refusal(saved, run_of(), "a checkpoint of version 2", "reads version 1", error=FormatError)


# -- made up: with sums that are right --------------------------------------------------------------------------------


def signed(folder, change):
    """Change the values of state.json, and write the sums that belong to them."""
    path = folder / "state.json"
    values = json.loads(path.read_text())
    change(values)
    values = {key: value for key, value in values.items() if key != "sum"}
    values["arrays"] = files.summed(folder / "state.safetensors")
    path.write_bytes(files.spelled({**values, "sum": hashlib.sha256(files.spelled(values)).hexdigest()}))


def leaves(value, path=()):
    """The paths of all values in values."""
    yield path
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, key))


STRANGE = [None, True, -1, 2**70, 1.5, float("nan"), float("inf"), "", "x" * 300, [], {}, [[]], {"": {}}, {"$array": "none"},
           {"$array": 3}, {"$array": "state/2.mean"}]


def test_strange_values_in_every_place(saved, every=7):
    """Whatever state.json says: a MiniloraError and nothing changed, or a run that can go on."""
    path, known = place(saved) / "state.json", identity.identity(run_of())
    data = path.read_bytes()
    rng = random.Random(3)
    places = [each for each in leaves(json.loads(data)["contents"]) if each]
    for where in places[rng.randrange(every)::every]:
        for strange in rng.sample(STRANGE, 3) if every > 1 else STRANGE:
            def put(values):
                inside = values["contents"]
                for part in where[:-1]:
                    inside = inside[part]
                inside[where[-1]] = strange

            path.write_bytes(data)
            signed(place(saved), put)
            run = run_of()
            before = picture(run)
            try:
                load_run(saved, run, known=known)
            except MiniloraError:
                assert different(picture(run), before) == [], (where, strange)
            else:
                assert type(run.step) is int and 0 <= run.step <= run.total


@pytest.mark.slow
def test_every_strange_value_in_every_place(saved):
    test_strange_values_in_every_place(saved, every=1)


def test_strange_identities(saved):
    """What it belongs to may be anything too: then it belongs to another run."""
    known, rng = identity.identity(run_of()), random.Random(5)
    for name in known:
        for strange in rng.sample(STRANGE, 3):
            path = place(saved) / "state.json"
            data = path.read_bytes()
            signed(place(saved), lambda values: values["identity"].update({name: strange}))
            with pytest.raises(StateError, match=str(place(saved))):
                load_run(saved, run_of(), known=known)
            path.write_bytes(data)


def test_arrays_that_are_missing_or_too_many(saved):
    file = place(saved) / "state.safetensors"
    arrays = load_state(file)
    for name in arrays:
        save_state(file, {key: value for key, value in arrays.items() if key != name})
        signed(place(saved), lambda values: None)
        if name.startswith("best/"):
            continue
        refusal(saved, run_of(), error=(StateError, FormatError))
    for name in ("model/other", "state/2.other", "best/other"):
        save_state(file, {**arrays, name: np.zeros(3, "float32")})
        signed(place(saved), lambda values: None)
        refusal(saved, run_of(), name.partition("/")[2])
    for name in ("model/6.copies.default.weight", "state/2.mean", "state/2.seen", "best/2.mean", "optimizer/groups.0.state.m"):
        for other in (arrays[name].astype("float64") + 0.5, arrays[name][..., None]):
            save_state(file, {**arrays, name: other})
            signed(place(saved), lambda values: None)
            refusal(saved, run_of(), name.rpartition(".")[2])


def test_it_is_all_or_nothing(saved, monkeypatch):
    """An error, or Ctrl-C, anywhere while it is taken over."""
    whole = advanced(run_of(), 4)
    name = "load_state_dict"
    for target in (nn.Module, optim.AdamW, optim.Scheduler):
        original = getattr(target, name)
        for before in (True, False):
            calls = []

            def interrupted(self, *arguments, **options):
                calls.append(1)
                if len(calls) > 1:  # it is put back
                    return original(self, *arguments, **options)
                if not before:
                    original(self, *arguments, **options)
                raise KeyboardInterrupt

            run = advanced(run_of(), 1)
            run.optimizer.groups[0].settings["lr"] = 0.123  # by hand: it stays too
            picture_before = picture(run)
            with monkeypatch.context() as patch:
                patch.setattr(target, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    load_run(saved, run)
            assert different(picture(run), picture_before) == []
    assert load_run(saved, run) and different(picture(run), picture(whole)) == []


def test_evaluations_have_only_fields_that_can_be_read_back():
    from minilora.train.result import Evaluation

    assert {field.type for field in dataclasses.fields(Evaluation)} <= {"int", "float", "float | None", "int | None"}


def test_tensors_of_state_are_saved_too(tmp_path):
    class Holding(nn.Module):
        state_names = ("kept", "flag", "number")

        def __init__(self):
            self.kept, self.flag, self.number = tensor(np.ones(3, "float32")), False, np.float32(2)

        def forward(self, x):
            return x

    def made():
        model = nn.Sequential(model_of(), Holding())
        return run_of(model=model)

    run = made()
    run.model[1].kept, run.model[1].flag, run.model[1].number = tensor(np.full(3, 7, "float32")), True, np.float32(5)
    save_run(tmp_path, run, Serial())
    again = made()
    assert load_run(tmp_path, again)
    holding = again.model[1]
    assert holding.kept.data.tolist() == [7, 7, 7] and holding.flag is True and holding.number == np.float32(5)
    assert type(holding.number) is np.float32
