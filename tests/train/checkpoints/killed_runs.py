"""Runs that are killed, or whose disk fails: run as a script, in a process of its own, which forks one run after another.

    killed_runs.py times 30 FOLDER      SIGKILL at 30 random moments
    killed_runs.py calls 7 FOLDER       SIGKILL before a call of the system that changes something, the seventh after it ...
    killed_runs.py full 11 FOLDER       the disk is full at such a call, and at the four after it
    killed_runs.py size 400 FOLDER      no file may have more than so many bytes, and 400 more each time (RLIMIT_FSIZE)

Each run is resumed until it is done, and must end with the bits of the run that was left alone.
"""
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

sys.modules["matplotlib"] = None  # a picture of each run would take most of the time

from tiny_run import Rows, loss, model_of, settings_of, valid_rows  # noqa: E402

from minilora import train  # noqa: E402
from minilora.errors import FileError  # noqa: E402
from minilora.formats.tensors import durable  # noqa: E402
from minilora.train.beside import Beside  # noqa: E402
from minilora.train.checkpoints import files, scan  # noqa: E402

CHANGING = ("fsync", "replace", "rename", "unlink", "link", "mkdir", "open", "rmdir", "chmod")
MEASURED = ("tokens_per_second", "peak_bytes")  # what no two runs have the same
FAILED = 3


class Beating(Beside):
    """Writes a byte into a pipe when a run begins, and after each step."""

    def __init__(self, pipe):
        self.pipe = pipe

    def begin(self, run):
        os.write(self.pipe, b".")

    def after_step(self, run, made):
        os.write(self.pipe, b".")


def fit(folder, beside=()):
    train.fit(model_of("lora"), Rows(), settings_of("lora"), loss=loss, valid=valid_rows(), folder=folder, resume=True,
              beside=beside, quiet=True)


def end_of(folder):
    """All that a run came to: its adapter, its last checkpoint with the optimizer's state, its metrics."""
    last = scan.newest(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "arrays": {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in last.contents.arrays.items()},
        "values": last.contents.values,
        "metrics": [{key: value for key, value in row.items() if key not in MEASURED} for row in rows],
        "checkpoints": scan.steps(folder),
    }


def forked(call):
    """Run a call in a fork; the process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            warnings.simplefilter("ignore")
            call()
            code = 0
        except FileError as error:
            print(error, file=sys.stderr)
            code = FAILED
        finally:
            os._exit(code)
    return process


def status_of(process):
    """The exit status of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def hooked(action):
    """Put `action(n)` before the n-th call of the system that changes something."""
    made = [0]

    def counting(function):
        def counted(*arguments, **options):
            made[0] += 1
            action(made[0])
            return function(*arguments, **options)
        return counted

    for name in CHANGING:
        setattr(os, name, counting(getattr(os, name)))
    durable.exchange = counting(durable.exchange)
    files.save_state = counting(files.save_state)


def killed_at(n, folder):
    def kill(made):
        if made == n:
            os.kill(os.getpid(), signal.SIGKILL)

    hooked(kill)
    fit(folder)


def full_at(n, folder):
    def refuse(made):
        if n <= made < n + 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hooked(refuse)
    fit(folder)


def limited_to(size, folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the call then says EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    fit(folder)


def whole_or_nothing(folder):
    """What is found after a run has ended in some way can be read; nobody looked away."""
    if folder.exists():
        scan.newest(folder)


def resumed(folder, expected):
    """Resume a run to its end, and compare."""
    whole_or_nothing(folder)
    assert status_of(forked(lambda: fit(folder))) == 0
    found = end_of(folder)
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"{folder}: other {different}: {found} and not {expected}"
    left = sorted(path.name for path in [*folder.parent.iterdir(), *folder.iterdir(), *(folder / "checkpoints").iterdir()]
                  if path.name.startswith("."))
    assert not left, f"left behind: {left}"


def at_times(count, place, expected, seconds):
    """A random time, of about two steps, after a random number of steps: on a busy machine too, all of a run is reached."""
    killed, places = 0, set()
    for number in range(count):
        folder = place / f"times-{number}" / "run"
        for _ in range(random.randrange(1, 4)):
            heard, said = os.pipe()
            process = forked(lambda: fit(folder, [Beating(said)]))
            os.close(said)
            beats = random.randrange(14)
            while beats and os.read(heard, 1):  # nothing more, where it has come to its end
                beats -= 1
            time.sleep(random.uniform(0.0, seconds / 6))
            os.kill(process, signal.SIGKILL)
            killed += status_of(process) == -signal.SIGKILL
            os.close(heard)
            whole_or_nothing(folder)
            places.add(max(scan.steps(folder), default=None))
        resumed(folder, expected)
    assert killed >= count and len(places) > min(count, 8) // 2, f"only {killed} were killed, after the steps {places}"
    print(f"{count} runs, killed {killed} times")


def at_calls(step, place, expected, what):
    """One failure in each run, at one call after the other, until there are no more."""
    n, ends = random.randrange(1, step + 1), []
    while True:
        folder = place / f"{what.__name__}-{n}" / "run"
        status = status_of(forked(lambda: what(n, folder)))
        ends.append(status)
        resumed(folder, expected)
        shutil.rmtree(folder.parent)
        if status == 0 and what is killed_at or n > 2000:
            break
        if status == 0 and what is full_at and ends[-12:] == [0] * 12:  # a save that was tried again, or none any more
            break
        n += step
    assert set(ends) <= ({0, -signal.SIGKILL} if what is killed_at else {0, FAILED}) and len(ends) > 10, ends
    print(f"{len(ends)} runs, of which {len(ends) - ends.count(0)} ended early")


def with_sizes(step, place, expected):
    ends = []
    for size in range(random.randrange(step), 12_000, step):
        folder = place / f"size-{size}" / "run"
        ends.append(status_of(forked(lambda: limited_to(size, folder))))
        resumed(folder, expected)
        if ends[-1] == 0:
            break
    assert ends[-1] == 0 and set(ends[:-1]) == {FAILED}, ends
    print(f"{len(ends) - 1} runs without room")


if __name__ == "__main__":
    way, number, where = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    random.seed(20 + number)
    fit(where / "first" / "run")
    began = time.monotonic()
    assert status_of(forked(lambda: fit(where / "alone" / "run"))) == 0
    took = time.monotonic() - began
    expected = end_of(where / "alone" / "run")
    assert expected == end_of(where / "first" / "run")
    if way == "times":
        at_times(number, where, expected, took)
    elif way == "size":
        with_sizes(number, where, expected)
    else:
        at_calls(number, where, expected, {"calls": killed_at, "full": full_at}[way])
