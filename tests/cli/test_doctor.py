"""`minilora doctor`."""
import configparser
import json
import re
from pathlib import Path

import pytest

from minilora import probe, testing
from minilora.cli import doctor
from minilora.cli.main import main

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def reported(capsys, *words):
    status = main(["doctor", "--device", "cpu", "--json", "--quiet", *words])
    return status, json.loads(capsys.readouterr().out)


def test_the_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "WRITTEN", 2 << 20)
    status, report = reported(capsys, "--disk")
    assert status == 0 and report["schema"] == "minilora.doctor/1"
    assert list(report) == ["schema", "versions", "blas", "kernels", "gpu", "tf32", "extras", "disk", "gradient"]
    assert report["gradient"]["passed"] and report["gradient"]["error"] < 1e-9
    assert report["disk"]["bytes_per_second"] > 0 and report["disk"]["free_bytes"] > 0
    assert report["gpu"] == {"usable": False, "steps": []}
    assert list(tmp_path.iterdir()) == []


def test_the_text_fits_a_terminal(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "gradient   right on the" in out and "GPU" in out and err.startswith("checking a gradient")
    assert all(len(line) <= 100 for line in out.split("\n") if "pip install" not in line and "system" not in line and
               "disk" not in line)


def test_a_wrong_gradient_is_exit_code_3(capsys, monkeypatch):
    real = testing.gradcheck
    monkeypatch.setattr(testing, "gradcheck", lambda f, *x: real(lambda x, *more: f(x.detach(), *more), *x))
    status, report = reported(capsys)
    assert status == 3 and not report["gradient"]["passed"]
    assert main(["doctor", "--device", "cpu"]) == 3
    assert "WRONG on the cpu" in capsys.readouterr().out


def test_a_gpu_that_is_asked_for_and_does_not_work_is_exit_code_3(capsys, monkeypatch):
    monkeypatch.setattr(probe, "PROBES", (("one", lambda: None), ("two", lambda: "GPU asked for, but broken")))
    assert main(["doctor", "--device", "gpu"]) == 3
    out = capsys.readouterr().out
    assert "no GPU: broken" in out
    assert main(["doctor"]) == 0


def test_missing_packages_come_with_the_line_to_type(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "pip install 'minilora[models]'" in out and "pip install tqdm" in out


def test_the_extras_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(SETUP, encoding="utf-8")
    extras = {extra: re.findall(r"^([A-Za-z0-9_-]+)", text, re.MULTILINE)
              for extra, text in setup["options.extras_require"].items()}
    for extra, (packages, _) in doctor.EXTRAS.items():
        assert [p.partition("|")[0] for p in packages.split()] == extras[extra]


@pytest.mark.parametrize("words", [["--disc"], ["x"], ["--device", "tpu"]])
def test_wrong_words(words, capsys):
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().out == ""
