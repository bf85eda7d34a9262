"""What a run keeps in its folder, and what becomes of it when the disk, another process or a signal comes in between."""
import errno
import os
import platform
import re
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from tiny_run import (Rows, advanced, different, loss, model_of, picture, run_of, settings_of, trained, valid_rows)

from minilora import train
from minilora.cli.main import told
from minilora.cli.terms import INTERRUPTED
from minilora.errors import ConfigError, FileError
from minilora.formats.tensors import durable
from minilora.train import interruption, metrics
from minilora.train.beside import Beside
from minilora.train.checkpoints import Keeper, files, keeper, load_run, lock, save_run, scan
from minilora.train.distributed.comm import Serial
from minilora.train.interruption import Interrupted

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def seen(folder):
    """Every file below a folder, with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- which checkpoints stay -------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(tmp_path):
    there = []
    run = trained("lora", tmp_path, keep=2, call=lambda run: there.append(scan.steps(tmp_path)))
    assert run.best.step == 3 and scan.steps(tmp_path) == [3, 11, 12]
    assert there == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7], [3, 7, 8], [3, 8, 9], [3, 9, 10],
                     [3, 10, 11]]
    best = files.read(scan.place_of(tmp_path, 3)).contents
    assert best.values["best"]["step"] == 3 == best.values["step"]


def test_those_that_stay_are_whole_whatever_goes(tmp_path, monkeypatch):
    """The others go only when the new one is on the disk, and none is ever seen in part."""
    run, order = advanced(run_of(keep=1), 1), []
    save_run(tmp_path, run, Serial())
    rename, sync, rmtree = os.rename, durable.sync_folder, scan.shutil.rmtree
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(f"rename {Path(b).name}"), rename(a, b))[1])
    monkeypatch.setattr(durable, "sync_folder", lambda path: (order.append(f"sync {Path(path).name}"), sync(path))[1])
    monkeypatch.setattr(scan, "sync_folder", lambda path: order.append(f"sync {Path(path).name}"))
    monkeypatch.setattr(scan.shutil, "rmtree", lambda path, **options: (
        order.append(f"remove {Path(path).name}"), rmtree(path, **options))[1])
    save_run(tmp_path, advanced(run, 1), Serial())
    assert order[-5:] == ["sync checkpoints", "remove .gone-1", "rename .gone-1", "sync checkpoints", "remove .gone-1"]
    assert order.index("rename step-000002") < order.index("rename .gone-1")
    assert scan.steps(tmp_path) == [2]


def test_a_removal_that_was_killed_is_finished(tmp_path):
    run = advanced(run_of(), 1)
    save_run(tmp_path, run, Serial())
    gone = tmp_path / "checkpoints" / ".gone-7"
    gone.mkdir()
    (gone / "state.safetensors").write_bytes(b"half")
    save_run(tmp_path, advanced(run, 1), Serial())
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000002"]


def test_a_replacement_that_was_killed_between_its_steps_is_finished(tmp_path):
    """Where the system cannot exchange two folders: a step that is saved again."""
    run = advanced(run_of(), 1)
    save_run(tmp_path, run, Serial())
    place = scan.place_of(tmp_path, 1)
    place.rename(place.with_name(f".{place.name}.{'0' * 16}.old"))
    save_run(tmp_path / "other", run, Serial())
    scan.place_of(tmp_path / "other", 1).rename(place.with_name(f".{place.name}.{'0' * 16}.new"))
    again = run_of()
    assert load_run(tmp_path, again) and again.step == 1 and scan.steps(tmp_path) == [1]


def test_what_a_killed_save_left_of_another_step_goes(tmp_path):
    """A step at which a signal had come, say: the resumed run does not save there again."""
    run = advanced(run_of(), 1)
    save_run(tmp_path, run, Serial())
    left = tmp_path / "checkpoints" / f".step-000005.{'a' * 16}.tmp"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    save_run(tmp_path, advanced(run, 1), Serial())
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000002"]


def test_a_million_steps_are_in_order(tmp_path):
    run = advanced(run_of(), 1)
    for step in (5, 999_999, 1_000_000, 12_345_678):
        run.step = step
        save_run(tmp_path, run, Serial())
    assert scan.steps(tmp_path) == [1_000_000, 12_345_678]


# -- the beginning ----------------------------------------------------------------------------------------------------


def test_the_first_checkpoint_stands_before_the_first_step(tmp_path):
    run = run_of()
    run.folder = tmp_path / "deep" / "run"
    with Keeper(run):
        assert scan.steps(run.folder) == [0]
    again = run_of()
    assert load_run(run.folder, again) and different(picture(again), picture(run)) == []


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path):
    trained("lora", tmp_path / "run", stop=3)
    before = seen(tmp_path)
    with pytest.raises(FileError, match="holds a run already .its last checkpoint: step 3.*resume=True.*--resume"):
        trained("lora", tmp_path / "run")
    assert seen(tmp_path) == before
    assert trained("lora", tmp_path / "run", resume=True).step == 12


def test_metrics_without_checkpoints_are_a_run_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(FileError, match="holds a run already"):
        trained("lora", tmp_path)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-2.safetensors", "adapter_config.json", "config.json"])
def test_the_weights_of_somebody_else_are_not_written_over(tmp_path, name, resume):
    """A base that was downloaded into the folder, say: at its end the run would put its own model there."""
    (tmp_path / name).write_bytes(b"of somebody else")
    (tmp_path / "notes.txt").write_text("in nobody's way")
    before = seen(tmp_path)
    with pytest.raises(FileError, match=f"holds a model or an adapter already, of no run .{name}.*give another folder"):
        trained("lora", tmp_path, resume=resume)
    assert seen(tmp_path) == before
    (tmp_path / name).unlink()
    assert trained("lora", tmp_path).step == 12


def test_what_failed_before_its_first_step_may_be_begun_again(tmp_path):
    """A mistake that the first pass shows leaves nothing, and nothing in the way."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of the user")
    for name in ("new", "mine"):
        before = seen(tmp_path)
        model = model_of()
        model[0].forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trained("lora", tmp_path / name, model=model)
        assert seen(tmp_path) == before and (tmp_path / name).exists() == (name == "mine")
        assert trained("lora", tmp_path / name).step == 12


def test_resume_needs_a_folder():
    with pytest.raises(ConfigError, match="resume=True needs the folder"):
        trained("lora", None, resume=True)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trained("lora", None).step == 12 and not list(tmp_path.iterdir())


# -- the disk ---------------------------------------------------------------------------------------------------------


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_is_found_before_the_first_step(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(files, "save_state", full)
    with pytest.raises(FileError, match="the disk is full"):
        trained("lora", tmp_path / "run", call=steps.append)
    assert not steps and not list(tmp_path.iterdir())


def test_the_room_of_the_best_weights_is_tried_too(tmp_path, monkeypatch):
    tried = []
    real = files._try_room
    monkeypatch.setattr(files, "_try_room", lambda path, size: (tried.append(size), real(path, size)))
    trained("lora", tmp_path / "run", stop=2)
    trained("lora", tmp_path / "without", valid=None, stop=1)
    assert tried == [82 * 4, 0, 0, 0, 0]  # in the first checkpoint, of a run that is evaluated
    assert not list(tmp_path.rglob("room"))


def test_less_room_than_the_checkpoints_will_need(tmp_path, monkeypatch):
    free = [10_000_000]
    monkeypatch.setattr(keeper.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free[0]))
    assert trained("lora", tmp_path / "run", stop=1).step == 1
    free[0] = 4000
    with pytest.raises(FileError, match="has 4,000 bytes left, and the run's checkpoints, up to 5 of 1,.* need .*keep=2"):
        trained("lora", tmp_path / "other", keep=3)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_later_is_told_and_tried_again(error, tmp_path, monkeypatch):
    """After 1, 2, 4 ... steps more; the last checkpoint stays, and the run ends as it would have."""
    expected, real, broken, tries = picture(trained("lora", tmp_path / "whole")), files.save_state, [False], []

    def save(path, *arguments):
        if broken[0]:
            tries.append(Path(path).parent.name.split(".")[1])
            raise OSError(error, os.strerror(error))
        real(path, *arguments)

    def breaks(run):
        broken[0] = 4 <= run.step < 9
        if run.step == 8:
            assert scan.steps(tmp_path / "run") == [3] or scan.steps(tmp_path / "run")[-1] == 3

    monkeypatch.setattr(files, "save_state", save)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = trained("lora", tmp_path / "run", save_every=3, call=breaks)
    assert different(picture(run), expected) == [] and scan.steps(tmp_path / "run") == [3, 9, 12]
    assert tries == ["step-000006", "step-000007"]
    texts = [str(each.message) for each in told]
    assert len(texts) == 2 and all("The last checkpoint, of step 3, is whole" in text for text in texts)
    assert [re.search(r"tried again after step (\d+)", text)[1] for text in texts] == ["7", "9"]
    assert len([note for note in run.notes if "step 3, is whole" in note]) == 2
    assert all(each.category is RuntimeWarning for each in told)


def test_the_last_save_fails(tmp_path, monkeypatch):
    """Then the run fails, though it was trained to its end, and goes on from the last checkpoint when there is room."""
    expected = picture(trained("lora", tmp_path / "whole"))

    def breaks(run):
        if run.step == 12:
            monkeypatch.setattr(files, "save_state", full)

    with pytest.raises(FileError, match="the disk is full.*The last checkpoint, of step 11, is whole; what was trained after"):
        trained("lora", tmp_path / "run", call=breaks)
    monkeypatch.undo()
    assert different(picture(trained("lora", tmp_path / "run", resume=True)), expected) == []


def test_an_interrupted_run_that_cannot_be_saved_says_so(tmp_path, monkeypatch):
    def breaks(run):
        if run.step == 5:
            monkeypatch.setattr(files, "save_state", full)
            signal.raise_signal(signal.SIGTERM)

    with pytest.warns(RuntimeWarning, match="the disk is full"), \
            pytest.raises(Interrupted, match="stopped after step 5 of 12, and NOT saved; the last checkpoint is of step 4"):
        trained("lora", tmp_path / "run", call=breaks)


# -- two processes ----------------------------------------------------------------------------------------------------


HOLDING = """
import sys, time
from pathlib import Path
from minilora.train.checkpoints.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_processes_in_one_folder_are_refused(tmp_path, other):
    for resume in (False, True):
        with pytest.raises(FileError, match=f"another process trains in this folder .{other.pid} ") as caught:
            trained("lora", tmp_path / "run", resume=resume)
        assert str(lock.lock_of(tmp_path / "run")) in str(caught.value)
    assert not (tmp_path / "run").exists()
    other.kill()  # and a lock that a dead process has left is none
    other.wait()
    assert lock.lock_of(tmp_path / "run").is_file()
    assert trained("lora", tmp_path / "run").step == 12
    assert not lock.lock_of(tmp_path / "run").exists()


def test_two_runs_of_one_process_are_refused(tmp_path):
    def again(run):
        with pytest.raises(FileError, match=f"another process trains in this folder .{os.getpid()} "):
            trained("lora", tmp_path / "run", resume=True)

    assert trained("lora", tmp_path / "run", call=again, steps=2).step == 2


@pytest.mark.parametrize("said, held", [
    ("{me} {here}", False), ("{dead} {here}", False), ("1 {here}", True), ("1 elsewhere", True), ("", False), ("noise", False),
    ("99999999999999999999 {here}", False)])
def test_where_the_disk_knows_no_locks_the_number_decides(said, held, tmp_path, monkeypatch):
    def refused(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    text = said.format(me=os.getpid(), here=platform.node(), dead=process.pid)
    lock.lock_of(tmp_path / "run").write_text(text)
    if held:
        with pytest.raises(FileError, match="another process trains") as caught:
            trained("lora", tmp_path / "run")
        Path(str(caught.value).partition(": ")[0]).unlink()  # as it says
    assert trained("lora", tmp_path / "run", steps=1).step == 1


def test_a_lock_is_given_back_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock.alone(tmp_path / "run"):
            1 / 0
    assert not list(tmp_path.iterdir())


def test_a_very_long_name_can_be_locked(tmp_path):
    for name in ("x" * 255, "ä" * 127):
        with lock.alone(tmp_path / name):
            assert lock.lock_of(tmp_path / name).is_file()


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(number, tmp_path, capsys):
    expected = picture(trained("lora", tmp_path / "whole"))
    for step in (1, 5):
        folder = tmp_path / f"run-{step}"
        with pytest.raises(Interrupted) as caught:
            trained("lora", folder, save_every=100, call=lambda run: run.step == step and signal.raise_signal(number))
        assert scan.steps(folder)[-1] == step
        text = str(caught.value)
        assert text.startswith(f"stopped after step {step} of 12, and saved. It goes on with fit(..., folder={str(folder)!r}, "
                               "resume=True)") and "--resume" in text
        assert told("minilora", caught.value, INTERRUPTED) == 130 and capsys.readouterr().err == f"minilora: {text}\n"
        assert different(picture(trained("lora", folder, resume=True, save_every=100)), expected) == []


def test_a_signal_in_the_middle_of_a_step(tmp_path):
    """The step is finished: nothing of it is lost, and nothing done twice."""
    expected = picture(trained("lora", tmp_path / "whole"))
    model, passes = model_of(), []
    forward = model[0].forward

    def interrupted(x):
        passes.append(1)
        if len(passes) == 9:
            signal.raise_signal(signal.SIGINT)
        return forward(x)

    model[0].forward = interrupted
    with pytest.raises(Interrupted):
        trained("lora", tmp_path / "run", model=model)
    assert different(picture(trained("lora", tmp_path / "run", resume=True)), expected) == []


def test_a_signal_in_the_last_step(tmp_path):
    """The run is complete then; the program ends all the same."""
    expected = picture(trained("lora", tmp_path / "whole"))
    with pytest.raises(Interrupted, match="complete"):
        trained("lora", tmp_path / "run", call=lambda run: run.step == 12 and signal.raise_signal(signal.SIGINT))
    assert different(picture(trained("lora", tmp_path / "run", resume=True)), expected) == []


def test_a_second_ctrl_c_leaves_files_whole(tmp_path, monkeypatch):
    expected = picture(trained("lora", tmp_path / "whole"))
    monkeypatch.setattr(interruption, "ONE", 0.0)
    save, calls = files.save_state, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        save(*arguments)

    monkeypatch.setattr(files, "save_state", interrupted)
    with pytest.raises(KeyboardInterrupt, match="twice"):
        trained("lora", tmp_path / "run")
    assert scan.steps(tmp_path / "run")[-1] == 4  # that of step 5 was being written
    assert sorted(path.name for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")) == []
    assert different(picture(trained("lora", tmp_path / "run", resume=True)), expected) == []


def test_a_signal_without_a_folder():
    with pytest.raises(Interrupted, match="stopped after step 4 of 12; the model is as it was trained so far, and nothing was"):
        trained("lora", None, call=lambda run: run.step == 4 and signal.raise_signal(signal.SIGINT))


def test_a_run_that_somebody_else_stops_is_no_interruption(tmp_path):
    assert trained("lora", tmp_path / "run", stop=5).step == 5
    assert scan.steps(tmp_path / "run")[-1] == 5


CHILD = """
import os, sys, time
sys.modules["matplotlib"] = None
sys.path.insert(0, {here!r})
from tiny_run import *
from minilora.cli.main import told
from minilora.train.beside import Beside

class Slow(Beside):
    def after_step(self, run, made):
        print(run.step, flush=True)
        time.sleep(0.02)

try:
    train.fit(model_of(), Rows(), settings_of(steps=500), loss=loss, valid=valid_rows(), folder={folder!r}, resume=True,
              beside=[Slow()], quiet=True)
except KeyboardInterrupt as error:
    sys.exit(told("minilora", error, 130))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_real_process(number, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", CHILD.format(here=str(HERE), folder=str(folder))],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parents[2])
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    step = scan.steps(folder)[-1]
    assert err == (f"minilora: stopped after step {step} of 500, and saved. It goes on with fit(..., folder={str(folder)!r}, "
                   "resume=True) (the same command and --resume)\n")
    assert 3 <= step < 500 and not lock.lock_of(folder).exists()
    assert load_run(folder, run_of(steps=500))


def test_by_fit_itself(tmp_path, monkeypatch):
    """fit, with its folder for people: metrics have each row once, and the adapter is that of the run left alone."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)

    def fit(name, **more):
        return train.fit(model_of(), Rows(), settings_of(steps_per_report=1), loss=loss, valid=valid_rows(),
                         folder=tmp_path / name, quiet=True, **more)

    class Stop(Beside):
        def after_step(self, run, made):
            if run.step == 7:
                signal.raise_signal(signal.SIGTERM)

    fit("whole")
    with pytest.raises(Interrupted):
        fit("parts", beside=[Stop()])
    assert not (tmp_path / "parts" / "adapter_model.safetensors").exists()
    again = fit("parts", resume=True)
    assert again.step == 12 and len(again.losses) == 12
    for name in ("adapter_model.safetensors", "adapter_config.json", "checkpoints/step-000012/state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    steps = [[row["step"] for row in metrics.rows_of(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    assert steps[0] == steps[1] == list(range(1, 13))


def test_metrics_wait_for_room(tmp_path, monkeypatch):
    """A full disk does not end a run that may yet find room."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    real = metrics.Metrics._write

    class Cut:
        """A file on a disk that is full from step 4 to 8."""

        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if 4 <= self.calls <= 6:
                return self.file.write(data[:10]) if self.calls == 4 else full()
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def write(self, file, durable):
        if not isinstance(self.file, Cut):
            self.file = Cut(self.file)
        real(self, self.file, durable)

    monkeypatch.setattr(metrics.Metrics, "_write", write)
    with pytest.warns(RuntimeWarning, match="metrics.jsonl.*the disk is full.*when there is room"):
        train.fit(model_of(), Rows(), settings_of(steps_per_report=1), loss=loss, folder=tmp_path / "run", quiet=True)
    assert [row["step"] for row in metrics.rows_of(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 13))
    monkeypatch.setattr(Cut, "write", full)
    with pytest.warns(RuntimeWarning), pytest.raises(FileError, match="metrics.jsonl.*the disk is full"):
        train.fit(model_of(), Rows(), settings_of(steps_per_report=1), loss=loss, folder=tmp_path / "other", quiet=True)


def test_the_order_of_data_is_found_again_across_epochs():
    """No stream of random numbers is saved: rows are a function of the number of the batch."""
    run = run_of()
    rows = [run.rows(number) for number in range(30)]
    assert [run_of().rows(number) for number in range(30)][::-1] == rows[::-1] and run.per_epoch == 7
    assert [run.rows(number) for number in reversed(range(30))][::-1] == rows
    assert sorted(sum(rows[:7], [])) == sorted(sum(rows[7:14], [])) == list(range(26)) and rows[:7] != rows[7:14]
