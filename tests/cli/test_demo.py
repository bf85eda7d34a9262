"""`minilora demo`."""
import json
from pathlib import Path

import pytest

from minilora.cli import demo
from minilora.cli.main import main

DEMOS = Path(__file__).resolve().parents[2] / "demos"


def reported(capsys, *words):
    assert main(["demo", *words, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_shift_reaches_what_the_svd_allows(capsys):
    report = reported(capsys, "shift")
    assert list(report) == ["schema", "change_rank", "sizes", "steps", "all_numbers", "before", "ranks"]
    assert report["schema"] == "minilora.demo/1" and [row["r"] for row in report["ranks"]] == [1, 2, 4, 8]
    for row in report["ranks"]:
        assert row["least"] - 1e-6 <= row["loss"] <= 1.02 * row["least"] + 1e-3 < report["before"]


def test_the_table(capsys):
    assert main(["demo", "shift", "--steps", "3", "--seed", "2"]) == 0
    out, err = capsys.readouterr()
    assert "least possible" in out and max(map(len, out.split("\n"))) <= 100 and err == ""


def test_one_seed_gives_one_run(capsys):
    words = ("shift", "--steps", "20", "--seed", "5")
    assert reported(capsys, *words) == reported(capsys, *words) != reported(capsys, "shift", "--steps", "20")


def test_every_script_is_listed(capsys):
    listed = {one["name"]: one for one in reported(capsys)["demos"]}
    assert {path.stem for path in DEMOS.glob("*.py")} == listed.keys() - {"shift"}
    assert all(one["here"] for one in listed.values())


def test_a_script_is_named_with_the_line_to_type(capsys, monkeypatch):
    monkeypatch.chdir(DEMOS.parent)
    assert main(["demo", "rank_sweep"]) == 2
    assert "Run it: python demos/rank_sweep.py" in capsys.readouterr().err


def test_without_the_source(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "folder", lambda: tmp_path / "nothing")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "of the source repository" in out and "film_reviews" in out
    assert main(["demo", "characters"]) == 2
    assert "which an installed package does not bring. Run it: python demos/characters.py" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [(["shft"], "did you mean 'shift'"), (["shift", "--steps", "0"], "at least 1")])
def test_what_is_wrong(words, said, capsys):
    assert main(["demo", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err
