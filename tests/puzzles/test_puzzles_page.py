"""docs/puzzles.md beside the puzzles and the command that it tells of; its Python blocks are run by test_docs."""
import re
from pathlib import Path

import pytest
from test_docs import fenced_blocks

from minilora.puzzles.catalogue import PUZZLES, number_of
from minilora.puzzles.command import main
from minilora.puzzles.puzzle import UNWRITTEN

PAGE = Path(__file__).resolve().parents[2] / "docs" / "puzzles.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_list_is_complete():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \| (.*) \|$", TEXT, re.MULTILINE)
    assert rows == [(str(number_of(p)), p.name, p.teaches, p.see) for p in PUZZLES.values()]
    assert f"Here are {len(PUZZLES)} small puzzles" in TEXT


def test_what_the_terminal_shows_is_what_comes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = [block.code for block in fenced_blocks(TEXT, PAGE.name) if block.info == ["text", "terminal"]]
    lines = re.findall(r"`(return [^`]+)`", TEXT)[:2]
    assert main(["start"]) == 0
    came, file = [capsys.readouterr().out], Path("puzzles/02_dx.py")
    stub = file.read_text()
    for line, status in zip(lines, (3, 0), strict=True):
        file.write_text(stub.replace(UNWRITTEN, line))
        assert main(["check", "dx"]) == status
        came.append(capsys.readouterr().out)
    assert came == shown


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m minilora\.puzzles[^`\n#>]*", TEXT))))
def test_each_command_works_as_typed(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "start" not in command:
        main(["start", "--only", "loss,dx,dA"])
        main(["start", "submissions", "--only", "dx,dA"])
    capsys.readouterr()
    words = command.split()[3:]
    assert main(words) == (3 if words[:1] == ["check"] else 0)
    out, err = capsys.readouterr()
    assert out and err == ""
