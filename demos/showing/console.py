"""What the demos share: flags, errors on one line, report.json and report.png, headings, paragraphs and tables."""

import argparse
import contextlib
import io
import math
import os
import platform
import shlex
import sys
import textwrap

import minilora
import numpy
from minilora.errors import DivergedError, MiniloraError
from minilora.terminal import columns_of, wrapped

from .report import recording, write

USAGE, DIVERGED, INTERRUPTED = 2, 4, 130  # exit codes; the outer two as argparse and the shells use them
WIDTH = 80  # columns of the widest line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(USAGE, wrapped(f"{self.prog}: error: {message}", columns_of(sys.stderr)) + "\n")


def configuration(prog, description, settings, seed="of all random numbers", more=None):
    """A parser and what it read: a number for each setting, in full size or with --quick; --seed, --device and --out.

    `settings` maps a name to (full size, size with --quick, meaning), `more` a flag to the arguments of `add_argument`.
    """
    parser = Parser(prog=f"{prog}.py", description=description, allow_abbrev=False)
    for name, (full, quick, meaning) in settings.items():
        parser.add_argument(flag(name), type=type(full), metavar="X",
                            help=f"{meaning} (default {full:g}, with --quick {quick:g})")
    parser.add_argument("--seed", type=int, default=0, metavar="X", help=f"{seed} (default 0)")
    for name, arguments in (more or {}).items():
        parser.add_argument(name, **arguments)
    parser.add_argument("--device", choices=["cpu", "gpu", "auto"], help="default: MINILORA_DEVICE, else cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes; sizes given besides win")
    parser.add_argument("--out", default=os.path.join("runs", prog), metavar="DIR",
                        help="folder of report.json and report.png (default %(default)s)")
    config = parser.parse_args()
    for name, (full, quick, _) in settings.items():
        if getattr(config, name) is None:
            setattr(config, name, quick if config.quick else full)
    return parser, config


def flag(name):
    return "--" + name.replace("_", "-")


def refuse(parser, config, problems, positive=(), nonzero=()):
    """Exit code 2 with all problems on one line, if there are any; `positive` names what must be a finite number above 0."""
    for name in positive:
        if not 0.0 < getattr(config, name) < math.inf:
            problems.append(f"{flag(name)} must be a finite number above 0, got {getattr(config, name):g}")
    for name in nonzero:
        if not math.isfinite(getattr(config, name)) or getattr(config, name) == 0.0:
            problems.append(f"{flag(name)} must be finite and not 0, got {getattr(config, name):g}")
    if config.seed < 0:
        problems.append(f"--seed must not be negative, got {config.seed}")
    if problems:
        parser.error("; ".join(problems))


def gentler(config, settings, *names):
    """What may help after a divergence, and the line to type: all to its usual size that is above it, or a tenth of the first.

    `names` are the settings that a divergence may come from.
    """
    usual = {name: settings[name][1 if config.quick else 0] for name in names}
    wanted = {name: usual[name] for name in names if abs(getattr(config, name)) > usual[name]}
    wanted = wanted or {names[0]: getattr(config, names[0]) / 10}
    smaller = " and ".join(f"a smaller {flag(name)} than {getattr(config, name):g}" for name in wanted)
    flags = " ".join(f"{flag(name)} {value:g}" for name, value in wanted.items())  # given twice, the last one counts
    return f"{smaller} may help", f"python {shlex.join(sys.argv)} {flags}"


def run(main, prog):
    """The exit code of ``main()``. Errors that a user can cause, and Ctrl-C, become one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path with letters that the terminal has not is no reason to stop
            stream.reconfigure(errors="backslashreplace")
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
    except DivergedError as error:
        complain(prog, error)
        return DIVERGED
    except (MiniloraError, OSError, MemoryError) as error:
        complain(prog, error)
        return USAGE


def complain(prog, error):
    """One line on stderr; on a terminal several that fit it, in which a line to type is whole."""
    text = f"not enough memory: {error}" if isinstance(error, MemoryError) else str(error)
    print(wrapped(f"{prog}: error: {' '.join(text.split())}", columns_of(sys.stderr)), file=sys.stderr, flush=True)


# -- the report -------------------------------------------------------------------------------------------------------


def begun(config, **more):
    """The report of a run, on the device that --device names from now on: what is asked, where and with which versions."""
    if config.device is not None:
        minilora.use(config.device)
    device = minilora.current_device().name
    return {"config": vars(config), "device": device, "dtype": "float32", "versions": versions(), **more}


def versions():
    return {"minilora": minilora.__version__, "numpy": numpy.__version__, "python": platform.python_version()}


def percent(share):
    return f"{100.0 * share:.1f} %"


@contextlib.contextmanager
def reporting(report, pictures=("report.png",)):
    """Keep report.json in the folder of --out while the work inside is done: see `recording`."""
    folder = report["config"]["out"]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(recording(os.path.join(folder, "report.json"), report))
        except OSError as error:
            raise OSError(f"--out {folder}: cannot write there: {error}") from error
        for name in pictures:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))  # an earlier run's, it would not belong to this report.json
        yield


def picture(report, title, size, rows, columns, panels, name="report.png"):
    """Draw panels, functions of a matplotlib Axes, into a picture. Returns the lines to print, also without matplotlib."""
    folder = report["config"]["out"]
    where = os.path.join(folder, "report.json")
    try:
        from matplotlib.figure import Figure  # no pyplot: no display needed, no window
    except ModuleNotFoundError:
        return f"wrote {where}\nno picture: matplotlib is not installed, run python -m pip install matplotlib"
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title_lines(title, int(8.5 * size[0])), fontsize=13)  # so many letters of this size go on its width
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels):
        panel(axes)
    write(os.path.join(folder, name), png_of(figure))
    return f"wrote {where} and {name}"


def png_of(figure):
    """A figure as a PNG of at most 256 colours: a third of the bytes, and what is drawn in plain colours keeps them."""
    from PIL import Image  # matplotlib needs it, too

    drawn, png = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
    few.save(png, format="png", optimize=True)
    return png.getvalue()


# -- the terminal -----------------------------------------------------------------------------------------------------


def heading(text):
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def title(text):
    """What a run is, in lines of at most `WIDTH` columns."""
    return title_lines(text, min(columns_of(sys.stdout) or WIDTH, WIDTH))


def title_lines(text, width):
    """A title, broken between its parts and not inside of them."""
    whole = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    lines = []
    for line in text.split("\n"):
        parts = line.replace(" ", "\u00a0").replace(",\u00a0", ", ").replace(":\u00a0", ": ")  # a blank that breaks no line
        for part in textwrap.wrap(parts, **whole):
            lines += textwrap.wrap(part.replace("\u00a0", " "), **whole)  # a part that is too long is broken, too
    return "\n".join(lines)


def paragraph(text, indent=""):
    """A text in lines of at most `WIDTH` columns; those after the first begin with `indent`."""
    width = min(columns_of(sys.stdout) or WIDTH, WIDTH)
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(header, rows):
    """Rows of text as lines, every column aligned to the right, closer together where they would be too wide."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    gap = 3 if sum(widths) + 3 * len(widths) - 1 <= WIDTH else 2
    return "\n".join("  " + (" " * gap).join(cell.rjust(width) for cell, width in zip(row, widths))
                     for row in (header, *rows))
