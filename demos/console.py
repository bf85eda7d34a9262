"""What the demos share: errors on one line, report.json and report.png, progress, headings and tables."""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import sys
import time

try:
    from minilora.errors import MiniloraError
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: run `python -m pip install -e .` in the folder that holds setup.cfg")

USAGE, DIVERGED, INTERRUPTED = 2, 4, 130  # exit codes; the outer two as argparse and the shells use them


class Diverged(Exception):
    """The loss is not finite any more."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def configuration(prog, description, settings, seed="of all random numbers"):
    """A parser and what it read: a number for each setting, in full size or with --quick; --seed, --device and --out.

    `settings` maps a name to (full size, size with --quick, meaning).
    """
    parser = Parser(prog=f"{prog}.py", description=description, allow_abbrev=False)
    for name, (full, quick, meaning) in settings.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(full), metavar="X",
                            help=f"{meaning} (default {full:g}, with --quick {quick:g})")
    parser.add_argument("--seed", type=int, default=0, metavar="X", help=f"{seed} (default 0)")
    parser.add_argument("--device", choices=["cpu", "gpu", "auto"], help="default: MINILORA_DEVICE, else cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes; sizes given besides win")
    parser.add_argument("--out", default=os.path.join("runs", prog), metavar="DIR",
                        help="folder of report.json and report.png (default %(default)s)")
    config = parser.parse_args()
    for name, (full, quick, _) in settings.items():
        if getattr(config, name) is None:
            setattr(config, name, quick if config.quick else full)
    return parser, config


def refuse(parser, config, problems, positive):
    """Exit code 2 with all problems on one line, if there are any; `positive` names what must be a finite number above 0."""
    for name in positive:
        if not 0.0 < getattr(config, name) < math.inf:
            problems.append(f"--{name.replace('_', '-')} must be a finite number above 0, got {getattr(config, name):g}")
    if config.seed < 0:
        problems.append(f"--seed must not be negative, got {config.seed}")
    if problems:
        parser.error("; ".join(problems))


def run(main, prog):
    """The exit code of ``main()``. Errors that a user can cause, and Ctrl-C, become one line on stderr."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Diverged as error:
        complain(prog, error)
        return DIVERGED
    except (MiniloraError, OSError, MemoryError) as error:
        complain(prog, error)
        return USAGE


def complain(prog, error):
    """One line on stderr."""
    text = f"not enough memory: {error}" if isinstance(error, MemoryError) else str(error)
    print(f"{prog}: error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def write(path, data):
    """Write bytes to a file, whole or not at all: a reader never sees half of it."""
    part = f"{path}.{os.getpid()}.part"  # in the same folder: a rename across file systems would be a copy
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


# -- the report -------------------------------------------------------------------------------------------------------


def begin(report):
    """Make the output folder and write to it, so that one that cannot be used is found before the work."""
    folder = report["config"]["out"]
    try:
        os.makedirs(folder, exist_ok=True)
        save(report)
    except OSError as error:
        raise OSError(f"--out {folder}: cannot write there: {error.strerror}") from error
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, "report.png"))  # an earlier run's, it would not belong to this report.json


def save(report):
    """Write report.json, whole or not at all."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write(os.path.join(report["config"]["out"], "report.json"), text.encode())


@contextlib.contextmanager
def reporting(report):
    """Begin the report, and save it at the end with its seconds and its status, whatever that is."""
    began, report["status"] = time.perf_counter(), "running"
    begin(report)
    try:
        yield
        report["status"] = "finished"
    except BaseException as error:
        report["status"] = ("interrupted" if isinstance(error, KeyboardInterrupt) else
                            f"diverged: {error}" if isinstance(error, Diverged) else "failed")
        raise
    finally:
        report["seconds"] = time.perf_counter() - began
        save(report)


def picture(report, title, size, rows, columns, panels):
    """Draw panels, functions of a matplotlib Axes, into report.png. Returns the lines to print, also without matplotlib."""
    folder = report["config"]["out"]
    where = os.path.join(folder, "report.json")
    try:
        from matplotlib.figure import Figure  # no pyplot: no display needed, no window
    except ModuleNotFoundError:
        return f"wrote {where}\nno picture: matplotlib is not installed, run python -m pip install matplotlib"
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13)
    for axes, panel in zip(figure.subplots(rows, columns).flat, panels):
        panel(axes)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write(os.path.join(folder, "report.png"), png.getvalue())
    return f"wrote {where} and report.png"


# -- the terminal -----------------------------------------------------------------------------------------------------


def heading(text):
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def table(header, rows):
    """Rows of text as lines, every column aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join("  " + "   ".join(cell.rjust(width) for cell, width in zip(row, widths))
                     for row in (header, *rows))


class Progress:
    """A bar where tqdm is installed and stderr is a terminal, else one line for each `advance`."""

    def __init__(self, label, total, unit):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.began, self.bar = 0, time.perf_counter(), None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm
            self.bar = tqdm(total=total, desc=label, unit=" " + unit, leave=False, dynamic_ncols=True)

    def advance(self, amount, text):
        self.done += amount
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(amount)
        else:
            rate = self.done / max(time.perf_counter() - self.began, 1e-9)
            print(f"{self.label}  {text}  {rate:.1f} {self.unit}/s", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
