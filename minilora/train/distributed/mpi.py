"""Processes that MPI has started, on arrays of the host. mpi4py is imported when the first of them is made."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

import numpy

from ... import parallel, replay
from ...errors import DTypeError, MiniloraError, ShapeError

__all__ = ["Mpi"]

Array = Any

MOST = 1 << 26  # numbers of a message: MPI counts in C ints, and lays a second array of this size beside it
GRACE = 2.0  # seconds in which an error counts as one that all processes have
READ = 0.3  # seconds for mpiexec to read what a process wrote before it ends them all
DTYPES = tuple(map(numpy.dtype, ("float32", "float64", "int64")))


class Mpi:
    """The processes of an MPI communicator; see `Comm` for the attributes.

    MPI asks of every implementation that all processes of an all-reduce get identical results (MPI 4.1, section 6.9.6), so that
    nothing needs to be sent twice for equal bits. Algorithms that add in another order in each process are thereby ruled out;
    a reduction to rank 0 and a broadcast would guarantee it again, and cost up to twice the time.

    Parameters
    ----------
    world : mpi4py.MPI.Comm, optional
        All that MPI has started, if none is given. Messages go through a duplicate, apart from a user's own.
    found : str
        Who started the processes, for `str`.
    """

    def __init__(self, world: Any = None, found: str = "") -> None:
        from mpi4py import MPI

        self._mpi, self.found = MPI, found
        self._world = (MPI.COMM_WORLD if world is None else world).Dup()
        self._ends = self._world.Dup()  # on which those meet that have failed
        here = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.rank, self.size = int(self._world.rank), int(self._world.size)
        self.local_rank, self.local_size = int(here.rank), int(here.size)
        cores = numpy.array([_share_of_cores(MPI, here)], dtype=numpy.int64)
        self._world.Allreduce(MPI.IN_PLACE, cores, op=MPI.MIN)  # one number: the bits of a process depend on its threads
        self.cores = int(cores[0])
        here.Free()

    def __str__(self) -> str:
        library = self._mpi.Get_library_version().split("\n")[0].split(",")[0].replace(" Version:", "")
        return (f"{self.size} processes, {self.local_size} on this machine with {self.cores} "
                f"core{'' if self.cores == 1 else 's'} each, by {' '.join(library.split())}{self.found and f', {self.found}'}")

    def sum_(self, flat: Array) -> None:
        """Put the sum over all processes in the place of a host array."""
        replay.refuse_waiting("sum_", "is a message between processes, by the host")
        for block in _blocks(flat):
            self._world.Allreduce(self._mpi.IN_PLACE, block, op=self._mpi.SUM)

    def broadcast_(self, flat: Array) -> None:
        """Put rank 0's numbers in the place of a host array."""
        replay.refuse_waiting("broadcast_", "is a message between processes, by the host")
        for block in _blocks(flat):
            self._world.Bcast(block, root=0)

    def barrier(self) -> None:
        """Wait until every process is here."""
        replay.refuse_waiting("barrier", "waits for other processes")
        self._world.Barrier()

    def abort(self, status: int) -> NoReturn:
        """End all processes at once, with this exit status."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        time.sleep(READ)  # mpiexec drops what it has not read by then, such as the reason
        self._mpi.COMM_WORLD.Abort(status)
        raise SystemExit(status)

    def __enter__(self) -> Mpi:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Say that this process has an error: returns if all others have one too, and ends all processes otherwise.

        An error that everybody meets, such as a setting out of range or a loss that is not finite any more, goes its usual way
        in each of them. One that the others do not have would leave them waiting for this process for ever.
        """
        if self._all_fail():
            return
        told = f"{type(error).__name__}: {error}" if isinstance(error, MiniloraError) else \
            "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
        print(f"minilora: rank {self.rank} of {self.size} ends the run: {told}", file=sys.__stderr__, flush=True)
        self.abort(_status(error))

    def _all_fail(self) -> bool:
        """Whether every process comes here within the time of grace."""
        try:
            meeting, end = self._ends.Ibarrier(), time.monotonic() + GRACE
            while time.monotonic() < end:
                if meeting.Test():
                    return True
                time.sleep(0.005)
        except BaseException:  # a second Ctrl-C, or MPI itself: then at once
            pass
        return False


def _status(error: BaseException) -> int:
    """The exit status of an error that ends all processes; never 0, for the run did not reach its end."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = error.code if isinstance(error, SystemExit) else 1
    return code if isinstance(code, int) and code else 1


def _blocks(flat: Array) -> Iterator[numpy.ndarray]:
    """A host array in messages of at most `MOST` numbers; views."""
    if not isinstance(flat, numpy.ndarray) or flat.dtype not in DTYPES:
        raise DTypeError(f"MPI: expected a host array of {', '.join(map(str, DTYPES))}, got {type(flat).__name__} "
                         f"{getattr(flat, 'dtype', '')}: convert it with array.astype('float32')")
    if not (flat.flags.c_contiguous and flat.flags.writeable):
        raise ShapeError(f"MPI: expected a contiguous array that can be written, got one of shape {flat.shape} with strides "
                         f"{flat.strides}{'' if flat.flags.writeable else ', read-only'}: pass array.copy()")
    numbers = flat.reshape(-1)
    return (numbers[start:start + MOST] for start in range(0, numbers.size, MOST))


def _share_of_cores(MPI: Any, here: Any) -> int:
    """How many of this machine's cores are this process's: each core is shared by those who may run on it.

    So it makes no difference whether the launcher has bound every process to cores of its own or lets all run everywhere.
    """
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(parallel.cores()))
    last = numpy.array([own[-1]], dtype=numpy.int64)
    here.Allreduce(MPI.IN_PLACE, last, op=MPI.MAX)
    users = numpy.zeros(last[0] + 1, dtype=numpy.int64)
    users[own] = 1
    here.Allreduce(MPI.IN_PLACE, users, op=MPI.SUM)
    return max(1, int((1.0 / users[own]).sum() + 1e-6))
