"""A merge in a process of its own, for tests that kill it: python merge_elsewhere.py BASE ADAPTER OUT WEIGHT."""
import sys

from minilora.formats import merge_files

if __name__ == "__main__":
    base, adapter, out, weight = sys.argv[1:]
    merge_files(base, {adapter: float(weight)}, out, overwrite=True, progress=lambda name, n: print(name, flush=True))
