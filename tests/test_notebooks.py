"""docs/notebooks/ is what docs/make_notebooks.py makes of the pages now; its cells run and print what is stored with them.

In plain Python everywhere, and in Jupyter itself, one kernel for each notebook, where nbclient and ipykernel are installed.
"""

import importlib.util
import json
import os
import re
import sys
import tempfile

import pytest
from test_docs import ROOT, fenced_blocks, run_page, sandbox  # noqa: F401  (a fixture is imported to be used)
from test_links import links

spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "docs" / "make_notebooks.py")
make_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebooks)

NAMES = make_notebooks.PAGES
FOLDER = make_notebooks.NOTEBOOKS


def text_of(name):
    return (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")


def cells_of(name, kind):
    return [cell for cell in json.loads(text_of(name))["cells"] if cell["cell_type"] == kind]


def stored(cell):
    """What a cell is said to print, or None where nothing is said."""
    return "".join(line for output in cell["outputs"] for line in output["text"]) if cell["outputs"] else None


def needed(name):
    """The packages besides NumPy without which a page does not run: it says so in a comment."""
    return re.findall(r"^<!-- needs (\w+) -->$", make_notebooks.page(name), re.MULTILINE)


def as_a_page(name):
    """The code cells of a notebook and what they print, in the form in which pages are run."""
    text = ""
    for cell in cells_of(name, "code"):
        source = "".join(cell["source"])
        magic, _, commands = source.partition("\n")
        text += f"~~~~sh run\n{commands}\n~~~~\n" if magic.startswith("%%sh") else f"~~~~python\n{source}\n~~~~\n"
        if cell["outputs"]:
            text += f"~~~~text output\n{stored(cell)}~~~~\n"
    return text


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_page_gives_now(name):
    if not (FOLDER / f"{name}.ipynb").exists() or text_of(name) != make_notebooks.notebook(name):
        pytest.fail(f"docs/notebooks/{name}.ipynb is not what docs/{name}.md gives now. Type: {make_notebooks.COMMAND}")


def test_every_notebook_has_a_page():
    assert sorted(path.stem for path in FOLDER.iterdir() if path.suffix == ".ipynb") == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_notebook_is_that_of_its_page(name):
    """Found by the tests' own reading of Markdown, which shares nothing with the script's."""
    expected = [["", None]]
    for info, _, code in fenced_blocks(make_notebooks.page(name), name):
        if info[0] == "python" or info[:2] == ["sh", "run"]:
            magic = "%%sh --no-raise-error\n" if "# exit code" in code else "%%sh\n"
            expected.append([magic * (info[0] == "sh") + code.strip("\n"), None])
        elif info[:2] == ["text", "output"]:
            expected[-1][1] = code
    assert [["".join(cell["source"]), stored(cell)] for cell in cells_of(name, "code")][1:] == expected[1:]


# The same code as the page's, which the quick suite runs: a page whose commands take their time is run twice on request.
SLOW = [pytest.param(name, marks=[pytest.mark.slow] * ("```sh run" in make_notebooks.page(name))) for name in NAMES]


@pytest.mark.parametrize("name", SLOW)
def test_a_notebook_runs_and_prints_what_is_stored(name, sandbox, tmp_path, monkeypatch):  # noqa: F811
    for package in needed(name):
        pytest.importorskip(package)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_page(as_a_page(name), f"docs/notebooks/{name}.ipynb", sandbox) == len(cells_of(name, "code"))


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_the_page_is_lost(name):
    """Every line of prose is in a text cell, but for its links; nothing of a code cell is."""
    shown = "\n".join("".join(cell["source"]) for cell in cells_of(name, "markdown")[1:])
    ours = re.compile(r"^( *)```(python|sh run|text output)\n.*?^ *```$", re.MULTILINE | re.DOTALL)
    blocks = ours.sub("", make_notebooks.page(name))
    without_links = [re.sub(r"\]\([^)]*\)", "]", text).split() for text in (blocks, shown)]
    assert without_links[0] == without_links[1]


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
    for cell in cells_of(name, "markdown"):
        for link in links("".join(cell["source"])):
            if re.match(r"https?:", link):
                continue
            file, _, heading = link.partition("#")
            place = (FOLDER / file).resolve() if file else FOLDER / f"{name}.ipynb"
            assert place.exists(), f"{name}.ipynb: {link} leads to no file"
            if heading and place.suffix == ".ipynb":
                titles = [line.strip("# \n").replace("`", "") for cell in cells_of(place.stem, "markdown")
                          for line in cell["source"] if line.startswith("#")]
                assert heading in [title.replace(" ", "-") for title in titles], f"{name}.ipynb: {link} leads to no heading"


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique_and_follow_from_the_cell(name, monkeypatch):
    made = make_notebooks.cells(name)
    ids = [cell["id"] for cell in made]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[0-9a-f]{12}", made_id) for made_id in ids)
    text = make_notebooks.page(name)
    heading, _, rest = text.partition("\n")
    edited, pages = f"{heading}\n\n```python\n1 + 1\n```\n{rest}", make_notebooks.page
    monkeypatch.setattr(make_notebooks, "page", lambda asked: edited if asked == name else pages(asked))
    changed = [cell["id"] for cell in make_notebooks.cells(name)]
    assert len(changed) == len(ids) + 2 and len(set(changed) - set(ids)) == 3  # the text is cut in two, and the new cell


PAGE = """# A *title*, `x.y`

See [b](b.md), [the engine](engine.md#how-backward-walks), [here](#a-title-xy), [far](https://x.org/a.md) and `[c](d.md)`.

```sh
echo [e](f.md)
```

![a picture](images/p.png)

- in a list:
  ```python
  if True:
      print("``` is no fence")
  ```

It prints:

~~~text output
``` is no fence
~~~

    z = x

```python
pass
```

```python
pass
```

```sh run
minilora --version
```

```sh run
minilora inspect nowhere  # exit code 1
```
"""


def test_a_page_is_cut_into_cells(monkeypatch):
    monkeypatch.setattr(make_notebooks, "page", lambda name: {"odd": PAGE}.get(name) or "## How `backward` walks\n")
    monkeypatch.setattr(make_notebooks, "PAGES", ("odd", "engine"))
    made = json.loads(make_notebooks.notebook("odd"))["cells"][2:]
    assert [cell["cell_type"] for cell in made] == ["markdown", "code", "markdown", *["code"] * 4]
    first = "".join(made[0]["source"])
    assert first.startswith("# A *title*") and first.endswith("- in a list:")
    assert "[b](../b.md)" in first and "(engine.ipynb#How-backward-walks)" in first and "(#A-*title*,-x.y)" in first
    assert "(https://x.org/a.md)" in first and "`[c](d.md)`" in first and "echo [e](f.md)" in first
    assert "![a picture](../images/p.png)" in first
    assert "".join(made[1]["source"]) == 'if True:\n    print("``` is no fence")'
    assert made[1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["``` is no fence\n"]}]
    assert "".join(made[2]["source"]) == "It prints:\n\n\n    z = x"
    assert made[3]["source"] == made[4]["source"] and made[3]["id"] != made[4]["id"]
    assert "".join(made[5]["source"]) == "%%sh\nminilora --version"
    assert made[6]["source"] == ["%%sh --no-raise-error\n", "minilora inspect nowhere  # exit code 1"]


def test_a_link_to_a_heading_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(make_notebooks, "page", lambda _: "# A\n\n[b](#b)\n")
    with pytest.raises(ValueError, match="#b: no heading"):
        make_notebooks.notebook("engine")


@pytest.mark.parametrize("name", NAMES)
def test_jupyter_takes_the_file_as_its_own(name):
    """Valid by the format's schema, and laid out so that saving an unchanged notebook changes no byte."""
    nbformat = pytest.importorskip("nbformat")
    read = nbformat.reads(text_of(name), as_version=4)
    nbformat.validate(read)
    assert nbformat.writes(read) + "\n" == text_of(name)


def shows(came, text):
    """Whether a stream is the text of the page, where a line `...` stands for any number of lines."""
    wanted = "".join("(?:.*\n)*" if line.strip() == "..." else re.escape(line.rstrip()) + "\n"
                     for line in text.strip("\n").split("\n"))
    return re.fullmatch(wanted, "".join(line.rstrip() + "\n" for line in came.strip("\n").split("\n"))) is not None


@pytest.mark.jupyter
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_jupyter(name, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for package in ("ipykernel", *needed(name)):
        pytest.importorskip(package)
    command = tmp_path / "bin" / "minilora"  # as an environment that is active has it
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m minilora "$@"\n')
    command.chmod(0o755)
    for variable, value in {"PYTHONPATH": ROOT, "TMPDIR": tmp_path, "IPYTHONDIR": tmp_path / "ipython",
                            "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}.items():
        monkeypatch.setenv(variable, str(value))
    read = nbformat.reads(text_of(name), as_version=4)
    expected = [stored(cell) for cell in cells_of(name, "code")]
    nbclient.NotebookClient(read, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, text in zip((cell for cell in read.cells if cell.cell_type == "code"), expected, strict=True):
        streams = {kind: "".join(output.text for output in cell.outputs if output.get("name") == kind)
                   for kind in ("stdout", "stderr")}
        assert cell.source.startswith("%%sh") or not streams["stderr"], cell.source
        assert text is None or any(shows(stream, text) for stream in streams.values()), f"{cell.source}\n\n{streams}"
