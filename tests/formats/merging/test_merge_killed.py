"""SIGKILL while files are merged: whoever looks finds the old result or the new one, never a third."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from merging_cases import adapter, drawn, files_in, update, write_base

from minilora import formats
from minilora.formats import merge_files

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter, and what the two merges that take turns give."""
    folder = tmp_path_factory.mktemp("killed")
    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.fc": (96, 64) for i in range(6)}
    tensors = {f"{path}.weight": drawn(rng, shape) for path, shape in shapes.items()}
    write_base(folder / "base", {**tensors, "norm.weight": drawn(rng, (64,))}, {"a": 1}, shard=60_000)
    formats.write_adapter(adapter({path: update(rng, "linear", shape) for path, shape in shapes.items()}), folder / "adapter")
    results = {}
    for weight in (1.0, 2.0):
        merge_files(folder / "base", {str(folder / "adapter"): weight}, folder / f"expected{weight}")
        results[weight] = files_in(folder / f"expected{weight}")
    return folder, results


def started(folder, weight):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, HERE / "merge_elsewhere.py", folder / "base", folder / "adapter", folder / "out",
                             str(weight)], env=environment, stdout=subprocess.PIPE, text=True)


def killed(made, wait, times):
    """Kill so many merges, each after `wait(process)`; how many of them had replaced the result."""
    folder, results = made
    replaced = 0
    merge_files(folder / "base", {str(folder / "adapter"): 1.0}, folder / "out", overwrite=True)
    now = 1.0
    for _ in range(times):
        other = 3.0 - now
        process = started(folder, other)
        wait(process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = files_in(folder / "out")
        match = [weight for weight, files in results.items() if files == found]
        assert match, "a third state"
        replaced += match[0] != now
        now = match[0]
    process = started(folder, 3.0 - now)
    process.communicate()
    assert process.returncode == 0 and files_in(folder / "out") == results[3.0 - now]
    assert not [path for path in folder.iterdir() if path.name.startswith(".out")], "leftovers of killed runs"
    return replaced


def test_killed_between_tensors(made):
    """A few times, where it certainly is at work."""
    def wait(process):
        for _ in range(draw.randint(1, 7)):
            process.stdout.readline()

    draw = random.Random(0)
    killed(made, wait, 2)


@pytest.mark.slow
def test_killed_at_30_random_times(made):
    """Anywhere: before it begins, at work, while it syncs and renames, and after it ended."""
    folder, _ = made
    begun = time.monotonic()
    process = started(folder, 1.0)
    process.stdout.readline()
    first = time.monotonic() - begun
    process.communicate()
    whole = time.monotonic() - begun
    draw = random.Random(1)
    replaced = killed(made, lambda process: time.sleep(draw.uniform(0.8 * first, 1.2 * whole)), 30)
    assert 0 < replaced < 30
