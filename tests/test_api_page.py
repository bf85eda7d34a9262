"""docs/api.md is what docs/make_api.py makes of the names and docstrings now, and says something of each of them."""
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
from test_docs import OPTIONAL, PAGES, ROOT, fenced_blocks

import minilora

spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
make_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_api)

# Public names that no page and no docstring shows in use. A list that may only become shorter.
WITHOUT_EXAMPLE = ROOT / "tests" / "data" / "names_without_example.txt"


@pytest.fixture(scope="module")
def made():
    return make_api.page()


@pytest.fixture(scope="module")
def page():
    return make_api.PAGE.read_text(encoding="utf-8")


def cells(row):
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def rows(page):
    """(room, cells) of every row under the heading of a room."""
    room = ""
    for line in page.splitlines():
        if line.startswith("## "):
            room = line.strip("# `")
        elif room and line.startswith("| ") and not line.startswith(("| name |", "| function |")):
            yield room, cells(line)


def entries(page):
    """(room, name, text) of every name on the page."""
    for room, row in rows(page):
        for cell, text in zip(row[::2], (row[1], row[-1])):
            if found := re.match(r"\[`([\w.]+)", cell):
                yield room, found[1], text if cell == row[0] else cell.partition(") ")[2]


def test_the_page_is_what_the_script_makes_now(page, made):
    if page != made:
        lines = zip(made.splitlines(), page.splitlines())
        first = next((new for new, old in lines if new != old), "the page's length")
        pytest.fail(f"docs/api.md is not what names and docstrings say now. Type: {make_api.COMMAND}\nfirst: {first}")


def test_every_public_name_of_every_package_is_there(page):
    there = {(room, name) for room, name, _ in entries(page)}
    packages = ["minilora", *(".".join(path.parent.relative_to(ROOT).parts)
                              for path in sorted((ROOT / "minilora").glob("*/**/__init__.py")))]
    rooms = [name for name in packages if hasattr(importlib.import_module(name), "__all__")]
    assert len(rooms) > 12
    rooms += [f"minilora.{name}" for name in minilora.__all__ if inspect.ismodule(getattr(minilora, name))]
    wanted = {(room, name) for room in rooms for name in importlib.import_module(room).__all__}
    assert not wanted - there


def test_every_name_says_what_it_is(page):
    told = {}
    for room, name, text in entries(page):
        told[room, name] = told.get((room, name), "") + text
    silent = [".".join(name) for name, text in told.items() if not text]
    assert not silent, f"write a first line into the docstrings of {silent}"
    borrowed = [f"{room}.{name}" for room, name, text in entries(page) if text.startswith(("str(object", "int([x]", "dict("))]
    assert not borrowed


def test_links_lead_somewhere(page):
    anchors = {make_api.slug(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")}
    targets = set(re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`]*`", "", page)))
    assert len(targets) > 100
    for target in targets:
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).exists() if file else anchor in anchors, target


def test_it_reads_as_a_table(page):
    for room, row in rows(page):
        assert len(row) == (3 if room == "minilora.ops" else 2), row
        signature = re.match(r"\[`([^`]+)`\]", row[0])
        assert signature is None or len(signature[1]) <= make_api.WIDTH + 1, row[0]
    for line in page.splitlines():
        text = re.sub(r"`[^`]*`|\\.|\]\([^)]*\)|\*\*[^*]+\*\*", "", line)
        assert "<" not in text and "`" not in text and " at 0x" not in line, line


@pytest.mark.parametrize("text, shown", [
    ("y = x. dx = dy. Keeps x.", "y = x. dx = dy."),
    ("Read it. `dtype` is kept.", "Read it."),
    ("Is it right? Tools for it: public.", "Is it right? Tools for it: public."),
    ("The figures, by name:", "The figures, by name"),
])
def test_first_sentence(text, shown):
    assert make_api.first_sentence(text) == shown


def test_signatures_are_cut_behind_what_is_positional():
    def long(first, second="a value of some length", third="another one of some length", *, fourth=4, fifth=None):
        pass

    assert make_api.signature("long", long) == "long(first, second='a value of some length', ...)"
    assert make_api.signature("f", lambda x, *, key=1, **more: 0) == "f(x, *, key=1, **more)"
    assert make_api.signature("f", lambda x, how=len: 0) == "f(x, how=len)"
    assert make_api.signature("f", lambda x, kept=object(): 0) == "f(x, kept=...)"


def test_what_markdown_would_take_for_its_own_is_escaped():
    assert make_api.in_table("|x| < 1 in `a|b`, x[i], 2 * 3, **all** of ``c``") == \
        "\\|x\\| \\< 1 in `a\\|b`, x\\[i], 2 \\* 3, **all** of `c`"


def test_numpy_is_enough(made):
    code = (f"import sys\nsys.path.insert(0, {str(ROOT / 'docs')!r})\n"
            f"sys.modules.update(dict.fromkeys({sorted(OPTIONAL)!r}))\nimport make_api\n"
            "sys.stdout.reconfigure(encoding='utf-8', newline='')\nsys.stdout.write(make_api.page())")
    alone = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert alone.returncode == 0, alone.stderr.decode()
    assert alone.stdout.decode("utf-8") == made


def shown_code():
    """All code that pages and docstrings show, by the file in which it stands."""
    for path in PAGES:
        for info, _, code in fenced_blocks(path.read_text(encoding="utf-8"), path.name):
            if info[0] == "python":
                yield code
    for path in (ROOT / "minilora").rglob("*.py"):
        yield "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def results(namespace, names):
    """The classes of a package that its functions give back, or that stand in a field of its other classes."""
    told = []
    for name in names:
        thing = getattr(namespace, name)
        notes = dict(getattr(thing, "__annotations__", {}))
        told += [str(notes.get("return", ""))] if inspect.isfunction(thing) else map(str, notes.values())
    words = set(re.findall(r"\w+", " ".join(told)))
    return {name for name in names if name in words and isinstance(getattr(namespace, name), type)}


def test_names_without_an_example_become_fewer():
    code = "\n".join(shown_code())
    missing = []
    for room in make_api.packages():
        namespace, names = make_api.public(room)
        given = results(namespace, names)
        for name in names:
            thing = getattr(namespace, name)
            if make_api.parameters_of(thing) is None or name in given:
                continue  # operations, errors, and what a function gives back: nobody calls them
            own = "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) (.*)$", inspect.getdoc(thing) or "", re.MULTILINE))
            leaf = room.rpartition(".")[2]
            if not (re.search(rf"\b{name}\b", own) or re.search(rf"\b{leaf}\.{name}\b", code)
                    or re.search(rf"from {room}[\w.]* import [^\n]*\b{name}\b", code)):
                missing.append(f"{room}.{name}")
    allowed = WITHOUT_EXAMPLE.read_text(encoding="utf-8").split()
    new, done = sorted(set(missing) - set(allowed)), sorted(set(allowed) - set(missing))
    assert not new, f"give these an example in their docstring, or show them on a page: {new}"
    assert not done, f"these have an example now, or are gone: take them out of {WITHOUT_EXAMPLE.name}: {done}"
    assert allowed == sorted(set(allowed)) and len(allowed) <= 50
