"""GPU: sums over processes by NCCL, of which CuPy has a binding; six of its calls.

NCCL adds on the device, over NVLink or the network, in the order of the stream: no launch waits for the host. All processes get
the same bits: every number is added up in one place, or in one order. Its library is not part of CuPy's wheels:
``pip install nvidia-nccl-cu12`` or ``nvidia-nccl-cu13``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import backend, collective
from ..backend import override
from ..errors import DeviceError, DTypeError, ShapeError

__all__ = ["Nccl", "connect"]

Array = Any

TYPES = {"float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64", "int64": "NCCL_INT64"}


def library() -> Any:
    """CuPy's binding; DeviceError where NCCL itself is missing."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy tells by a warning what the error below tells
        from cupy.cuda import nccl, runtime

    if not nccl.available:
        major = runtime.runtimeGetVersion() // 1000
        raise DeviceError("several processes on GPUs need NCCL, which CuPy's packages do not bring: python -m pip install "
                          f"nvidia-nccl-cu{major} (Linux only); or train on the CPU: --device cpu")
    return nccl


def place() -> str:
    """Which card this process computes on, of all cards of all machines."""
    import cupy

    return f"{platform.node()} {cupy.cuda.Device().pci_bus_id}"


class Nccl:
    """A communicator of NCCL.

    Parameters
    ----------
    nccl : module
        What `library` gives.
    size : int
    key : bytes
        128 bytes that rank 0 got from NCCL and all others from it.

    Notes
    -----
    The calls can be recorded (`minilora.record`): a replay adds up again, in the order of the stream. All processes have to
    record, and to replay, the same steps.
    rank : int
    """

    def __init__(self, nccl: Any, size: int, key: bytes, rank: int) -> None:
        self.nccl = nccl
        self.communicator = nccl.NcclCommunicator(size, key, rank)  # waits until all are here

    def sum_(self, flat: Array) -> None:
        """One launch on the current stream."""
        address, kind, stream = self._arguments(flat)
        if flat.size:
            self.communicator.allReduce(address, address, flat.size, kind, self.nccl.NCCL_SUM, stream)

    def broadcast_(self, flat: Array) -> None:
        """One launch on the current stream."""
        address, kind, stream = self._arguments(flat)
        if flat.size:
            self.communicator.broadcast(address, address, flat.size, kind, 0, stream)

    def abort(self) -> None:
        """Give up what is under way: kernels that wait for a process that has gone would keep this one from ending."""
        self.communicator.abort()

    def __del__(self) -> None:
        with suppress(Exception):  # half made, or at the end of the process
            self.communicator.destroy()

    def _arguments(self, flat: Array) -> tuple[Any, int, Any]:
        """The address of an array, NCCL's word for its type, and the stream."""
        if flat.dtype.name not in TYPES:
            raise DTypeError(f"NCCL: expected an array of {', '.join(TYPES)}, got {flat.dtype}: convert it with "
                             "array.astype('float32')")
        if not flat.flags.c_contiguous:
            raise ShapeError(f"NCCL: expected a contiguous array, got one of shape {flat.shape} with strides {flat.strides}: "
                             "pass array.copy()")
        xp = backend.device_of(flat).xp
        return flat.data.ptr, getattr(self.nccl, TYPES[flat.dtype.name]), xp.cuda.get_current_stream().ptr


@override(collective.links, device="gpu")
def connect(rank: int, size: int, from_first: Callable[[bytes], bytes], gathered: Callable[[str], list[str]]) -> Nccl:
    """`links` by NCCL."""
    ranks: dict[str, list[int]] = {}
    for other, card in enumerate(gathered(place())):
        ranks.setdefault(card, []).append(other)
    shared = [f"ranks {', '.join(map(str, each))} on {card}" for card, each in ranks.items() if len(each) > 1]
    if shared:  # NCCL would refuse it too, with fewer words
        raise DeviceError(f"several processes compute on one GPU: {'; '.join(shared)}. Start as many processes on a machine as "
                          "it has GPUs (mpiexec -n 4; srun --ntasks-per-node=4 --gpus-per-task=1), and use none before "
                          "find_comm")
    nccl = library()
    key = nccl.get_unique_id() if rank == 0 else bytes(128)
    return Nccl(nccl, size, from_first(key), rank)
