"""`cupy.cuda.nccl` among threads, on the stand-in's memory: as strict about its arguments as NCCL."""
import threading

import numpy as np
from standin.counts import perform

available = True
NCCL_INT64, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM = 4, 7, 8, 0  # the numbers of nccl.h
TYPES = {NCCL_INT64: np.int64, NCCL_FLOAT32: np.float32, NCCL_FLOAT64: np.float64}
WAIT = 20.0
_meetings = {}


class NcclError(RuntimeError):
    """What NCCL refuses; CuPy's class of this name."""


class _Meeting:
    def __init__(self, size):
        self.size, self.arrays, self.barrier = size, {}, threading.Barrier(size)
        self.calls, self.aborted, self.destroyed = [], [], []


def get_unique_id():
    key = bytes(range(8)) + len(_meetings).to_bytes(8, "little") + bytes(112)
    _meetings[key] = None
    return key


def meeting(key):
    return _meetings[key]


class NcclCommunicator:
    def __init__(self, size, key, rank):
        if type(key) is not bytes or len(key) != 128 or key not in _meetings or not 0 <= rank < size:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT")
        _meetings[key] = self.meeting = _meetings[key] or _Meeting(size)
        self.rank = rank
        self.meeting.barrier.wait(WAIT)

    def allReduce(self, source, target, count, kind, op, stream):
        assert op == NCCL_SUM
        self._exchange(("allReduce", count, kind, stream), source, target, lambda arrays: sum(arrays[1:], arrays[0].copy()))

    def broadcast(self, source, target, count, kind, root, stream):
        self._exchange(("broadcast", count, kind, stream), source, target, lambda arrays: arrays[root].copy())

    def abort(self):
        self.meeting.aborted.append(self.rank)

    def destroy(self):
        self.meeting.destroyed.append(self.rank)

    def _exchange(self, call, source, target, joined):
        meeting, (_, count, kind, stream) = self.meeting, call
        assert source == target and count > 0 and isinstance(stream, int)
        memory = np.lib.stride_tricks.as_strided(source.root, (source.root.size,), (source.root.itemsize,)).view(TYPES[kind])
        start = source.offset // memory.itemsize
        assert start + count <= memory.size, "beyond the array"

        def meet():
            meeting.arrays[self.rank] = memory[start:start + count]
            if self.rank == 0:
                meeting.calls.append(call)
            meeting.barrier.wait(WAIT)
            total = joined([meeting.arrays[rank] for rank in range(meeting.size)])
            meeting.barrier.wait(WAIT)
            meeting.arrays[self.rank][...] = total
            meeting.barrier.wait(WAIT)

        perform(meet)  # at once, or at every launch of a graph
