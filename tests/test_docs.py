"""The documentation is run: Python blocks of the pages, doctests of the modules, numbers worked by hand.

The ```python blocks of a page run in order in one namespace, in an empty folder, and with them the commands of its
```sh run blocks (`shell_blocks`). A ```text output block must show exactly what the block before it printed.
Each number of a ```text worked-example block is recomputed.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import operator
import re
import sys
import types
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import numpy
import pytest
from shell_blocks import run_commands, shows

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]
GRADIENTS = ROOT / "docs" / "lora_gradients.md"

# Importing these needs what is not installed everywhere, or starts a program.
NOT_IMPORTED = re.compile(r"minilora\.kernels\.gpu(\..*)?|.*\.__main__")
OPTIONAL = {"cupy", "mpi4py", "safetensors", "ml_dtypes", "tokenizers", "matplotlib", "tqdm", "sklearn"}


class Block(NamedTuple):
    info: list[str]  # the words after the fence: language, then role
    line: int        # of the first line of code, counted from 1
    code: str


def fenced_blocks(text: str, page: str) -> list[Block]:
    """The fenced blocks of a Markdown page, in order."""
    blocks: list[Block] = []
    fence, indent, info, start, body = "", 0, [""], 0, [""]
    for number, line in enumerate(text.splitlines(), 1):
        if fence:
            if re.fullmatch(rf" {{0,3}}{re.escape(fence[0])}{{{len(fence)},}}\s*", line[indent:]):
                blocks.append(Block(info, start, "\n".join(body) + "\n"))
                fence = ""
            else:
                body.append(line[min(indent, len(line) - len(line.lstrip(" "))):])
        elif opening := re.fullmatch(r"(\s*)(`{3,}|~{3,})([^`]*)", line):
            indent, fence = len(opening[1]), opening[2]
            info, start, body = opening[3].split() or [""], number + 1, []
    if fence:
        raise ValueError(f"{page}:{start - 1}: this block is never closed")
    return blocks


def raised_at(error: BaseException, page: str) -> int | None:
    """The line of `page` that was running when `error` was raised."""
    if isinstance(error, SyntaxError) and error.filename == page:
        return error.lineno
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == page:
            line = step.tb_lineno
        step = step.tb_next
    return line


def run_page(text: str, page: str, namespace: dict[str, Any]) -> int:
    """Run the Python blocks and the commands of a page and compare what they print; return how many blocks ran."""
    printed, commanded, count = "", ("", ""), 0
    for info, line, code in fenced_blocks(text, page):
        if info[0].lower() in {"py", "python3", "pycon", "{python}", "{code-block}"}:
            raise AssertionError(f"{page}:{line - 1}: write ```python, the only label that is run")
        if info[0] == "python":
            captured = io.StringIO()
            try:
                # The blank lines in front give the code its line numbers on the page.
                compiled = compile("\n" * (line - 1) + code, page, "exec")
                with contextlib.redirect_stdout(captured):
                    exec(compiled, namespace)
            except Exception as error:
                where = raised_at(error, page) or line
                source = text.splitlines()[where - 1].strip()
                raise AssertionError(f"{page}:{where}: {type(error).__name__}: {error}\n{source}") from error
            printed, commanded, count = captured.getvalue(), ("", ""), count + 1
        elif info[:2] == ["sh", "run"]:
            commanded = run_commands(code, f"{page}:{line}")
            printed, count = "\n".join(commanded), count + 1
        elif info[:2] == ["text", "output"]:
            shown = [row.rstrip() for row in code.strip("\n").split("\n")]
            came = [row.rstrip() for row in printed.strip("\n").split("\n")]
            if came != shown and not any(shows(shown, [row.rstrip() for row in text.splitlines()]) for text in commanded):
                raise AssertionError(f"{page}:{line}: the block before this one printed\n" + "\n".join(came))
    return count


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The namespace of a new module, an empty working folder, and the CPU; all is put back afterwards."""
    import minilora

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("COLUMNS", "80")
    module = types.ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with minilora.use("cpu"):
        yield module.__dict__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, sandbox: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    for package in re.findall(r"^<!-- needs (\w+) -->$", text, re.MULTILINE):
        pytest.importorskip(package)
    run_page(text, page.relative_to(ROOT).as_posix(), sandbox)


def module_names() -> list[str]:
    """Dotted names of all modules, found as files: collecting the tests imports none of them."""
    names = []
    for path in sorted((ROOT / "minilora").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not NOT_IMPORTED.fullmatch(name)]


@pytest.mark.parametrize("name", module_names())
def test_doctests(name: str, sandbox: dict[str, Any]) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    if module.__file__ is None or ">>>" not in Path(module.__file__).read_text(encoding="utf-8"):
        return  # looking through all that it defines would take longer than importing it
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def integer_value(node: ast.AST) -> int:
    """The value of an expression made of whole numbers, + - * and brackets."""
    if isinstance(node, ast.Expression):
        return integer_value(node.body)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -integer_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return int(OPERATORS[type(node.op)](integer_value(node.left), integer_value(node.right)))
    raise ValueError(f"not integer arithmetic: {ast.dump(node)}")


def worked_example() -> tuple[dict[str, Any], list[tuple[str, int, int, str, int]]]:
    """What the page gives (name to value) and what it works out (name, row, column, expression, value)."""
    page = GRADIENTS.read_text(encoding="utf-8")
    given: dict[str, Any] = {}
    worked = []
    for info, line, code in fenced_blocks(page, GRADIENTS.name):
        if info != ["text", "worked-example"]:
            continue
        for number, row in enumerate(code.splitlines(), line):
            if not row.strip():
                continue
            name, _, rest = (part.strip() for part in row.partition("="))
            if entry := re.fullmatch(r"(\w+)_([1-9])([1-9])", name):
                expression, _, value = (part.strip() for part in rest.rpartition("="))
                worked.append((entry[1], int(entry[2]) - 1, int(entry[3]) - 1, expression, int(value)))
            else:
                assert re.fullmatch(r"\w+", name), f"{GRADIENTS.name}:{number}: cannot read {row!r}"
                given[name] = numpy.array(ast.literal_eval(rest))
    return given, worked


needs_page = pytest.mark.skipif(not GRADIENTS.exists(), reason="docs/lora_gradients.md is not there")


@needs_page
def test_worked_example_is_right() -> None:
    """Each line of hand arithmetic is true, is the entry that the formulas give, and no entry is missing."""
    given, worked = worked_example()
    x, W, b, A, B, s, dy = (given[name] for name in ("x", "W", "b", "A", "B", "s", "dy"))
    # Index by index, as on the page: einsum shares no product order with the code under test.
    z = numpy.einsum("ni,ji->nj", x, A)
    u = numpy.einsum("nk,kj->nj", dy, B)
    expected = {
        "z": z,
        "y": numpy.einsum("ni,ki->nk", x, W) + b + s * numpy.einsum("nj,kj->nk", z, B),
        "u": u,
        "dB": s * numpy.einsum("nk,nj->kj", dy, z),
        "dA": s * numpy.einsum("nj,ni->ji", u, x),
        "dx": numpy.einsum("nk,ki->ni", dy, W) + s * numpy.einsum("nj,ji->ni", u, A),
    }
    for name, row, column, expression, value in worked:
        entry = f"{name}_{row + 1}{column + 1}"
        arithmetic = integer_value(ast.parse(expression.replace("·", "*"), mode="eval"))
        assert arithmetic == value, f"{entry}: {expression} is {arithmetic}, the page says {value}"
        formula = expected[name][row, column]
        assert formula == value, f"{entry} is {formula}, the page says {value}"
    entries = sorted(line[:3] for line in worked)
    assert entries == sorted((name, *at) for name in expected for at in numpy.ndindex(expected[name].shape))


@needs_page
def test_worked_example_through_the_library(sandbox: dict[str, Any]) -> None:
    """`lora_linear` gives the numbers worked by hand, to the last bit."""
    import minilora
    from minilora.lora.gradient import lora_linear

    given, worked = worked_example()
    floats = {name: numpy.array(array, dtype="float64") for name, array in given.items()}
    x, A, B = (minilora.Parameter(minilora.to_device(floats[name])) for name in ("x", "A", "B"))
    W, b = (minilora.Tensor(minilora.to_device(floats[name])) for name in ("W", "b"))
    y = lora_linear(x, W, b, A, B, float(given["s"]))
    y.backward(gradient=minilora.to_device(floats["dy"]))
    came = {"y": y.data, "dx": x.grad, "dA": A.grad, "dB": B.grad}
    compared = 0
    for name, row, column, _, value in worked:
        if name in came:
            assert float(came[name][row, column]) == value, f"{name}_{row + 1}{column + 1}"
            compared += 1
    assert compared == y.size + x.size + A.size + B.size


def test_blocks_are_found_with_their_lines() -> None:
    text = ("a\n```python\nx = 1\n```\n- item\n  ```python\n  if x:\n      x = 2\n  ```\n"
            "~~~text output\n```\n~~~\n")
    blocks = fenced_blocks(text, "page.md")
    assert [block.info for block in blocks] == [["python"], ["python"], ["text", "output"]]
    assert [block.line for block in blocks] == [3, 7, 11]
    assert blocks[1].code == "if x:\n    x = 2\n" and blocks[2].code == "```\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("one\n\n```python\nx = 1\nassert x == 2, 'no'\n```\n", r"page\.md:5: AssertionError: no"),
        ("```python\n```\n\n```python\ndef f():\n    1 / 0\n\nf()\n```\n", r"page\.md:6: ZeroDivisionError"),
        ("```python\nx = 1\nx = = 2\n```\n", r"page\.md:3: SyntaxError"),
        ("```python\nprint(1)\n```\n\n```text output\n2\n```\n", r"page\.md:6: .*printed\n1"),
        ("```py\nx = 1\n```\n", r"page\.md:1: write ```python"),
        ("```sh run\nls\n```\n", r"page\.md:2: 'ls' is no minilora command"),
        ("```sh run\nminilora inspect nowhere\n```\n", r"page\.md:2: .*ended with exit code 1"),
        ("```sh run\nminilora doctor --help\n```\n```text output\n...\nother\n```\n", r"page\.md:5: .*printed"),
    ],
)
def test_a_planted_fault_is_reported_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_page(text, "page.md", {})


def test_an_unclosed_block_is_reported() -> None:
    with pytest.raises(ValueError, match=r"page\.md:2: .*never closed"):
        fenced_blocks("one\n```python\nx = 1\n", "page.md")


def test_commands_run_and_what_they_write_is_compared() -> None:
    text = ("```sh run\n# a comment\nminilora inspect nowhere  # exit code 1\n```\n"
            "```text output\nminilora inspect: nowhere: there is no such file or folder\n```\n"
            "```sh run\nminilora doctor \\\n    --help\n```\n```text output\nusage: minilora doctor [options]\n...\n```\n")
    assert run_page(text, "page.md", {}) == 2


def test_blocks_of_a_page_share_one_namespace() -> None:
    assert run_page("```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n", "page.md", {}) == 2
