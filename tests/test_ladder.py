"""Break it and see: what docs/ladder.md says of each changed line is what happens, on a copy of the package.

A ```diff block names a file and changes it, the ```sh block after it is what the reader types, and each line of the ```text
block after that must be printed: as it stands, but for white space, and for "..." where something is left out.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from test_docs import PAGES, ROOT, fenced_blocks

PAGE = ROOT / "docs" / "ladder.md"
QUICK = 3  # so many run in every suite; all of them with -m slow


def breaks():
    """(title, file, old, new, command, promised lines) of every change on the page."""
    text = PAGE.read_text(encoding="utf-8")
    titles = {number: line.lstrip("# ") for number, line in enumerate(text.splitlines(), 1) if line.startswith("#### ")}
    blocks = fenced_blocks(text, PAGE.name)
    for i, block in enumerate(blocks):
        if block.info[0] == "diff":
            sh, outcome = blocks[i + 1:i + 3]
            assert (sh.info, outcome.info) == (["sh"], ["text"]), f"{PAGE.name}:{block.line}: expected sh and text after it"
            lines = block.code.splitlines()
            assert all(line[:1] in "-+" for line in lines), f"{PAGE.name}:{block.line}: lines begin with - or +"
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] == sign) for sign in "-+")
            title = next(titles[n] for n in range(block.line, 0, -1) if n in titles)
            yield title, block.info[1], old, new, sh.code, [line for line in outcome.code.splitlines() if line.strip()]


BREAKS = [pytest.param(*each, id=each[0], marks=() if i < QUICK else pytest.mark.slow) for i, each in enumerate(breaks())]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package in another place, without the kernels."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(ROOT / "minilora", folder / "minilora", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    return folder


def typed(command, folder):
    """What the words print, typed at a terminal in which kernels are off."""
    words = shlex.split(command, comments=True)
    start = {"minilora": [sys.executable, "-m", "minilora"], "python": [sys.executable]}[words[0]]
    env = {**os.environ, "MINILORA_KERNELS": "off", "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]),
           "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}  # an edit within a second would not be noticed in bytecode
    done = subprocess.run([*start, *words[1:]], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def same_words(text):
    return " ".join(text.split())


@pytest.mark.parametrize(("title", "file", "old", "new", "command", "promised"), BREAKS)
def test_the_page_says_what_happens(title, file, old, new, command, promised, copy):
    path = copy / file
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file} has these lines {source.count(old)} times:\n{old}"
    path.write_text(source.replace(old, new), encoding="utf-8")
    try:
        printed = same_words(typed(command, copy))
    finally:
        path.write_text(source, encoding="utf-8")
    for line in promised:
        pattern = ".*".join(re.escape(same_words(part)) for part in line.split("..."))
        assert re.search(pattern, printed), f"the page promises\n{line}\nand what came is\n{printed}"


def test_there_are_enough_of_them():
    assert len(BREAKS) >= 8 and PAGE in PAGES


@pytest.mark.slow
def test_unbroken_none_of_it_is_said(copy):
    """The same commands without the change: the page's words come from the change."""
    for title, _, _, _, command, promised in breaks():
        if "no check" in title:
            continue  # whose point is that nothing is said
        printed = same_words(typed(command, copy))
        patterns = [".*".join(re.escape(same_words(part)) for part in line.split("...")) for line in promised]
        assert not all(re.search(pattern, printed) for pattern in patterns), (title, printed)
