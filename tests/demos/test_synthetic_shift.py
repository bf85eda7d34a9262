"""The main demo as a user runs it: a program with exit codes, one-line errors, a report and a picture."""

import functools
import importlib.util
import os
import re
import signal
import subprocess

import demo_runs
import pytest
from demo_runs import hide, inside, on_terminal, report_in, widest

from minilora import backend

SMALL = ("--n", "300", "--d-in", "21", "--d-out", "20", "--epochs", "40", "--batch-size", "30", "--lr", "2e-2")


command = functools.partial(demo_runs.command, "synthetic_shift")
run = functools.partial(demo_runs.run, "synthetic_shift")


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """`run` without the picture, which takes longer than a small training."""
    folder = hide("matplotlib", tmp_path_factory.mktemp("hidden"))
    return functools.partial(run, path=(folder,))


def the_only_line(done):
    """The one line of a usage error: on stderr, nothing was begun."""
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("synthetic_shift.py: error: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new" / "folder"
    done = run(*SMALL, "--out", folder)
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def test_says_what_it_does(finished):
    done, report, _ = finished
    assert [line for line in done.stdout.splitlines() if line[1:2] == "."] == [
        "1. Data: y = X theta", "2. Pre-training: every weight is trained", "3. Shift: theta + 1, and fresh X",
        "4. LoRA: the weight is frozen, A and B are trained", "5. What it learned: delta = (lora_alpha / r) B A",
        "6. Merge: W + delta in the place of W, and back"]
    assert "trainable params: 41 || all params: 461 || trainable%: 8.8937" in done.stdout
    assert "bit for bit the pre-trained weight: yes" in done.stdout
    assert "the article's figures are for full size" in done.stdout
    assert "577.075" not in done.stdout
    assert widest(done.stdout) <= 80 and widest(done.stderr) <= 80
    # Piped, so one line for each epoch of both trainings, and nothing else.
    assert [line.split()[:3] for line in done.stderr.splitlines()] == [
        [label, "epoch", f"{epoch}/40"] for label in ("pre-training", "LoRA") for epoch in range(1, 41)]


def test_report_holds_the_run(finished):
    _, report, _ = finished
    assert report["status"] == "finished"
    assert report["config"] == {
        "n": 300, "d_in": 21, "d_out": 20, "r": 1, "lora_alpha": 1.0, "epochs": 40, "batch_size": 30, "lr": 0.02,
        "seed": 0, "dtype": "float32", "device": None, "quick": False, "cache_base": False,
        "out": report["config"]["out"]}
    assert report["full_size"] is False
    assert report["device"] == "cpu"
    assert set(report["versions"]) == {"minilora", "numpy", "python"}
    assert report["seconds"] > 0.0
    assert (report["pretraining"]["trained"], report["lora"]["trained"]) == (420, 41)
    for phase in ("pretraining", "lora"):
        record = report[phase]
        assert record["epochs"] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
        assert len(record["losses"]) == 10
        assert len(record["last_batch_loss"]) == 40
        assert record["steps"] == 400
        assert record["steps_per_second"] == pytest.approx(400 / record["seconds"])


def test_report_shows_that_it_worked(finished):
    _, report, _ = finished
    assert report["pretraining"]["losses"][-1] < 1e-2 * report["pretraining"]["losses"][0]
    assert report["base_loss_on_shifted"] == pytest.approx(21, rel=0.3)
    assert report["lora"]["losses"][-1] < 1e-3 * report["base_loss_on_shifted"]
    delta = report["delta"]
    assert delta["rank"] == 1
    assert delta["singular_values"][0] == pytest.approx((21 * 20) ** 0.5, rel=1e-2)
    assert delta["mean_abs_error"] < 1e-2
    assert delta["mean_abs_error"] <= delta["max_abs_error"]
    assert all(abs(value - 1.0) <= delta["max_abs_error"] for row in delta["corner"] for value in row)
    merge = report["merge"]
    assert merge["adapter_loss"] == report["lora"]["losses"][-1]
    assert merge["merged_loss"] == pytest.approx(merge["adapter_loss"], rel=1e-4)
    assert merge["relative_difference"] < 1e-4
    assert merge["base_restored_bit_for_bit"] is True


def test_leaves_a_report_and_a_picture_and_nothing_else(finished):
    done, _, folder = finished
    if importlib.util.find_spec("matplotlib") is None:
        assert sorted(os.listdir(folder)) == ["report.json"]
        assert "python -m pip install matplotlib" in done.stdout
    else:
        assert sorted(os.listdir(folder)) == ["report.json", "report.png"]
        assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_one_seed_gives_one_run(finished, fast, tmp_path):
    assert fast(*SMALL, "--out", tmp_path).returncode == 0
    assert fast(*SMALL, "--seed", "1", "--out", tmp_path / "other").returncode == 0
    _, first, _ = finished
    same, other = report_in(tmp_path), report_in(tmp_path / "other")
    for key in ("base_loss_on_shifted", "delta", "merge"):
        assert same[key] == first[key] != other[key]
    assert same["lora"]["last_batch_loss"] == first["lora"]["last_batch_loss"]


def test_cached_frozen_output_gives_the_same_training(fast, tmp_path):
    flags = (*SMALL, "--dtype", "float64", "--r", "2", "--lora-alpha", "4")
    plain = fast(*flags, "--out", tmp_path / "plain")
    cached = fast(*flags, "--cache-base", "--out", tmp_path / "cached")
    assert (plain.returncode, cached.returncode) == (0, 0)
    assert "cached frozen output" in cached.stdout and "cached frozen output" not in plain.stdout
    a, b = report_in(tmp_path / "plain"), report_in(tmp_path / "cached")
    assert b["frozen_output"] == "cached frozen output" != a["frozen_output"]
    assert b["lora"]["losses"] == pytest.approx(a["lora"]["losses"], rel=1e-6)
    assert b["merge"]["adapter_loss"] == pytest.approx(b["lora"]["losses"][-1], rel=1e-6)
    assert b["delta"]["rank"] == a["delta"]["rank"] == 2


def test_quick_works_and_explicit_flags_win(fast, tmp_path):
    assert run("--quick", "--out", tmp_path).returncode == 0
    quick = report_in(tmp_path)
    assert quick["lora"]["losses"][-1] < 1e-3 < 10.0 < quick["base_loss_on_shifted"]
    assert quick["delta"]["mean_abs_error"] < 1e-2
    assert quick["merge"]["relative_difference"] < 1e-4
    assert fast("--quick", "--epochs", "2", "--d-in", "7", "--out", tmp_path).returncode == 0
    config = report_in(tmp_path)["config"]
    assert (config["epochs"], config["d_in"]) == (2, 7)
    assert all(config[name] == quick["config"][name] for name in ("n", "d_out", "batch_size", "lr"))


def test_smallest_sizes(fast, tmp_path):
    done = fast("--n", 1, "--d-in", 1, "--d-out", 1, "--epochs", 1, "--batch-size", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert report_in(tmp_path)["lora"]["epochs"] == [1]


def test_a_terminal_gets_a_bar(fast, tmp_path):
    code, shown = on_terminal(command(*SMALL, "--epochs", 300, "--out", tmp_path, path=fast.keywords["path"]), columns=100)
    assert code == 0
    for label in ("pre-training", "LoRA"):
        assert re.search(label + r": +[1-9]\d*%\|[^\r]* steps/s, epoch +\d+/300  (last batch|all data) +\d", shown)
    assert "\n" not in shown


@pytest.mark.parametrize("columns", [80, 40, 1])
def test_a_narrow_terminal_gets_the_loss_and_no_line_that_is_wider(columns, fast, tmp_path):
    code, shown = on_terminal(command(*SMALL, "--epochs", 150, "--out", tmp_path, path=fast.keywords["path"]), columns)
    assert code == 0 and report_in(tmp_path)["status"] == "finished"
    assert max(len(line) for line in shown.split("\r")) < columns
    assert columns == 1 or re.search(r"epoch +\d+/150  (last batch|all data) +\d+\.?\d*", shown)
    if columns == 80:
        assert re.search(r"\d% *[|,].*\d:\d\d left, [\d.]+ steps/s, epoch +\d+/150  (last batch|all data) +\d", shown)


def test_matplotlib_is_missing(tmp_path):
    hide("matplotlib", tmp_path)
    done = run(*SMALL, "--out", tmp_path / "out", path=(tmp_path,))
    assert done.returncode == 0, done.stderr
    assert report_in(tmp_path / "out")["status"] == "finished"
    assert done.stdout.splitlines()[-1].endswith(
        "no picture: matplotlib is not installed, run python -m pip install matplotlib")


@pytest.mark.parametrize(("flags", "words"), [
    (("--n", "0"), "--n must be at least 1, got 0"),
    (("--d-in", "-3"), "--d-in must be at least 1, got -3"),
    (("--d-out", "0"), "--d-out must be at least 1, got 0"),
    (("--r", "0"), "--r must be at least 1, got 0"),
    (("--r", "21"), "--r 21 is more than min(--d-in, --d-out) = 20"),
    (("--epochs", "0"), "--epochs must be at least 1, got 0"),
    (("--batch-size", "-1"), "--batch-size must be at least 1, got -1"),
    (("--batch-size", "301"), "--batch-size 301 is more than the 300 rows of --n"),
    (("--lr", "0"), "--lr must be a finite number above 0, got 0"),
    (("--lr", "-1"), "--lr must be a finite number above 0, got -1"),
    (("--lr", "nan"), "--lr must be a finite number above 0, got nan"),
    (("--lora-alpha", "inf"), "--lora-alpha must be finite and not 0, got inf"),
    (("--lora-alpha", "0"), "--lora-alpha must be finite and not 0, got 0"),
    (("--seed", "-1"), "--seed must not be negative, got -1"),
    (("--n", "many"), "argument --n: invalid int value: 'many'"),
    (("--dtype", "float16"), "argument --dtype: invalid choice: 'float16'"),
    (("--device", "tpu"), "argument --device: invalid choice: 'tpu'"),
    (("--epoch", "3"), "unrecognized arguments: --epoch 3"),
    (("--n", "-1", "--lr", "-1"), "--n must be at least 1, got -1; --lr must be a finite number above 0, got -1"),
], ids=lambda value: "".join(value) if isinstance(value, tuple) else "")
def test_wrong_usage_is_one_line(flags, words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        inside("synthetic_shift", monkeypatch, tmp_path / "out")(*SMALL, *flags)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (stop.value.code, out) == (2, "") and line.startswith("synthetic_shift.py: error: ") and words in line
    assert not (tmp_path / "out").exists()


def test_a_program_with_wrong_usage_ends_so(fast, tmp_path):
    assert "--n must be at least 1, got 0; --r must" in the_only_line(fast("--n", 0, "--r", 0, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(backend.gpu_problem() is None, reason="a GPU works here")
def test_gpu_is_asked_for_and_cannot_be_used(tmp_path):
    assert backend.gpu_problem() in the_only_line(run(*SMALL, "--device", "gpu", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("blocked", ["out", "out/below", "report"])
def test_output_that_cannot_be_written_is_found_before_the_training(blocked, tmp_path):
    (tmp_path / "out").write_text("a file")
    (tmp_path / "report" / "report.json").mkdir(parents=True)
    line = the_only_line(run(*SMALL, "--out", tmp_path / blocked))
    assert str(tmp_path / blocked) in line
    assert (tmp_path / "out").read_text() == "a file"
    assert os.listdir(tmp_path / "report") == ["report.json"]


def test_divergence_stops_at_once(fast, tmp_path):
    # Large enough for several blocks of the kernel that walks Adam.
    done = fast(*SMALL, "--d-in", "700", "--d-out", "700", "--lr", "1e30", "--out", tmp_path)
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()  # no NumPy warning beside it
    assert "in epoch 1: a smaller --lr than 1e+30 may help" in line
    report = report_in(tmp_path)
    assert report["status"].startswith("diverged: the loss is ")
    assert report["pretraining"]["losses"] == []
    assert "lora" not in report


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("phase", ["pre-training", "LoRA"])
def test_interrupt(phase, tmp_path):
    (tmp_path / "report.png").write_bytes(b"of an earlier run")
    flags = ("--n", 100, "--d-in", 5, "--d-out", 4, "--batch-size", 10, "--epochs", 700, "--out", tmp_path)
    with subprocess.Popen(**command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        for line in child.stderr:
            if line.startswith(f"{phase}  epoch  70/"):
                child.send_signal(signal.SIGINT)
                break
        _, rest = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.splitlines()[-1] == "synthetic_shift.py: interrupted"
    assert "Traceback" not in rest
    assert os.listdir(tmp_path) == ["report.json"]
    report = report_in(tmp_path)
    assert report["status"] == "interrupted"
    assert ("lora" in report) is (phase == "LoRA")
    record = report["lora" if phase == "LoRA" else "pretraining"]
    assert len(record["last_batch_loss"]) >= 70
    assert record["epochs"][0] == 70
    assert len(record["losses"]) == len(record["epochs"])


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe")
def test_reader_that_stops_reading(tmp_path):
    started = command(*SMALL, "--out", tmp_path)
    with subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert "Traceback" not in child.stderr.read()
        assert child.wait(60) == 141
    assert report_in(tmp_path)["status"] == "failed"


@pytest.mark.gpu
def test_gpu_tells_the_same_story(tmp_path):
    reports = {}
    for device in ("cpu", "gpu"):
        done = run(*SMALL, "--dtype", "float64", "--device", device, "--out", tmp_path / device)
        assert done.returncode == 0, done.stderr
        reports[device] = report_in(tmp_path / device)
    assert reports["gpu"]["device"] == "gpu"
    for phase in ("pretraining", "lora"):
        assert reports["gpu"][phase]["losses"] == pytest.approx(reports["cpu"][phase]["losses"], rel=1e-6)
    assert reports["gpu"]["merge"]["base_restored_bit_for_bit"] is True


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_size_reaches_the_article(seed, tmp_path):
    done = run("--seed", seed, "--out", tmp_path, threads=None, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +10 +577\.075 +578\.6 +5\d\d", done.stdout, re.MULTILINE)
    assert "trainable params: 2,001 || all params: 1,003,001 || trainable%: 0.1995" in done.stdout
    report = report_in(tmp_path)
    assert report["full_size"] is True
    assert report["pretraining"]["epochs"] == list(range(10, 101, 10))
    assert report["pretraining"]["losses"][-1] < 1e-3
    assert report["base_loss_on_shifted"] == pytest.approx(1001, rel=0.05)
    assert report["lora"]["losses"][-1] < 2e-2
    assert report["delta"]["mean_abs_error"] < 5e-3
    assert report["delta"]["rank"] == 1
    assert report["merge"]["relative_difference"] < 1e-4
    assert report["merge"]["base_restored_bit_for_bit"] is True
