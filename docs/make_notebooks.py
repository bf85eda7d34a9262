"""Writes docs/notebooks/*.ipynb from pages of docs/: ``python docs/make_notebooks.py``.

A block marked ``python`` becomes a code cell, one marked ``sh run`` a cell of commands, and the block marked ``text output``
behind it the output that is stored with the cell. All else is text: what stands between, and other blocks, such as what is
typed once in a terminal. Equal pages give equal bytes. The pages are what is edited.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any, Iterator

DOCS = Path(__file__).resolve().parent
NOTEBOOKS = DOCS / "notebooks"
COMMAND = "python docs/make_notebooks.py"
PAGES = ("ladder", "lora_gradients", "puzzles", "engine", "own_model")

BLOCK = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<info>[^`\n]*)\n(?P<code>.*?)^ *(?P=fence) *$\n?",
                   re.MULTILINE | re.DOTALL)
LINK = re.compile(rf"(?P<block>{BLOCK.pattern})|(?P<span>`[^`]+`)|(?<=\]\()(?P<link>[^)\s]+)",
                  re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)

WHERE_FROM = """\
*This notebook is [docs/{name}.md](../{name}.md), cell by cell: the outputs are those of the page, which the tests compare
with what is printed. To run it, type `python -m pip install -e ".[notebooks]"` and `jupyter lab` in the folder of the clone,
and open docs/notebooks. To change it, edit the page, and type `{command}`.*
"""
WHERE_TO = """\
import os, tempfile
os.chdir(tempfile.mkdtemp())  # files that the cells write go into an empty folder
"""


def page(name: str) -> str:
    """The Markdown of a page."""
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """A page in order: ("code", a cell), ("output", what it prints), ("text", what stands between), ("block", any other)."""
    at = 0
    for block in BLOCK.finditer(text):
        info, code = block["info"].split(), textwrap.dedent(block["code"])
        yield "text", text[at:block.start()]
        if info[:1] == ["python"]:
            yield "code", code
        elif info[:2] == ["sh", "run"]:
            yield "code", f"%%sh{' --no-raise-error' * ('# exit code' in code)}\n{code}"
        else:
            yield ("output", code) if info[:2] == ["text", "output"] else ("block", block[0])
        at = block.end()
    yield "text", text[at:]


def cells(name: str) -> list[dict[str, Any]]:
    """The cells of a page, behind two of ours: where it comes from, and an empty folder to work in."""
    made = [cell("markdown", WHERE_FROM.format(name=name, command=COMMAND)), cell("code", WHERE_TO)]
    text = ""
    for kind, content in pieces(page(name)):
        if kind == "output":
            made[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": content.splitlines(keepends=True)}]
        elif kind == "code":
            made += [cell("markdown", moved(text, name)), cell("code", content)]
            text = ""
        else:
            text += content
    made.append(cell("markdown", moved(text, name)))
    return named([entry for entry in made if entry["source"]])


def cell(kind: str, source: str) -> dict[str, Any]:
    """A cell that has not run, without the blank lines around its source."""
    of_code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source.strip("\n").splitlines(keepends=True), **of_code}


def named(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells with ids that depend on what they hold: a cell put in between changes no id but its own."""
    seen: set[str] = set()
    for entry in made:
        content, again = entry["cell_type"] + "".join(entry["source"]), 0
        while (name := hashlib.sha256(f"{again} {content}".encode()).hexdigest()[:12]) in seen:
            again += 1
        seen.add(name)
        entry["id"] = name
    return made


def moved(text: str, name: str) -> str:
    """The text with its links as seen from docs/notebooks/; what is code has none."""
    return LINK.sub(lambda found: address(found["link"], name) if found["link"] else str(found[0]), text)


def address(link: str, name: str) -> str:
    """Where a link on a page leads, seen from its notebook: to another notebook where there is one."""
    if re.match(r"[a-z]+:", link):
        return link
    file, _, anchor = link.partition("#")
    if file.removesuffix(".md") not in (*PAGES, ""):
        return f"../{link}"
    heading = in_a_notebook(anchor, page(file.removesuffix(".md") or name)) if anchor else ""
    return file.replace(".md", ".ipynb") + (f"#{heading}" if heading else "")


def in_a_notebook(anchor: str, text: str) -> str:
    """The name that Jupyter gives to a heading which GitHub calls `anchor`: it keeps capitals and stops."""
    for title in HEADING.findall(BLOCK.sub("", text)):
        if re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") == anchor:
            return str(title).replace("`", "").replace(" ", "-")
    raise ValueError(f"#{anchor}: no heading of that page has this name")


def notebook(name: str) -> str:
    """The text of docs/notebooks/NAME.ipynb, laid out as nbformat lays it out."""
    whole = {"cells": cells(name), "nbformat": 4, "nbformat_minor": 5, "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}}
    return json.dumps(whole, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def main() -> None:
    NOTEBOOKS.mkdir(exist_ok=True)
    for name in PAGES:
        (NOTEBOOKS / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8", newline="\n")
        print(f"wrote docs/notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()
