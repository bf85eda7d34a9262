"""Real processes under mpiexec: sums to the bit, and the end of all when one fails."""
import os
import signal
import time

import pytest
from mpi_processes import finish, run, start

pytestmark = pytest.mark.mpi

BEGIN = """
import sys
import numpy as np
from minilora.train.distributed.launchers import find_comm
real = sys.stdout
comm = find_comm("cpu")
def tell(*words):
    real.write(" ".join(map(str, words)) + "\\n")
    real.flush()
"""


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_have_the_same_bits_everywhere(tmp_path, size):
    script = BEGIN + """
import hashlib
rng = np.random.default_rng(comm.rank)
for dtype in ("float32", "float64", "int64"):
    for n in (0, 1, 5, 1000, 70001):
        whole = rng.integers(-9, 9, n).astype(dtype)
        comm.sum_(whole)
        rough = (rng.standard_normal(n) * 10.0 ** rng.integers(-8, 8, n)).astype(dtype)
        comm.sum_(rough)
        told = np.full(n, comm.rank + 3).astype(dtype)
        comm.broadcast_(told)
        assert (told == 3).all()
        tell(dtype, n, hashlib.sha256(whole.tobytes() + rough.tobytes()).hexdigest(), float(whole.sum()))
zero = np.array(comm.rank + 1.0)
comm.sum_(zero)
assert zero == comm.size * (comm.size + 1) / 2
comm.barrier()
tell("place", comm.rank, comm.size, comm.local_rank, comm.local_size)
"""
    ended = run(size, script, tmp_path)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert sorted(line for line in lines if line.startswith("place")) == [f"place {r} {size} {r} {size}" for r in range(size)]
    hashes = {line for line in lines if not line.startswith("place")}
    assert len(lines) == 16 * size and len(hashes) == 15


def test_long_arrays_travel_in_several_messages(tmp_path):
    script = BEGIN + """
from minilora.train.distributed import mpi
mpi.MOST = 7
flat = np.arange(30.0) * (comm.rank + 1)
comm.sum_(flat)
assert (flat == 3 * np.arange(30.0)).all()
square = np.full((5, 4), comm.rank + 1, dtype="int64")
comm.broadcast_(square)
assert (square == 1).all()
"""
    ended = run(2, script, tmp_path)
    assert ended.status == 0, ended.err


def test_what_mpi_cannot_take_is_refused(tmp_path):
    script = BEGIN + """
from minilora.errors import DTypeError, ShapeError
frozen = np.ones(3)
frozen.flags.writeable = False
for bad, kind in ((np.ones(3, "float16"), DTypeError), (np.ones(3, ">f8"), DTypeError), ([1.0], DTypeError),
                  (np.ones((4, 4))[:, 1], ShapeError), (np.ones((2, 3)).T, ShapeError), (frozen, ShapeError)):
    for call in (comm.sum_, comm.broadcast_):
        try:
            call(bad)
        except kind as error:
            assert "expected" in str(error)
        else:
            raise AssertionError(bad)
"""
    ended = run(2, script, tmp_path)
    assert ended.status == 0, ended.err


def test_only_rank_0_prints_and_each_keeps_to_its_cores(tmp_path):
    script = BEGIN + """
import os
print(comm)
print("noise", file=sys.stderr)
cores = len(os.sched_getaffinity(0))
assert comm.cores == max(1, cores // 2), comm.cores
"""
    ended = run(2, script, tmp_path)
    assert ended.status == 0 and ended.err.count("noise") == 1, ended.err
    assert ended.out.count("\n") == 1 and "2 processes, 2 on this machine" in ended.out and "found PMI_RANK=0" in ended.out


def test_processes_that_are_bound_have_the_cores_they_are_bound_to(tmp_path):
    script = """
import os
cores = sorted(os.sched_getaffinity(0))
rank = int(os.environ["PMI_RANK"])
if len(cores) > 1:
    os.sched_setaffinity(0, cores[:1] if rank == 0 else cores[1:])
""" + BEGIN + """
assert comm.cores == len(os.sched_getaffinity(0))
"""
    ended = run(2, script, tmp_path)
    assert ended.status == 0, ended.err


FAILURES = [
    ("raise ValueError('a fault')", 1, "ValueError: a fault"),
    ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ("raise SystemExit(7)", 7, "SystemExit"),
    ("raise SystemExit(0)", 1, "SystemExit"),
    ("raise SystemExit('words')", 1, "words"),
    ("from minilora.errors import FileError; raise FileError('no such folder')", 1, "FileError: no such folder"),
]


# Python tells nobody of a SystemExit that is not caught: the with statement is for that.
@pytest.mark.parametrize(("guard", "failure", "status", "words"), [
    *(("with comm:", *failure) for failure in FAILURES),
    *(("if True:", *failure) for failure in FAILURES if "Exit" not in failure[0])])
def test_one_failure_ends_all(tmp_path, guard, failure, status, words):
    rank = len(failure) % 2
    script = BEGIN + f"""
{guard}
    if comm.rank == {rank}:
        {failure}
    comm.sum_(np.ones(4))
"""
    began = time.monotonic()
    ended = run(2, script, tmp_path, limit=30)
    assert ended.status == status, ended
    assert f"rank {rank} of 2 ends the run" in ended.err and words in ended.err
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("guard", ["with comm:", "if True:"])
def test_an_error_that_all_have_goes_its_way_and_is_told_once(tmp_path, guard):
    script = BEGIN + f"""
import time
from minilora.errors import ConfigError
time.sleep(0.3 * comm.rank)
{guard}
    raise ConfigError("the same everywhere")
"""
    ended = run(3, script, tmp_path)
    assert ended.status == 1 and ended.err.count("Error: the same everywhere") == 1 and "ends the run" not in ended.err


def test_an_error_that_all_have_can_be_caught(tmp_path):
    script = BEGIN + """
from minilora.errors import DivergedError
for _ in range(3):
    try:
        with comm:
            with comm:
                raise DivergedError("everywhere")
    except DivergedError:
        pass
flat = np.ones(3)
comm.sum_(flat)
tell(flat)
"""
    ended = run(3, script, tmp_path)
    assert ended.status == 0 and ended.out.split("\n")[:3] == ["[3. 3. 3.]"] * 3, ended


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_is_killed_takes_the_others_with_it(tmp_path, victim, number):
    script = BEGIN + """
import os
tell("pid", comm.rank, os.getpid())
while True:
    comm.sum_(np.ones(4))
"""
    file = tmp_path / "ranks.py"
    file.write_text(script)
    process = start(2, [file], tmp_path)
    pids = {}
    while len(pids) < 2:
        word, rank, pid = process.stdout.readline().split()
        pids[int(rank)] = int(pid)
    os.kill(pids[victim], number)
    ended = finish(process, 20)
    assert ended.status != 0
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
