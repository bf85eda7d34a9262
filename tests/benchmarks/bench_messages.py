"""The messages of a step in several processes: how long an all-reduce takes by its size, on this machine.

    mpiexec -n 2 python tests/benchmarks/bench_messages.py

Sizes are those of docs/scale_out.md: the small message, adapters, and a whole GPT-2 small. The rounds go over all sizes in
turn, so that what else the machine does meets all of them. MPI waits by asking again and again, so that a process whose partner
has no core makes a message longer by a time slice: the least of the times is what the message itself takes.
"""

import argparse
import statistics
import sys
import time

import numpy

from minilora.train.distributed.launchers import find_comm

SIZES = {
    "the small message": (54, "float64"),
    "10 k": (10_000, "float32"),
    "LoRA r 8 on q, v of GPT-2 small": (294_912, "float32"),
    "1 M": (1_000_000, "float32"),
    "LoRA r 8 on q, v of Llama 7B": (4_194_304, "float32"),
    "LoRA r 4 on q, v of GPT-3": (18_874_368, "float32"),
    "all of GPT-2 small": (124_439_808, "float32"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    comm = find_comm("cpu")
    if comm.size == 1:
        sys.exit("start several: mpiexec -n 2 python tests/benchmarks/bench_messages.py")
    arrays = {name: numpy.ones(n, dtype) for name, (n, dtype) in SIZES.items()}
    times = {name: [] for name in SIZES}
    for _ in range(args.rounds):
        for name, array in arrays.items():
            repeats = max(1, min(200, 2_000_000 // array.size))
            array[...] = 0.0
            comm.sum_(array)
            comm.barrier()
            began = time.perf_counter()
            for _ in range(repeats):
                comm.sum_(array)
            times[name].append((time.perf_counter() - began) / repeats)
    print(comm)
    print(f"{'message':34} {'numbers':>12} {'least ms':>10} {'median ms':>10} {'GB/s of payload, at best':>26}")
    for name, array in arrays.items():
        least, median = min(times[name]), statistics.median(times[name])
        print(f"{name:34} {array.size:12,} {1e3 * least:10.3f} {1e3 * median:10.3f} {array.nbytes / least / 1e9:26.2f}")


if __name__ == "__main__":
    main()
