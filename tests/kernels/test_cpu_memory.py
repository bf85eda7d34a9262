"""Freed memory stays in the process: measured by the page faults of another one."""

import os
import subprocess
import sys

import pytest

from minilora.kernels.cpu import memory as cpu_memory

STEPS = """
import numpy, resource
{first}
def step():
    arrays = [numpy.ones((1 << 20) - 1024, "float32") for _ in range(20)]  # from 4 MB on NumPy asks for huge pages
    while arrays:
        arrays.pop()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
FIRST_OP = "import minilora; minilora.tensor([1.0]) * 2.0"


def has_mallopt():
    import ctypes
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def faults(first, **settings):
    environment = {name: value for name, value in os.environ.items() if name not in cpu_memory.OF_THE_USER}
    done = subprocess.run([sys.executable, "-c", STEPS.format(first=first)], capture_output=True, text=True, check=True,
                          env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), **settings}, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(not has_mallopt(), reason="needs glibc")
def test_a_step_finds_the_memory_of_the_step_before():
    assert faults(FIRST_OP) < 500 < 10_000 < faults("")  # 20 arrays are 20,460 pages


@pytest.mark.skipif(not has_mallopt(), reason="needs glibc")
def test_what_the_user_has_set_stays():
    assert faults(FIRST_OP, MALLOC_TRIM_THRESHOLD_="131072") > 10_000


def test_no_other_library_is_touched(monkeypatch):
    monkeypatch.setattr(cpu_memory.sys, "platform", "darwin")
    assert not cpu_memory.keep_freed_memory()
