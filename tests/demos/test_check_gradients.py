"""demos/check_gradients.py as a user runs it: its table, report and exit codes, and one line for every wrong flag."""
import functools
import importlib.util

import demo_runs
import numpy
import pytest
from demo_runs import inside, report_in, widest, words

import minilora

GRADIENTS, ORACLES = {"dA", "dB", "dx", "dW", "db"}, {"complex step", "plain ops", "merged weight", "NumPy sums"}


run = functools.partial(demo_runs.run, "check_gradients")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    return inside("check_gradients", monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new" / "folder"
    done = run("--out", folder)
    return done, report_in(folder), folder


def test_passes_and_says_so(finished):
    done, report, folder = finished
    assert done.returncode == 0 and not done.stderr
    assert "PASSED" in done.stdout and " NO" not in done.stdout and "FAILED" not in done.stdout
    assert "5 rows, 7 inputs, 6 outputs, rank 2, s = 2, float64 on cpu" in words(done.stdout)
    assert "dA with B = 0:     not noticed" in done.stdout and "a factor 2 too many?" in done.stdout
    assert widest(done.stdout) <= 80 and widest(done.stderr or ".") <= 80


def test_picture_or_one_line_about_it(finished):
    done, _, folder = finished
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG") and "report.png" in done.stdout
    else:
        assert "python -m pip install matplotlib" in done.stdout and not (folder / "report.png").exists()


def test_report_holds_every_figure(finished):
    _, report, _ = finished
    assert report["status"] == "passed" and report["passed"] and report["device"] == "cpu"
    assert report["config"]["d_in"] == 7 and report["scaling"] == 2.0 and report["seconds"] < 10.0
    assert report["versions"]["minilora"] == minilora.__version__
    for point in ("start", "trained"):
        assert set(report[point]["errors"]) == GRADIENTS and not report[point]["complaints"]
        for errors in report[point]["errors"].values():
            assert set(errors) == ORACLES and max(errors.values()) < 1e-11
        taylor = report[point]["taylor"]
        assert taylor["passed"] and abs(taylor["slope"] - 2.0) < 0.1
        assert len(taylor["h"]) == len(taylor["R"]) == len(taylor["slopes"]) + 1
    assert report["loss"]["after"] < report["loss"]["before"]
    assert abs(report["planted"]["taylor"]["slope"] - 1.0) < 0.1
    assert report["planted"]["guesses"]["lora_A"]["B = 0"] == ""


def test_curves_have_their_known_shape(finished):
    curves = finished[1]["curves"]
    best = {name: min(zip(curves[name], curves["h"])) for name in ("forward", "central")}
    assert 1e-10 < best["forward"][1] < 1e-5 < 1e-3 > best["central"][1] > 1e-7  # near eps^(1/2), near eps^(1/3)
    assert best["central"][0] < 1e-8 and best["forward"][0] < 1e-5
    assert max(error for error, h in zip(curves["complex"], curves["h"]) if h < 1e-9) < 1e-12
    assert curves["central"][-1] > 1e-3  # rounding has taken over


@pytest.mark.parametrize("flags", [
    ("--lora-dropout", 0.4),
    ("--n", 1, "--d-in", 1, "--d-out", 1, "--r", 1),
    ("--r", 9, "--lora-alpha", -3.5, "--seed", 7),
    ("--lora-alpha", 1000),
    ("--lora-alpha", 1e-6, "--seed", 5),
    ("--n", 20, "--d-in", 30, "--d-out", 25, "--r", 4),
])
def test_passes_at_other_sizes(demo, flags, capsys):
    code, report = demo(*flags)
    assert code == 0, capsys.readouterr().out
    assert report["passed"]


def test_runs_on_another_device(demo, device, capsys):
    code, report = demo("--quick", "--lora-dropout", 0.25)
    assert code == 0 and report["device"] == device
    assert "python -m pip install matplotlib" in capsys.readouterr().out


def test_same_seed_gives_the_same_figures(demo):
    one, two, other = (demo("--seed", seed)[1] for seed in (3, 3, 4))
    assert one["curves"] == two["curves"] != other["curves"] and one["start"] == two["start"]


def test_failed_check_gives_code_3(demo, monkeypatch, capsys):
    right = demo.module.from_numpy_sums
    monkeypatch.setitem(demo.module.ORACLES, "NumPy sums", lambda p: {**right(p), "dA": -right(p)["dA"]})
    code, report = demo()
    out = capsys.readouterr().out
    assert code == 3 and report["status"] == "failed" and not report["passed"]
    assert "FAILED: see the lines above." in out and "sign flipped" in out and "NO" in out
    assert report["start"]["errors"]["dA"]["NumPy sums"] == pytest.approx(2.0)


def test_wrong_gradient_in_the_library_gives_code_3(demo, monkeypatch, capsys):
    op = minilora.lora.LoRALinear
    backward = op.backward

    def wrong(self, dy):
        gradients = list(backward(self, dy))
        gradients[4] = None if gradients[4] is None else 0.5 * gradients[4]  # dB
        return tuple(gradients)
    monkeypatch.setattr(op, "backward", wrong)
    code, report = demo()
    assert code == 3
    for point in ("start", "trained"):
        for name, errors in report[point]["errors"].items():
            assert all((error > 0.1) is (name == "dB") for error in errors.values()), (point, name, errors)
        assert not report[point]["taylor"]["passed"]
    assert "a missing factor 2?" in capsys.readouterr().out


def test_not_a_number_is_reported_and_stored(demo, monkeypatch):
    right = demo.module.from_plain_ops
    monkeypatch.setitem(demo.module.ORACLES, "plain ops", lambda p: {**right(p), "db": right(p)["db"] * numpy.nan})
    code, report = demo()
    assert code == 3 and report["start"]["errors"]["db"]["plain ops"] is None


@pytest.mark.parametrize(("flags", "words"), [
    (("--n", 0, "--r", -1), ["--n must be at least 1, got 0", "--r must be at least 1, got -1"]),
    (("--d-in", 0), ["--d-in"]),
    (("--d-out", -5), ["--d-out"]),
    (("--r", 0), ["--r must be at least 1"]),
    (("--n", "many"), ["--n", "many"]),
    (("--lora-alpha", "nan"), ["--lora-alpha must be finite and not 0"]),
    (("--lora-alpha", 0), ["--lora-alpha"]),
    (("--lora-dropout", 1), ["--lora-dropout must be in [0, 1)"]),
    (("--seed", -1), ["--seed"]),
    (("--device", "abacus"), ["--device", "abacus"]),
    (("--sede", 1), ["--sede"]),
])
def test_wrong_flag_gives_one_line_and_code_2(flags, words, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*flags)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (stop.value.code, out) == (2, "")
    assert line.startswith("check_gradients.py: error: ") and all(word in line for word in words)


def test_output_that_cannot_be_written_gives_one_line_and_code_2(tmp_path):
    (tmp_path / "FILE").write_text("")
    done = run("--out", tmp_path / "FILE" / "below")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("check_gradients.py: error: --out ") and "cannot write there" in line


def test_gpu_that_is_not_there_is_one_sentence(tmp_path):
    problem = minilora.backend.gpu_problem()
    if problem is None:
        pytest.skip("there is a GPU here")
    done = run("--device", "gpu", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert problem.split(":")[0] in done.stderr and not (tmp_path / "out").exists()
