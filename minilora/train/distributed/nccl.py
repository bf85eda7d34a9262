"""Processes that compute on a GPU each: what lies there is added up by NCCL, all else by MPI."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import numpy

from ... import backend, collective, replay
from ...errors import ConfigError
from .agreement import gathered
from .comm import Comm

__all__ = ["Nccl", "take_one"]

Array = Any
VISIBLE = "CUDA_VISIBLE_DEVICES"


def take_one(local_rank: int, local_size: int, environ: MutableMapping[str, str]) -> None:
    """Let this process see one GPU, by its place on the machine; before CUDA has begun in it.

    Where the launcher has given each process a GPU of its own, that stays.

    Raises
    ------
    ConfigError
        If fewer are named than there are processes.
    """
    if VISIBLE not in environ:
        environ[VISIBLE] = str(local_rank)
        return
    names = [name.strip() for name in environ[VISIBLE].split(",") if name.strip()]
    if 1 < len(names) < local_size:
        raise ConfigError(f"{VISIBLE}={environ[VISIBLE]} names {len(names)} GPUs, and {local_size} processes run on this "
                          "machine: each needs one of its own. Name as many, or start fewer processes")
    if len(names) >= local_size:
        environ[VISIBLE] = names[local_rank]


class Nccl:
    """A `Comm` for device arrays beside one for host arrays, which also carries NCCL's key.

    Parameters
    ----------
    host : Comm
    device : Device
        On which the arrays lie.

    Raises
    ------
    DeviceError
        If the device has no links of its own, NCCL is missing, or two processes compute on one GPU.
    """

    def __init__(self, host: Any, device: backend.Device) -> None:
        self.host, self.device = host, device
        self.rank, self.size, self.cores = host.rank, host.size, host.cores
        self.local_rank, self.local_size = host.local_rank, host.local_size
        connect = device.resolve(collective.links)
        self._links = connect(host.rank, host.size, self._from_first, lambda text: gathered(host, text))

    def __str__(self) -> str:
        return f"{self.host}; NCCL between their GPUs"

    def sum_(self, flat: Array) -> None:
        """Put the sum over all processes in the place of an array of the device or the host."""
        self._way(flat).sum_(flat)

    def broadcast_(self, flat: Array) -> None:
        """Put rank 0's numbers in the place of such an array."""
        self._way(flat).broadcast_(flat)

    def barrier(self) -> None:
        """Wait until every process is here."""
        replay.refuse_waiting("barrier", "waits for other processes")
        self.host.barrier()

    def abort(self, status: int) -> NoReturn:
        """End all processes at once, with this exit status."""
        with suppress(Exception):
            self._links.abort()
        self.host.abort(status)
        raise SystemExit(status)

    def failed(self, error: BaseException) -> None:
        """See `Mpi.failed`."""
        self.host.failed(error)

    def __enter__(self) -> Comm:
        self.host.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.host.__exit__(kind, error, trace)

    def _way(self, flat: Array) -> Any:
        if backend.device_of(flat) is self.device:
            return self._links
        replay.refuse_waiting("sum_ or broadcast_ of an array of the host", "is a message between processes, by the host")
        return self.host

    def _from_first(self, data: bytes) -> bytes:
        """Rank 0's bytes; as many in every process."""
        padded = numpy.frombuffer(data + bytes(-len(data) % 8), dtype=numpy.int64).copy()
        self.host.broadcast_(padded)
        return padded.tobytes()[:len(data)]
