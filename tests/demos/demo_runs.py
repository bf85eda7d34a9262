"""How the tests start a demo: as a program of its own, or inside this process, where it can be tampered with."""
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMOS = ROOT / "demos"


def command(name, *flags, path=(), threads="1"):
    """What starts a demo: with one BLAS thread, since small products only lose by more, and heeding Ctrl-C."""
    environment = {key: value for key, value in os.environ.items() if key != "MINILORA_DEVICE"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    if threads is not None:
        environment.update(OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
    heeding = {"preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)} if os.name == "posix" else {}
    return {"args": [sys.executable, str(DEMOS / f"{name}.py"), *map(str, flags)], "env": environment, "text": True, **heeding}


def run(name, *flags, timeout=120, **settings):
    return subprocess.run(**command(name, *flags, **settings), capture_output=True, timeout=timeout)


def report_in(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def words(text):
    """A text without its line breaks."""
    return " ".join(text.split())


def hide(package, folder):
    """Make a folder that, in front of the path, makes a package look as if it were not installed."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(f"raise ModuleNotFoundError('hidden', name='{package}')\n")
    return folder


def widest(text):
    """Columns of the widest line, but for the one with the path of the report."""
    return max(len(line) for line in text.splitlines() if not line.startswith("wrote "))


def inside(name, monkeypatch, folder):
    """``call(*flags)`` runs a demo in this process and gives its exit code and report; `call.module` is the demo.

    Without a picture, which takes longer than a small run.
    """
    monkeypatch.syspath_prepend(str(DEMOS))
    module = importlib.import_module(name)
    for hidden in ("matplotlib", "matplotlib.figure"):  # the second too: once it was imported, it is found without the first
        monkeypatch.setitem(sys.modules, hidden, None)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(folder), *map(str, flags)])
        code = module.console.run(module.main, f"{name}.py")
        return code, report_in(folder)
    call.module = module
    return call


def piece(name):
    """A module of demos/showing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMOS))
        return importlib.import_module(f"showing.{name}")


def on_terminal(arguments, columns, out=False, interrupt_at=None):
    """Run a program with stderr on a terminal of so many columns: its exit code, and what it showed there.

    With `out` its stdout is that terminal, too. With `interrupt_at` it gets Ctrl-C once these bytes have been shown.
    """
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    import struct
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    with subprocess.Popen(**arguments, stdout=terminal if out else subprocess.DEVNULL, stderr=terminal) as child:
        os.close(terminal)
        shown, waiting = b"", interrupt_at is not None
        with contextlib.suppress(OSError):  # how a pseudo-terminal says that its program has ended
            while part := os.read(controller, 4096):
                shown += part
                if waiting and interrupt_at in shown:
                    child.send_signal(signal.SIGINT)
                    waiting = False
    os.close(controller)
    return child.returncode, shown.decode()
