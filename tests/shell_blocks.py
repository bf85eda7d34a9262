"""Commands of a page: the lines of a ```sh run block, each run as typed, in the current folder.

    ```sh run
    minilora inspect base
    minilora train base --data data -o run --sanity     # exit code 3
    ```

A line begins with `minilora`; it must end with exit code 0, or with the one that stands behind it. A ```text output block
below must be what the commands wrote to stdout, or what they wrote to stderr; a line `...` stands for any number of lines. What
is not run (pip, other programs) belongs into a ```shell block.
"""
import contextlib
import io
import re
import shlex

from minilora.cli.main import main


def run_commands(code, where):
    """(stdout, stderr) of all lines of a block."""
    out, err = io.StringIO(), io.StringIO()
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = shlex.split(line, comments=True)
        if words[0] != "minilora":
            raise AssertionError(f"{where}: {line!r} is no minilora command: what is not run belongs into a ```shell block")
        expected = re.search(r"# exit code (\d+)\s*$", line)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code_came = main(words[1:])
        if code_came != (int(expected[1]) if expected else 0):
            raise AssertionError(f"{where}: {line!r} ended with exit code {code_came}\n{out.getvalue()}\n{err.getvalue()}")
    return out.getvalue(), err.getvalue()


def shows(shown, came):
    """Whether lines are the given ones, where `...` stands for any number of them."""
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in shown)
    return re.fullmatch(pattern, "".join(line + "\n" for line in came)) is not None
