"""A resumed run ends with the bits of the run that was not interrupted; and each piece of its state is needed for that."""
import json
import os
import shutil

import numpy as np
import pytest
from tiny_run import KINDS, Rows, advanced, different, model_of, picture, run_of, trained

from minilora import optim
from minilora.train.checkpoints import contents, identity, load_run, save_run
from minilora.train.checkpoints.scan import steps
from minilora.train.distributed.comm import Serial


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here asks what a power cut leaves."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def copied(whole, folder, step):
    """What a run leaves that is killed after a step."""
    shutil.copytree(whole, folder)
    for later in [each for each in steps(folder) if each > step]:
        shutil.rmtree(folder / "checkpoints" / f"step-{later:06d}")
    return folder


def resumed_everywhere(kind, tmp_path, at, **settings):
    whole = trained(kind, tmp_path / "whole", keep=100, **settings)
    expected = picture(whole)
    assert steps(tmp_path / "whole")[-1] == whole.step and whole.step > max(at)
    for step in at:
        again = trained(kind, copied(tmp_path / "whole", tmp_path / f"at-{step}", step), resume=True, keep=100, **settings)
        assert different(picture(again), expected) == [], f"resumed after step {step}"
    return whole


def test_resumed_at_steps_inside_and_between_epochs(tmp_path):
    """At every step, and in other ways: slowly, below."""
    whole = resumed_everywhere("lora", tmp_path, [0, 3, 4, 7, 11])
    assert whole.step == 12 and len(whole.evaluations) == 4 and 3 < whole.step * 2 / whole.per_epoch < 4
    assert whole.best.step < 12  # the best weights are not the last ones


@pytest.mark.parametrize("kind", ["plus", "dora", "full", "mixed"])
def test_resumed_at_some_steps(kind, tmp_path):
    resumed_everywhere(kind, tmp_path, [7])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_every_step_in_every_way(kind, schedule, threads, tmp_path):
    resumed_everywhere(kind, tmp_path, range(12), schedule=schedule, threads=threads)


def test_resumed_again_and_again(tmp_path):
    """Interrupted after every step, by its end."""
    expected = picture(trained("lora", tmp_path / "whole"))
    for step in range(1, 13):
        run = trained("lora", tmp_path / "parts", resume=True, stop=step if step < 12 else None)
        assert run.step == step and steps(tmp_path / "parts")[-1] == step
    assert different(picture(run), expected) == []


def test_patience_counts_on(tmp_path):
    settings = dict(patience=3, learning_rate=0.03, steps=30, steps_per_eval=1)
    whole = trained("lora", tmp_path / "whole", keep=100, **settings)
    assert 3 < whole.step < 30 and whole.worse == 3
    for step in range(whole.step + 1):  # the last one: a run that is over stays over
        again = trained("lora", copied(tmp_path / "whole", tmp_path / f"at-{step}", step), resume=True, keep=100, **settings)
        assert different(picture(again), picture(whole)) == []


def test_where_no_checkpoint_is_it_begins(tmp_path):
    """So one command line starts a run and goes on with it."""
    (tmp_path / "empty").mkdir()
    expected = picture(trained("lora", tmp_path / "whole"))
    for name in ("empty", "new/and/deep"):
        assert different(picture(trained("lora", tmp_path / name, resume=True)), expected) == []


def test_data_without_evaluation_and_epochs_in_place_of_steps(tmp_path):
    settings = dict(steps=None, epochs=2.5, valid=None, save_every=None, steps_per_eval=None)
    whole = trained("lora", tmp_path / "whole", **settings, keep=100)
    assert steps(tmp_path / "whole") == [0, 4, 7, 9]  # the ends of epochs, and the last step
    for step in (0, 4, 7):
        again = trained("lora", copied(tmp_path / "whole", tmp_path / f"at-{step}", step), resume=True, keep=100, **settings)
        assert different(picture(again), picture(whole)) == []


# -- what is in a checkpoint ------------------------------------------------------------------------------------------


GIVEN = {"model", "data", "settings", "loss", "comm", "folder", "valid"}  # by the caller
MADE = {"optimizer", "scheduler", "threads", "_epoch", "per_epoch", "total", "last_good", "alike", "recorded"}  # out of these
OF_A_LIFE = {"asked", "stop", "last", "seconds", "status", "notes"}  # of this process only


def test_nothing_of_a_run_is_overlooked():
    """Whoever adds an attribute to a run says here what becomes of it."""
    run = advanced(run_of(), 3)
    saved = set(contents.capture(run).values) | {"best_weights"}
    assert set(vars(run)) == (saved - {"optimizer", "scheduler"}) | GIVEN | MADE | OF_A_LIFE


def pieces(saved):
    """Each piece of a saved state, as (name, function that puts the value of another state into its place)."""
    def array(name):
        return lambda arrays, values, fresh: arrays.update({name: np.array(fresh.arrays[name])})

    def value(*path):
        def put(arrays, values, fresh):
            inside, other = values, fresh.values
            for part in path[:-1]:
                inside, other = inside[part], other[part]
            inside[path[-1]] = other[path[-1]]
        return put

    found = {name: array(name) for name in saved.arrays if not name.startswith(contents.BEST)}
    found |= {name: value(name) for name in ("step", "tokens", "worse", "since", "losses", "evaluations", "best")}
    found |= {"scheduler count": value("scheduler", "count")}
    found |= {f"steps of group {i}": value("optimizer", "groups", i, "steps")
              for i in range(len(saved.values["optimizer"]["groups"]))}
    found |= {f"scaling {name}": value("scaling", name) for name in saved.values["scaling"] or ()}
    found["best weights"] = lambda arrays, values, fresh: [arrays.pop(n) for n in list(arrays) if n.startswith(contents.BEST)]
    return found


SLOWLY = pytest.mark.parametrize("kind", ["lora", "mixed", *(pytest.param(kind, marks=pytest.mark.slow)
                                                             for kind in KINDS[1:-1])])


@SLOWLY
def test_every_piece_is_needed(kind):
    """Left as it is in a new run, each of them makes another end: the comparison above would find what is forgotten."""
    run = advanced(run_of(kind), 7)
    taken, fresh = contents.capture(run), contents.capture(run_of(kind))
    saved = contents.Contents({name: np.array(array) for name, array in taken.arrays.items()}, taken.values)
    values = json.dumps(saved.values)
    expected = picture(advanced(run, 3))
    assert expected["best"].step == 3, "the best weights are to be older than the checkpoint"
    unnoticed = []
    for name, put in pieces(saved).items():
        arrays, changed = dict(saved.arrays), json.loads(values)
        put(arrays, changed, fresh)
        again = run_of(kind)
        contents.put_back(again, contents.Contents(arrays, changed))
        if different(picture(advanced(again, 3)), expected) == []:
            unnoticed.append(name)
    constant = [name for name in saved.arrays if name.endswith("seed")]  # drawn with the model, and never changed
    assert unnoticed == constant + ["scaling in_a_row"] * (kind == "mixed")  # 0 between two updates
    again = run_of(kind)
    contents.put_back(again, saved)
    assert different(picture(advanced(again, 3)), expected) == []


def test_a_seed_is_needed_where_the_model_was_drawn_with_another():
    """It is state: the masks of the run go on, also in a model whose dropout was made from another seed."""
    one, two = run_of(model=model_of(seed=0)), run_of(model=model_of(seed=0))
    for _, module in two.model.named_modules():
        if hasattr(module, "seed"):
            module.seed = 17
    contents.put_back(two, contents.capture(advanced(one, 2)))
    assert different(picture(advanced(two, 3)), picture(advanced(one, 3))) == []


def test_saving_changes_nothing(tmp_path):
    run = advanced(run_of(), 4)
    before = picture(run)
    assert save_run(tmp_path, run, Serial()) == tmp_path.resolve() / "checkpoints" / "step-000004"
    assert different(picture(run), before) == []


def test_loading_into_a_run_that_has_gone_on(tmp_path):
    """A checkpoint is taken whole, whatever the run held before."""
    run = advanced(run_of(), 4)
    save_run(tmp_path, run, Serial())
    before = picture(run)
    advanced(run, 3)
    assert load_run(tmp_path, run) and different(picture(run), before) == []


def test_equal_runs_write_equal_bytes(tmp_path):
    for name in "ab":
        save_run(tmp_path / name, advanced(run_of("dora"), 4), Serial())
    for file in ("state.safetensors", "state.json"):
        one, two = ((tmp_path / name / "checkpoints" / "step-000004" / file).read_bytes() for name in "ab")
        assert one == two


def test_the_digest_of_the_base_reads_every_bit_of_every_array():
    for array in (np.zeros((3, 5), "float32"), np.zeros((), "float64"), np.zeros((0, 4), "float16"),
                  np.arange(24.0).reshape(4, 6).T, np.arange(10, dtype="float32")[::2], np.zeros(5_000_000, "float32")):
        found = {identity.digest(each) for each in (array, array.reshape(array.shape + (1,)), array.astype("int64"))}
        assert len(found) == 3 and identity.digest(array) == identity.digest(np.array(array, order="C"))
        for place in {0, array.size // 2, array.size - 1} if array.size else ():
            other = np.array(array, order="C")
            other.reshape(-1)[place] += 1
            assert identity.digest(other) not in found
        read_only = np.array(array)
        read_only.flags.writeable = False
        assert identity.digest(read_only) == identity.digest(array)


def test_the_optimizer_may_be_another(tmp_path):
    def made(params):
        return optim.SGD([{"params": params[:7], "lr": 0.1}, {"params": params[7:], "lr": 0.2}], lr=0.1, momentum=0.9)

    whole = advanced(run_of(optimizer=made, weight_decay=0.0), 5)
    save_run(tmp_path, whole, Serial())
    again = run_of(optimizer=made, weight_decay=0.0)
    assert load_run(tmp_path, again)
    assert different(picture(advanced(again, 4)), picture(advanced(whole, 4))) == []


def test_other_data_give_another_run():
    """The comparison is no tautology."""
    one, two = advanced(run_of(), 2), advanced(run_of(data=Rows(3)), 2)
    assert "0.adapters.default.lora_B" in different(picture(one), picture(two))
