"""Whole runs in real processes: their result, their end when one fails or is told to stop, and the command line."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from mpi_processes import ROOT, environment, finish, mpiexec, start

pytestmark = pytest.mark.mpi

SCRIPT = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT / "tests" / "train" / "distributed")!r})
import numpy as np
from shared_run import Rows, settings, trained
from minilora.train.beside import Beside
from minilora.train.distributed.launchers import find_comm

resume, steps, failing = "resume" in sys.argv, int(sys.argv[2]), sys.argv[3]
real, comm = sys.stdout, find_comm("cpu")


class Told(Beside):
    def after_step(self, run, made):
        if run.step == 1:
            real.write(f"pid {{comm.rank}} {{os.getpid()}}\\n")
            real.flush()
        if failing == "slow":
            time.sleep(0.02)
        elif failing != "none" and run.step == 3 and comm.rank == 1:
            exec(failing)


model, result = trained(comm, settings(steps=steps, schedule="constant", save_every=5), sys.argv[1], resume, dropout=0.3,
                        running=True, valid=Rows(7), beside=[Told()])
np.savez(f"{{sys.argv[1]}}-{{comm.rank}}.npz", **{{k: np.asarray(v) for k, v in model.state_dict().items()}})
print("done", result.step)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("script") / "ranks.py"
    file.write_text(SCRIPT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """What two processes end with that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(2, [script, "run", 8, "none"], folder)).status == 0
    return weights(folder, "run")


def pids_of(process, size):
    pids = {}
    while len(pids) < size:
        line = process.stdout.readline()
        assert line, process.communicate()
        if line.startswith("pid"):
            pids[int(line.split()[1])] = int(line.split()[2])
    return pids


def weights(tmp_path, name, rank=0):
    with np.load(tmp_path / f"{name}-{rank}.npz") as file:
        return {key: file[key].tobytes() for key in file}


def test_every_process_ends_with_the_same_bits(tmp_path, script):
    for size in (1, 3):
        ended = finish(start(size, [script, f"run{size}", 6, "none"], tmp_path))
        assert ended.status == 0 and ended.out.count("done 6") == 1, ended
    assert weights(tmp_path, "run3", 0) == weights(tmp_path, "run3", 1) == weights(tmp_path, "run3", 2)
    lines = [(tmp_path / f"run{size}" / "metrics.jsonl").read_text().splitlines() for size in (1, 3)]
    rows = [[json.loads(line) for line in each] for each in lines]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]], "one process writes, not three"
    assert json.loads((tmp_path / "run3" / "run.json").read_text())["processes"] == 3


@pytest.mark.parametrize(("failing", "status", "words"), [
    ("raise ValueError('in the middle')", 1, "ValueError: in the middle"),
    ("raise SystemExit(9)", 9, "SystemExit"),
    ("os.kill(os.getpid(), 9)", None, ""),
])
def test_one_that_fails_in_the_middle_ends_all_and_leaves_a_whole_checkpoint(tmp_path, script, whole, failing, status, words):
    ended = finish(start(2, [script, "run", 8, failing], tmp_path), 30)
    assert ended.status == status if status else ended.status != 0, ended
    assert words in ended.err and "done" not in ended.out
    again = finish(start(2, [script, "run", 8, "none", "resume"], tmp_path))
    assert again.status == 0 and weights(tmp_path, "run") == whole, again


@pytest.mark.parametrize(("number", "target"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGINT, "mpiexec"),
                                                (signal.SIGTERM, "mpiexec")])
def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path, script, number, target):
    process = start(2, [script, "run", 2000, "slow"], tmp_path)
    pids = pids_of(process, 2)
    os.kill(process.pid if target == "mpiexec" else pids[target], number)
    ended = finish(process, 30)
    assert ended.status != 0 and "done" not in ended.out
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    if target != "mpiexec":  # mpiexec decides itself what becomes of those whom it started
        assert "and saved. It goes on with" in ended.err and "ends the run" not in ended.err
        assert ended.err.count("Interrupted: stopped after step") == 1, ended.err
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert int(saved[-1].name.partition("-")[2]) >= (target != "mpiexec")


def test_the_command_line(tmp_path, there):
    words = ["-m", "minilora", "train", "base", "--data", "data", "-o", "two", "--rank", "2", "--learning-rate", "0.02",
             "--iters", "6", "--steps-per-eval", "3", "--dropout", "0.1"]
    ended = finish(start(2, words, there), 60)
    assert ended.status == 0, ended.err
    assert ended.out.count("\n") == 1 and ended.out.startswith("two: 6 steps in ")
    assert ended.err.count("2 processes, 2 on this machine") == 1 and "found PMI_RANK=0 PMI_SIZE=2" in ended.err
    alone = subprocess.run([sys.executable, *words[:7], "one", *words[8:-2]], cwd=there, env=environment(), capture_output=True,
                           text=True, timeout=60)
    two = finish(start(2, [*words[:7], "both", *words[8:-2]], there), 60)
    assert alone.returncode == two.status == 0, two.err
    losses = [json.loads((there / name / "report.json").read_text())["best"]["loss"] for name in ("one", "both")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    refused = finish(start(2, [*words[:7], "both", *words[8:]], there), 60)
    assert refused.status == 1 and refused.err.count("holds a run already") == 1, refused.err
    wrong = finish(start(2, [*words, "--rank", "-3"], there), 60)
    assert wrong.status in (1, 2) and "minilora train" in wrong.err and "ends the run" not in wrong.err


def test_the_command_line_stops_and_goes_on(tmp_path, there):
    words = ["-m", "minilora", "train", "base", "--data", "data", "-o", "run", "--rank", "2", "--iters", "4000", "--batch-size",
             "2", "--steps-per-report", "1", "--save-every", "1000"]
    process = start(2, words, there)
    seen = ""
    while "step 2/" not in seen and "step 3/" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    children = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    mine = [int(line.split()[0]) for line in children.splitlines() if str(sys.executable) in line and "mpiexec" not in line
            and "minilora train base" in line and os.readlink(f"/proc/{line.split()[0]}/cwd") == str(there)]
    os.kill(mine[-1], signal.SIGTERM)
    began = time.monotonic()
    ended = finish(process, 30)
    assert ended.status == 130 and "--resume" in ended.err and time.monotonic() - began < 20, ended.err


def test_without_mpi_the_command_line_refuses_to_train_several_times(there):
    variables = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    code = "import sys; sys.modules['mpi4py'] = None; from minilora.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "train", "base", "--data", "data", "-o", "run"], cwd=there,
                          env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "pip install 'minilora[mpi]'" in done.stderr and not (there / "run").exists()
    assert mpiexec()
