"""demos/rank_sweep.py as a user runs it: its figures keep to the theory, and one line for every wrong flag."""
import functools
import importlib.util
import os
import signal
import subprocess

import demo_runs
import numpy
import pytest
from demo_runs import inside, report_in, widest, words

import minilora

SMALL = ("--n", 120, "--d-in", 8, "--d-out", 6, "--k", 2, "--steps", 60, "--lr", 0.05)


command = functools.partial(demo_runs.command, "rank_sweep")
run = functools.partial(demo_runs.run, "rank_sweep")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    call = inside("rank_sweep", monkeypatch, tmp_path / "out")
    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new" / "folder"
    done = run("--quick", "--out", folder)
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def by(key, records):
    return {record[key]: record for record in records}


def test_says_what_it_does(finished):
    done, _, _ = finished
    assert [line for line in done.stdout.splitlines() if line[1:2] == "."] == [
        "1. The task: a frozen layer W, and data that ask for W + D*", "2. Rank: how small does the loss get?",
        "3. Alpha: what does it do to the speed? r = 2", "4. The scaling rule: alpha / r or alpha / sqrt(r)?",
        "5. How A and B start: r = 2"]
    assert "300 rows, 24 inputs, 16 outputs, true rank 2, noise 0.1, float32 on cpu, seed 0" in words(done.stdout)
    assert "floor of the loss, noise^2:    0.01" in done.stdout
    assert "did not come within" not in done.stdout
    assert widest(done.stdout) <= 80 and widest(done.stderr or ".") <= 80
    lines = done.stderr.splitlines()  # piped, so one line for each training, and nothing else
    assert {line.split()[0] for line in lines} == {"ranks", "alphas", "rules", "starts"}
    assert all(line.endswith(" steps/s") for line in lines)


def test_picture_or_one_line_about_it(finished):
    done, _, folder = finished
    if importlib.util.find_spec("matplotlib"):
        assert sorted(os.listdir(folder)) == ["report.json", "report.png"]
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG") and "report.png" in done.stdout
    else:
        assert os.listdir(folder) == ["report.json"] and "python -m pip install matplotlib" in done.stdout


def test_report_holds_the_run(finished):
    _, report, _ = finished
    assert report["status"] == "finished" and report["device"] == "cpu" and report["seconds"] > 0.0
    assert report["config"] == {
        "n": 300, "d_in": 24, "d_out": 16, "k": 2, "noise": 0.1, "lora_alpha": 2.0, "steps": 200, "lr": 0.02, "seed": 0,
        "device": None, "quick": True, "out": report["config"]["out"]}
    assert report["versions"]["minilora"] == minilora.__version__
    task = report["task"]
    assert task["weights"] == 24 * 16 and len(task["singular_values"]) == 16
    assert task["floor"] == pytest.approx(0.01)
    assert task["frozen"]["fresh_loss"] == pytest.approx(0.01 + 1 + 1 / 2)
    assert max(task["singular_values"][2:]) < 1e-12 * task["singular_values"][1]
    assert [record["r"] for record in report["ranks"]] == [1, 2, 3, 4, 8]
    assert [record["trained"] for record in report["ranks"]] == [40, 80, 120, 160, 320]
    assert [record["r"] * record["scaling"] for record in report["ranks"]] == pytest.approx([2.0] * 5)
    for record in (*report["alphas"], report["twin"]):
        assert len(record["curve"]) == 201 and record["curve"][-1] == record["training_loss"]
    assert all([len(curve) for curve in record["curves"]] == [201] * 3 for record in report["inits"])


def test_no_rank_beats_its_bound_and_each_reaches_it(finished):
    _, report, _ = finished
    records, values = report["ranks"], numpy.array(report["task"]["singular_values"])
    for record in records:
        bound = report["task"]["floor"] + (values[record["r"]:] ** 2).sum() / 16
        assert record["best_fresh_loss"] == pytest.approx(bound)
        assert bound <= record["fresh_loss"] <= 1.05 * bound
        best = record["best_training_loss"]
        assert best * (1 - 1e-5) <= record["training_loss"] <= 1.05 * best  # float32 against float64
    for record in records[:2]:  # up to the true rank, to four digits
        assert record["training_loss"] == pytest.approx(record["best_training_loss"], rel=1e-4)


def test_more_rank_helps_up_to_the_true_rank_and_then_learns_noise(finished):
    _, report, _ = finished
    one, true, *more = (record["fresh_loss"] for record in report["ranks"])
    assert report["task"]["frozen"]["fresh_loss"] > 1.4 * one > 10 * true
    assert true < more[0] < more[-1] < report["task"]["least_squares"]["fresh_loss"] < 1.2 * true
    training = [record["training_loss"] for record in report["ranks"]]
    assert training == sorted(training, reverse=True)
    assert training[-1] > report["task"]["least_squares"]["training_loss"]


def test_alpha_sets_the_speed(finished):
    _, report, _ = finished
    alphas = by("lora_alpha", report["alphas"])
    assert list(alphas) == [0.125, 0.5, 2.0, 8.0, 32.0, 128.0, 512.0]
    steps = [alphas[alpha]["steps_to_halfway"] for alpha in (0.125, 0.5, 2.0, 8.0)]
    assert all(1.3 < slow / fast < 2.2 for slow, fast in zip(steps, steps[1:]))  # near 2 for each factor 4
    assert max(alphas[512.0]["curve"]) > 2 * alphas[512.0]["curve"][0]  # too large
    assert report["twin"]["lora_alpha"] == 8.0 and report["twin"]["difference"] < 1e-3


def test_scaling_rules(finished):
    _, report, _ = finished
    rules = {(record["rule"], record["r"]): record for record in report["rules"]}
    assert {r for _, r in rules} == {2, 4, 8, 16}
    for (rule, r), record in rules.items():
        assert record["scaling"] == pytest.approx(2.0 / (r if rule == "alpha / r" else r ** 0.5))
    first, last = rules["alpha / r", 2], rules["alpha / r", 16]
    assert last["steps_to_halfway"] == pytest.approx(first["steps_to_halfway"], rel=0.3)
    assert rules["alpha / sqrt(r)", 16]["steps_to_halfway"] < 0.7 * last["steps_to_halfway"]
    assert rules["alpha / sqrt(r)", 16]["steps_to_best"] < last["steps_to_best"]


def test_starts(finished):
    _, report, _ = finished
    inits = by("init", report["inits"])
    base = report["task"]["frozen"]["training_loss"]
    for init, record in inits.items():
        begins_as_base = all(curve[0] == pytest.approx(base, rel=1e-5) for curve in record["curves"])
        assert begins_as_base is (init != "both uniform")
        assert (record["steps_to_best"] is None) is (init == "both 0")
    assert all(len(set(curve)) == 1 for curve in inits["both 0"]["curves"])  # flat to the last bit
    one, two, three = inits["A uniform, B = 0"]["curves"]
    assert one != two != three
    assert one == by("lora_alpha", report["alphas"])[2.0]["curve"]  # one draw, one training


def test_same_seed_gives_the_same_figures(demo):
    one, two, other = (demo(*SMALL, "--seed", seed)[1] for seed in (3, 3, 4))
    for key in ("task", "ranks", "alphas", "rules", "inits"):
        assert one[key] == two[key] != other[key]


def test_runs_on_another_device(demo, device, capsys):
    code, report = demo(*SMALL, "--steps", 5)
    assert code == 0 and report["device"] == device
    assert "python -m pip install matplotlib" in capsys.readouterr().out


def test_says_which_rank_needs_more_steps(demo, capsys):
    _, report = demo(*SMALL, "--steps", 3)
    assert "r = 1, 2, 3, 4, 6 did not come within 5% of the best training loss" in capsys.readouterr().out
    assert [record["steps_to_best"] for record in report["ranks"]] == [None] * 5


@pytest.mark.parametrize("flags", [
    ("--n", 2, "--d-in", 1, "--d-out", 1, "--k", 1, "--steps", 1),
    ("--n", 20, "--d-in", 5, "--d-out", 9, "--k", 5, "--steps", 3),
    ("--noise", 100, "--steps", 2),
    ("--noise", 0.01, "--steps", 2, "--lora-alpha", 1e-300),
])
def test_runs_at_the_edges(demo, flags):
    code, report = demo(*SMALL, *flags)
    assert code == 0 and report["status"] == "finished"
    assert all(record["training_loss"] >= (1 - 1e-5) * record["best_training_loss"] for record in report["ranks"])


def test_every_picture_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    done = run("--n", 2, "--d-in", 1, "--d-out", 1, "--k", 1, "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr
    assert (tmp_path / "report.png").exists()


def test_divergence_gives_code_4_and_one_line(demo, capsys):
    code, report = demo(*SMALL, "--lr", 1e30)
    assert code == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank_sweep.py: error: with r = 1 and s = 4 the loss is ")
    assert "a smaller --lr than 1e+30" in line and report["status"].startswith("diverged: with r = 1")
    assert report["ranks"] == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_leaves_what_is_known(tmp_path):
    (tmp_path / "report.png").write_bytes(b"of an earlier run")
    started = command(*SMALL, "--steps", 200, "--out", tmp_path)
    with subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        for line in child.stderr:
            if line.startswith("ranks  r = 2 "):
                child.send_signal(signal.SIGINT)
                break
        _, rest = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.splitlines()[-1] == "rank_sweep.py: interrupted" and "Traceback" not in rest
    assert os.listdir(tmp_path) == ["report.json"]
    report = report_in(tmp_path)
    assert report["status"] == "interrupted" and len(report["ranks"]) >= 2 and "inits" not in report


@pytest.mark.parametrize(("flags", "words"), [
    (("--n", 0, "--k", -1), ["--n must be at least 1, got 0", "--k must be at least 1, got -1"]),
    (("--n", 8), ["--n 8 must be more than --d-in 8"]),
    (("--d-in", 0), ["--d-in must be at least 1, got 0"]),
    (("--d-out", -5), ["--d-out must be at least 1, got -5"]),
    (("--k", 7), ["--k 7 is more than min(--d-in, --d-out) = 6"]),
    (("--steps", 0), ["--steps must be at least 1, got 0"]),
    (("--noise", 0), ["--noise must be from 0.01 to 100, got 0"]),
    (("--noise", "nan"), ["--noise must be from 0.01 to 100, got nan"]),
    (("--lr", -1), ["--lr must be a finite number above 0, got -1"]),
    (("--lora-alpha", "inf"), ["--lora-alpha must be a finite number above 0, got inf"]),
    (("--seed", -1), ["--seed must not be negative, got -1"]),
    (("--k", "many"), ["argument --k: invalid int value: 'many'"]),
    (("--device", "abacus"), ["argument --device: invalid choice: 'abacus'"]),
    (("--step", 3), ["unrecognized arguments: --step 3"]),
], ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) else "")
def test_wrong_flag_gives_one_line_and_code_2(flags, words, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*SMALL, *flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("rank_sweep.py: error: ") and all(word in line for word in words)
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_found_before_the_training(tmp_path):
    (tmp_path / "FILE").write_text("")
    done = run(*SMALL, "--out", tmp_path / "FILE" / "below")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("rank_sweep.py: error: --out ") and "cannot write there" in line


def test_gpu_that_is_not_there_is_one_sentence(tmp_path):
    problem = minilora.backend.gpu_problem()
    if problem is None:
        pytest.skip("there is a GPU here")
    done = run("--device", "gpu", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert problem.split(":")[0] in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_gpu_tells_the_same_story(tmp_path):
    reports = {}
    for device in ("cpu", "gpu"):
        done = run("--quick", "--device", device, "--out", tmp_path / device)
        assert done.returncode == 0, done.stderr
        reports[device] = report_in(tmp_path / device)
    assert reports["gpu"]["device"] == "gpu"
    for on_gpu, on_cpu in zip(reports["gpu"]["ranks"], reports["cpu"]["ranks"]):
        assert on_gpu["fresh_loss"] == pytest.approx(on_cpu["fresh_loss"], rel=1e-2)
        assert on_gpu["best_fresh_loss"] == on_cpu["best_fresh_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_size(seed, tmp_path):
    done = run("--seed", seed, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = report_in(tmp_path)
    assert [record["r"] for record in report["ranks"]] == [1, 2, 3, 4, 6, 8, 16]
    for record in report["ranks"]:
        assert record["best_fresh_loss"] <= record["fresh_loss"] <= 1.05 * record["best_fresh_loss"]
    slow, fast = ({record["r"]: record["steps_to_best"] for record in report["rules"] if record["rule"] == rule}
                  for rule in ("alpha / r", "alpha / sqrt(r)"))
    assert slow[48] > 1.5 * slow[4] and fast[48] < 1.2 * fast[4]
    assert report["twin"]["difference"] < 1e-3
    assert report["seconds"] < 60.0
