"""Real processes under mpiexec, with a time limit after which they are killed and the test fails."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60.0  # seconds: a busy machine's; what hangs would hang for ever
PREFIXES = ("PMI_", "PMIX_", "OMPI_", "SLURM_", "MPI_LOCAL", "HYD")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def mpiexec():
    """The launcher that belongs to this Python; skips the test where there is none."""
    pytest.importorskip("mpi4py")
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        pytest.skip("no mpiexec: python -m pip install mpich")
    return found


def environment(**variables):
    """This one's, without what any launcher has left in it, and with one thread of BLAS a process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES) and k not in TORCHRUN}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [clean.get("PYTHONPATH")])])
    return {**clean, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", **variables}


def start(size, arguments, folder, **variables):
    """So many processes of this Python, in a session of their own."""
    command = [mpiexec(), "-n", str(size), sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            stdin=subprocess.DEVNULL, text=True, start_new_session=True)


def finish(process, limit=LIMIT):
    """Wait for the end of all; kills them and fails when they do not end."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {limit} s\n{out[-2000:]}\n{err[-2000:]}", pytrace=False)
    return Ended(process.returncode, out, err)


def run(size, script, folder, *arguments, limit=LIMIT, **variables):
    """Run a Python text in so many processes."""
    file = Path(folder) / "ranks.py"
    file.write_text(script, encoding="utf-8")
    return finish(start(size, [file, *arguments], folder, **variables), limit)
