"""Ranks that are threads of this process: what distributed code does with many of them, without MPI."""
import threading

import numpy as np

GRACE = 2.0
WAIT = 20.0  # seconds; a rank that waits longer stands for one that would hang


class Rank:
    """A `Comm` among threads. Sums are made in the order of the ranks; a message that does not fit the others' is an error."""

    def __init__(self, shared, rank):
        self.shared, self.rank, self.local_rank = shared, rank, rank
        self.size = self.local_size = shared.size
        self.cores = 1
        self.messages = []  # (kind, dtype, size) of each

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:  # as `Mpi.failed`: an error of everybody goes its way
            try:
                self.shared.ends.wait(GRACE)
            except threading.BrokenBarrierError:
                self.shared.barrier.abort()

    def sum_(self, flat):
        self._exchange("sum", flat, lambda arrays: sum(arrays[1:], arrays[0].copy()))

    def broadcast_(self, flat):
        self._exchange("broadcast", flat, lambda arrays: arrays[0].copy())

    def barrier(self):
        self.shared.barrier.wait(WAIT)

    def abort(self, status):
        self.shared.barrier.abort()
        raise SystemExit(status)

    def _exchange(self, kind, flat, joined):
        assert flat.flags.c_contiguous and flat.dtype in (np.float32, np.float64, np.int64)
        self.messages.append((kind, flat.dtype.name, flat.size))
        self.shared.arrays[self.rank] = flat
        self.barrier()
        assert len({rank.messages[-1] for rank in self.shared.ranks}) == 1
        with np.errstate(invalid="ignore"):  # MPI has no warnings either
            total = joined(self.shared.arrays)
        self.barrier()
        flat[...] = total
        self.barrier()


class _Shared:
    def __init__(self, size):
        self.size, self.arrays = size, [None] * size
        self.barrier, self.ends = threading.Barrier(size), threading.Barrier(size)
        self.ranks = [Rank(self, rank) for rank in range(size)]


def together(size, compute):
    """What `compute` gives for each of so many ranks, in their order; the first error that is not a broken wait is raised."""
    shared = _Shared(size)
    results, errors = [None] * size, []

    def run(rank):
        try:
            with rank:
                results[rank.rank] = compute(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in shared.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return results
