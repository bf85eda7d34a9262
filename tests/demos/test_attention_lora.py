"""demos/attention_lora.py as a user runs it: what each placement can learn and cannot, and one line for every wrong flag."""
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

TINY = ("--tokens", 3, "--content", 2, "--n", 20, "--r", 2, "--steps", 4, "--batch-size", 4)
SMALL = ("--tokens", 5, "--content", 8, "--n", 300, "--steps", 150, "--lr", 0.02)
WAYS = ("behind", "beside", "full")


command = functools.partial(demo_runs.command, "attention_lora")
run = functools.partial(demo_runs.run, "attention_lora")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    call = inside("attention_lora", monkeypatch, tmp_path / "out")
    monkeypatch.setattr(call.module, "FRESH", 40)
    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new" / "folder"
    done = run(*SMALL, "--out", folder)
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def test_says_what_it_does(finished):
    done, _, _ = finished
    assert [line[:2] for line in done.stdout.splitlines() if line[1:3] == ". "] == ["1.", "2.", "3.", "4.", "5.", "6."]
    assert "5 tokens of 24 numbers, r = 8, alpha = 16, float32 on cpu, seed 0" in words(done.stdout)
    assert "the mean of all contents: 1 - 1/5 = 0.8000," in words(done.stdout)
    assert "its largest entry there: 0; beside W: " in words(done.stdout)
    assert "NO" not in done.stdout.split()
    assert widest(done.stdout) <= 80 and widest(done.stderr or ".") <= 80
    lines = done.stderr.splitlines()  # piped, so one line for each training, and nothing else
    assert len(lines) == 16 and all(line.endswith(" steps/s") for line in lines)


def test_tables_show_the_report(finished):
    done, report, _ = finished
    rows = [line.split() for line in done.stdout.splitlines()]
    for step in (0, 75, 150):
        place = report["before"]["full"]["steps"].index(step)
        shown = [[f"{report[task][way]['losses'][place]:.5f}" for way in WAYS] for task in ("before", "tag")]
        assert [row[2:] for row in rows if row[:1] == [str(step)] and len(row) == 5][:2] == shown
    tag, kept = report["tag"], report["kept"]
    shown = [(f"{record['behind']['loss']:.5f}", f"{record['beside']['loss']:.5f}") for record in (*kept, tag)]
    header = rows.index(["kept", "behind", "W", "right", "answers", "beside", "W", "right", "answers"])
    assert [(row[1], row[3]) for row in rows[header + 1:header + 6]] == shown


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
        "tokens": 5, "content": 8, "n": 300, "r": 8, "lora_alpha": 16.0, "steps": 150, "batch_size": 16, "lr": 0.02, "seed": 0,
        "device": None, "quick": False, "out": report["config"]["out"]}
    assert report["versions"]["minilora"] == minilora.__version__ and report["width"] == 24
    for record in (report["pretraining"], *(report[task][way] for task in ("before", "tag") for way in WAYS)):
        assert record["steps"] == list(range(0, 151, 15)) and len(record["losses"]) == 11 and len(record["curve"]) == 150
        assert record["losses"][-1] == record["loss"]
    for task in ("before", "tag"):
        trained = [report[task][way]["trained"] for way in WAYS]
        assert trained == [4 * 8 * 24, 4 * 8 * 24, 4 * 24 * 24 + 24]
        assert all(report[task][way]["losses"][0] == report[task]["base"]["loss"] for way in WAYS)  # B = 0
    assert [record["kept"] for record in report["kept"]] == [1.0, 0.5, 0.2, 0.1]


def test_both_placements_learn_the_place_before(finished):
    _, report, _ = finished
    assert report["pretraining"]["loss"] < 0.02 and report["pretraining"]["right"] > 0.99
    record = report["before"]
    assert record["found"] == [4, 0, 1, 2, 3]
    assert record["base"]["loss"] > 1.5 and record["base"]["right"] < 0.01
    for way in WAYS:
        assert record[way]["loss"] < 0.02 and record[way]["right"] > 0.99 and record[way]["attention"] > 0.9


def test_the_maps_are_those_of_the_model(finished):
    _, report, _ = finished
    records = [report["pretraining"], *(report[task][way] for task in ("before", "tag") for way in ("base", *WAYS))]
    for record in records:
        weights = numpy.array(record["map"])
        assert weights.shape == (5, 5) and weights.min() >= 0.0 and weights.sum(axis=1) == pytest.approx(numpy.ones(5))
        assert record["map_error"] < 1e-4
    for task, ways in (("before", WAYS), ("tag", WAYS[1:])):
        for way in ways:
            assert list(numpy.argmax(report[task][way]["map"], axis=1)) == report[task]["found"]
    assert numpy.argmax(report["before"]["base"]["map"], axis=1).tolist() == [0, 1, 2, 3, 4]  # as it was trained


def test_what_the_weight_has_lost_comes_back_beside_it_only(finished):
    _, report, _ = finished
    record, best = report["tag"], 1 - 1 / 5
    assert record["mean_of_contents_loss"] == pytest.approx(best, abs=0.02)
    assert record["first_task_loss"]["blind"] == record["first_task_loss"]["base"] == report["pretraining"]["loss"]
    assert record["largest_tag_entry"]["behind"] == 0.0 < 1.0 < record["largest_tag_entry"]["beside"]
    for blind in (record["base"], record["behind"], record["largest_rank"]):
        assert 0.99 * best < blind["loss"] < 1.1 * best
        assert blind["right"] == pytest.approx(1 / 5, abs=0.03) and blind["attention"] == pytest.approx(1 / 5, abs=0.03)
    assert record["largest_rank"]["r"] == 24 and record["largest_rank"]["trained"] == 4 * 24 * 24
    for way in WAYS[1:]:
        assert record[way]["loss"] < 0.05 and record[way]["right"] > 0.98 and record[way]["attention"] > 0.8


def test_what_it_has_nearly_lost_comes_back_slowly(finished):
    _, report, _ = finished
    losses = [record["behind"]["loss"] for record in report["kept"]]
    assert losses == sorted(losses) and losses[0] < 0.3 * losses[-1] and losses[-1] > 0.6
    assert max(record["beside"]["loss"] for record in report["kept"]) < 0.05


def test_merge_keeps_the_loss_and_unmerge_the_bits(finished):
    _, report, _ = finished
    for merge in (report[task][way]["merge"] for task in ("before", "tag") for way in WAYS[:2]):
        assert merge["relative_difference"] < 1e-4
        assert merge["base_unchanged"] is merge["base_restored_bit_for_bit"] is True


def test_a_changed_base_would_be_noticed(demo, monkeypatch):
    merge = minilora.lora.merge

    def careless(model):
        report = merge(model)
        model.fc_out.bias.data = model.fc_out.bias.data + 1.0
        return report
    monkeypatch.setattr(minilora.lora, "merge", careless)
    _, report = demo(*TINY)
    merge = report["before"]["behind"]["merge"]
    assert merge["base_unchanged"] and not merge["base_restored_bit_for_bit"]
    assert merge["relative_difference"] > 0.1


def test_samples_are_what_the_text_says(demo):
    config = type("Config", (), {"tokens": 6, "content": 3})
    for relation in ("place", "before", "tag"):
        tokens, requests, answers, found = demo.module.draw_samples(relation, 50, config, numpy.random.default_rng(0))
        names = slice(8, 16) if relation == "tag" else slice(0, 8)
        for sample in range(50):
            asked = requests[sample, :, names] @ tokens[sample, :, names].T  # largest where the codes are equal
            before = (asked.argmax(axis=1) - (relation == "before")) % 6
            assert before.tolist() == found[sample].tolist()
            numpy.testing.assert_array_equal(answers[sample], tokens[sample, found[sample], 16:])
        assert (requests[..., 16:] == 0).all() and (tokens[..., 8:16] == 0).all() == (relation != "tag")
    assert len({tuple(row) for row in found}) > 40  # tags are dealt out anew
    angles = 2 * numpy.pi / 6 * numpy.outer(numpy.arange(6), [1, 2, 3, 4])
    assert tokens[0, :, :8] == pytest.approx(numpy.hstack([numpy.cos(angles), numpy.sin(angles)]), abs=1e-6)


def test_same_seed_gives_the_same_figures(demo):
    one, two, other = (demo(*TINY, "--seed", seed)[1] for seed in (3, 3, 4))
    for key in ("pretraining", "before", "tag", "kept"):
        assert one[key] == two[key] != other[key]
    assert one["tag"]["mean_of_contents_loss"] != other["tag"]["mean_of_contents_loss"]  # the samples are others too


def test_runs_on_another_device(demo, device, capsys):
    code, report = demo(*TINY)
    assert code == 0 and report["device"] == device
    assert "python -m pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    ("--tokens", 2, "--content", 1, "--n", 1, "--batch-size", 1, "--steps", 1, "--r", 17),
    ("--lora-alpha", 1e-300, "--steps", 13),
], ids=str)
def test_runs_at_the_edges(demo, flags):
    code, report = demo(*TINY, *flags)
    assert code == 0 and report["status"] == "finished"


def test_every_picture_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    done = run(*TINY, "--tokens", 2, "--content", 1, "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr
    assert (tmp_path / "report.png").exists()


def test_divergence_gives_code_4_and_one_line(demo, capsys):
    code, report = demo(*TINY, "--lr", 1e30)
    assert code == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attention_lora.py: error: pre-training: the loss is ")
    assert "a smaller --lr than 1e+30" in line and report["status"].startswith("diverged: pre-training")
    assert "before" not in report


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_leaves_what_is_known(tmp_path):
    (tmp_path / "report.png").write_bytes(b"of an earlier run")
    started = command(*TINY, "--steps", 100, "--out", tmp_path)
    with subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        for line in child.stderr:
            if line.startswith("before, beside W "):
                child.send_signal(signal.SIGINT)
                break
        _, rest = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.splitlines()[-1] == "attention_lora.py: interrupted" and "Traceback" not in rest
    assert os.listdir(tmp_path) == ["report.json"]
    report = report_in(tmp_path)
    assert report["status"] == "interrupted" and "behind" in report["before"] and "kept" not in report


@pytest.mark.parametrize(("flags", "words"), [
    (("--n", 0, "--r", -1), ["--n must be at least 1, got 0", "--r must be at least 1, got -1"]),
    (("--tokens", 1), ["--tokens must be at least 2, got 1"]),
    (("--content", 0), ["--content must be at least 1, got 0"]),
    (("--steps", 0), ["--steps must be at least 1, got 0"]),
    (("--batch-size", 0), ["--batch-size must be at least 1, got 0"]),
    (("--batch-size", 21), ["--batch-size 21 is more than the 20 samples of --n"]),
    (("--r", 19), ["--r 19 is more than the 16 + --content = 18 numbers of a token"]),
    (("--lr", -1), ["--lr must be a finite number above 0, got -1"]),
    (("--lora-alpha", "nan"), ["--lora-alpha must be a finite number above 0, got nan"]),
    (("--seed", -1), ["--seed must not be negative, got -1"]),
    (("--r", "many"), ["argument --r: invalid int value: 'many'"]),
    (("--device", "abacus"), ["argument --device: invalid choice: 'abacus'"]),
    (("--step", 3), ["unrecognized arguments: --step 3"]),
], ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) else "")
def test_wrong_flag_gives_one_line_and_code_2(flags, words, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*TINY, *flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("attention_lora.py: error: ") and all(word in line for word in words)
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_found_before_the_training(demo, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    with pytest.raises(FileNotFoundError):  # the demo writes no report
        demo(*TINY, "--out", tmp_path / "FILE" / "below")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("attention_lora.py: error: --out ") and "cannot write there" in err


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
    gpu, cpu = reports["gpu"], reports["cpu"]
    assert gpu["device"] == "gpu" and gpu["tag"]["largest_tag_entry"]["behind"] == 0.0
    assert gpu["pretraining"]["curve"][:5] == pytest.approx(cpu["pretraining"]["curve"][:5], rel=1e-3)
    assert gpu["tag"]["behind"]["loss"] == pytest.approx(cpu["tag"]["behind"]["loss"], rel=0.02)
    assert gpu["before"]["behind"]["right"] == gpu["before"]["beside"]["right"] == gpu["tag"]["beside"]["right"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_size(seed, tmp_path):
    done = run("--seed", seed, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = report_in(tmp_path)
    best = report["tag"]["mean_of_contents_loss"]
    assert [report["before"][way]["trained"] for way in WAYS] == [2048, 2048, 16448]
    assert max(report["before"][way]["loss"] for way in WAYS) < 1e-3
    assert max(report["tag"][way]["loss"] for way in WAYS[1:]) < 1e-3
    assert best * 0.999 < report["tag"]["behind"]["loss"] < best * 1.02
    assert best * 0.999 < report["tag"]["largest_rank"]["loss"] < best * 1.02
    assert report["kept"][0]["behind"]["right"] > 0.98
    assert report["seconds"] < 60.0
