"""Runs that are killed, and disks that fail, in real processes: each is resumed, and ends with the bits of one left alone."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_runs.py")


def run(way, number, tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), way, str(number), str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[3])})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_thirty_random_moments(tmp_path):
    assert "30 runs, killed" in run("times", 30, tmp_path)


def test_killed_at_random_moments(tmp_path):
    assert "2 runs, killed" in run("times", 2, tmp_path)


@pytest.mark.slow
def test_killed_at_every_seventh_call(tmp_path):
    run("calls", 7, tmp_path)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_time(tmp_path):
    run("full", 11, tmp_path)


@pytest.mark.slow
def test_a_disk_with_room_for_so_much(tmp_path):
    run("size", 700, tmp_path)
