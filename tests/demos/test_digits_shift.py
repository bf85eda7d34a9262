"""demos/digits_shift.py as a user runs it, mostly on drawn digits in the place of scikit-learn's, which not everyone has."""
import copy
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import types
from unittest import mock

import demo_runs
import numpy
import pytest
from demo_runs import inside, report_in, widest, words

import minilora

SMALL = ("--width", 4, "--r", 2, "--steps", 60, "--batch-size", 40, "--lr", 0.01, "--lr-lora", 0.03, "--lora-alpha", 8)
TINY = (*SMALL, "--steps", 2)
KINDS = ["upright", "rotated", "mirrored", "negative", "outlined"]

DRAWN = '''"""Stands in for sklearn.datasets: digits of 5 x 7 pixels, moved by a pixel and noisy."""
import types
import numpy

FONT = """
.###. ..#.. .###. ####. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# ....# ..##. #.... #.... ....# #...# #...#
#...# ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#...# ..#.. ..##. .###. #..#. ....# ####. ..#.. .###. .####
#...# ..#.. .#... ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. #.... ....# ...#. #...# #...# .#... #...# ....#
.###. .###. ##### ####. ...#. .###. .###. .#... .###. .###.
"""


def load_digits():
    rng = numpy.random.default_rng(5)
    lines = [line.split() for line in FONT.split("\\n")[1:-1]]
    target = numpy.arange(300) % 10
    images = rng.integers(0, 3, (300, 8, 8))
    for image, digit in zip(images, target):
        glyph = numpy.array([[mark == "#" for mark in line[digit]] for line in lines])
        top, left = rng.integers(0, 2), rng.integers(0, 4)
        image[top:top + 7, left:left + 5] += glyph * rng.integers(10, 15)
    return types.SimpleNamespace(images=images.astype(float), target=target)
'''


command = functools.partial(demo_runs.command, "digits_shift")
run = functools.partial(demo_runs.run, "digits_shift")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder that, in front of the path, is a scikit-learn with drawn digits."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "sklearn").mkdir()
    (folder / "sklearn" / "__init__.py").write_text("")
    (folder / "sklearn" / "datasets.py").write_text(DRAWN)
    return folder


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Run the demo inside this process, on drawn digits: ``demo(flags)`` gives exit code and report."""
    datasets = types.ModuleType("sklearn.datasets")
    exec(DRAWN, vars(datasets))
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    return inside("digits_shift", monkeypatch, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new" / "folder"
    done = run(*SMALL, "--out", folder, path=[drawn])
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def test_says_what_it_does(finished):
    done, _, _ = finished
    assert [line[:2] for line in done.stdout.splitlines() if line[1:3] == ". "] == [f"{i}." for i in range(1, 8)]
    assert "convolutions of 4, 8 and 16 channels, LoRA of rank 2, 60 steps each, float32 on cpu, seed 0" in words(done.stdout)
    assert "210 images to train on, 90 held out, 9 of each digit" in done.stdout
    assert "unchanged to the last bit: yes" in done.stdout and "bit for bit: yes" in done.stdout
    assert widest(done.stdout) <= 80 and widest(done.stderr or ".") <= 80
    lines = done.stderr.splitlines()  # piped, so one line for each training, and nothing else
    assert [" ".join(line.split()[:3]) for line in lines] == ["pre-training upright, all", *(
        f"adapting {kind}, {way}" for kind in KINDS[1:] for way in ("LoRA", "all"))]
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
        "width": 4, "r": 2, "lora_alpha": 8.0, "steps": 60, "batch_size": 40, "lr": 0.01, "lr_lora": 0.03, "seed": 0,
        "device": None, "quick": False, "out": report["config"]["out"]}
    assert report["versions"]["minilora"] == minilora.__version__
    assert report["data"] == {"train": 210, "test": 90, "held_out_of_each_digit": 9, "kinds": KINDS}
    assert [record["kind"] for record in report["adapting"]] == KINDS[1:]


def test_the_base_is_blind_and_adapters_see(finished):  # by how much, test_real_digits says
    _, report, _ = finished
    assert report["base"]["right"]["upright"] > 0.9
    for record in report["adapting"]:
        assert record["base_right"] + 0.3 < min(record["lora"]["right"], record["full"]["right"]), record["kind"]
        assert record["full"]["right_upright"] < 0.95 * report["base"]["right"]["upright"]
    assert numpy.mean([record["lora"]["right"] for record in report["adapting"]]) > 0.75


def test_figures_that_must_agree(finished):
    _, report, _ = finished
    table = dict(zip(report["swapping"]["active"], report["swapping"]["right"]))
    assert list(table) == ["none", *KINDS[1:]] and report["swapping"]["milliseconds"] > 0.0
    assert dict(zip(KINDS, table["none"])) == report["base"]["right"]
    for i, record in enumerate(report["adapting"], 1):
        assert table[record["kind"]][i] == record["lora"]["right"]
        for when, right in (("before", record["base_right"]), ("after", record["lora"]["right"])):
            counts = numpy.array(record["confusion"][when])
            assert counts.sum(1).tolist() == [9] * 10
            assert numpy.trace(counts) == pytest.approx(90 * right)
    assert [table[record["kind"]][0] for record in report["adapting"]] != [
        record["full"]["right_upright"] for record in report["adapting"]]


def test_tables_hold_the_figures_of_the_report(finished, demo):
    done, report, _ = finished
    words = {tuple(line.split()) for line in done.stdout.splitlines()}
    for record in report["adapting"]:
        shares = (record["base_right"], record["lora"]["right"], record["full"]["right"], record["full"]["right_upright"])
        assert (record["kind"], *" ".join(f"{100 * share:.1f} %" for share in shares).split()) in words
        before, after = (round(90 * (1 - share)) for share in shares[:2])
        assert any(line[:2] == (record["kind"], str(before)) and str(after) in line[2:] for line in words)
    assert demo.module.pages.mistake([[5, 2], [1, 6]]) == "0 read as 1: 2 of 7"
    assert demo.module.pages.mistake([[7, 0], [0, 7]]) == "none"


def test_picture_shows_the_figures_of_the_report(finished, demo):
    _, report, _ = finished
    axes, pages, record, sizes = mock.MagicMock(), demo.module.pages, report["adapting"][1], report["bytes"]
    pages.draw_shares(axes, report)
    pages.draw_bytes(axes, report)
    base, lora, full = ([share / 100 for share in call.args[1]] for call in axes.bar.call_args_list)
    assert base == pytest.approx([record["base_right"] for record in report["adapting"]])
    assert lora == pytest.approx([record["lora"]["right"] for record in report["adapting"]])
    assert full == pytest.approx([record["full"]["right"] for record in report["adapting"]])
    assert [1000 * size for size in axes.barh.call_args.args[1]] == pytest.approx(
        [sizes["adapters"]["rotated"], sizes["base"], sizes["base_and_adapters"], sizes["base_and_full_copies"]])
    pages.draw_swapping(axes, report)
    pages.draw_confusion(axes, record, "after", "with its adapter")
    assert [call.args[0] for call in axes.imshow.call_args_list] == [report["swapping"]["right"], record["confusion"]["after"]]
    title = demo_runs.words(axes.set_title.call_args.args[0])
    assert title == f"Mirrored digits with its adapter: {100 * record['lora']['right']:.1f} % right"


def test_a_mixed_batch_is_read_as_the_separate_ones(finished):
    _, report, _ = finished
    mixed = report["mixed"]
    assert sum(mixed["rows"].values()) == mixed["read_alike"] == 90 and min(mixed["rows"].values()) > 0
    assert mixed["right"] > 0.7 and mixed["largest_difference"] < 1e-5 * mixed["largest_logit"]


def test_bytes_are_those_of_the_formula(finished):
    _, report, _ = finished
    layers = [(9, 4), (36, 8), (72, 16), (64, 128), (128, 10)]  # inputs and outputs
    adapter = sum(2 * (n + m) for n, m in layers)
    base = sum(n * m + m for n, m in layers) + 2 * (4 + 8 + 16)  # GroupNorm
    assert report["base"]["weights"] == base
    for record in report["adapting"]:
        assert (record["lora"]["trained"], record["full"]["trained"]) == (adapter, base)
    assert report["bytes"] == {"base": 4 * base, "adapters": dict.fromkeys(KINDS[1:], 4 * adapter),
                               "base_and_adapters": 4 * base + 16 * adapter, "base_and_full_copies": 20 * base}


def test_the_base_is_the_same_at_the_end(finished, demo):
    _, report, _ = finished
    assert report["base"]["fingerprint"] == report["base"]["fingerprint_after"]
    assert len(report["base"]["fingerprint"]) == 64 and report["base"]["logits_unchanged"] is True
    changed = copy.deepcopy(report)
    changed["base"]["fingerprint_after"] = "0" * 64
    changed["base"]["logits_unchanged"] = False
    assert demo.module.pages.storage_text(changed).count(": NO") == 2
    net = demo.module.DigitNet(4, rng=0)
    before = demo.module.fingerprint(net)
    net.norm2.bias.data[3] += 1e-7
    assert demo.module.fingerprint(net) != before


def test_split_and_kinds(demo, device):
    images, digits = demo.module.load_images()
    assert images.dtype == "float32" and 0.0 <= images.min() < images.max() <= 1.0
    data = demo.module.Digits(images, digits)
    test, train = (minilora.to_host(data.x["upright"][part])[:, 0] for part in ("test", "train"))
    assert numpy.bincount(data.digits).tolist() == [9] * 10
    seen = {image.tobytes() for image in train}
    assert len(seen) == len(train) == 210 and not seen & {image.tobytes() for image in test}
    x = {kind: minilora.to_host(data.x[kind]["test"])[:, 0] for kind in KINDS}
    assert numpy.array_equal(x["mirrored"][:, :, 0], test[:, :, 7])
    assert numpy.array_equal(x["rotated"][:, 0], test[:, :, 7]) and numpy.array_equal(x["rotated"][:, 7], test[:, :, 0])
    assert 0.0 == x["negative"].min() < x["negative"].max() == 1.0
    assert 0.05 < numpy.std(x["negative"] - (1.0 - test)) < 0.15
    assert x["outlined"][5, 3, 4] == test[5, 2:5, 3:6].max() - test[5, 3, 4]
    assert x["outlined"][5, 0, 7] == test[5, 0:2, 6:8].max() - test[5, 0, 7]


def test_same_seed_gives_the_same_figures(demo):
    one, two, other = (demo(*TINY, "--seed", seed)[1] for seed in (3, 3, 4))
    assert one["mixed"] == two["mixed"] != other["mixed"]
    assert one["base"]["fingerprint"] == two["base"]["fingerprint"] != other["base"]["fingerprint"]
    for a, b, c in zip(one["adapting"], two["adapting"], other["adapting"]):
        for way in ("lora", "full"):
            assert a[way]["losses"] == b[way]["losses"] != c[way]["losses"]


def test_runs_on_another_device(demo, device, capsys):
    code, report = demo(*TINY)
    assert code == 0 and report["device"] == device
    assert report["base"]["fingerprint"] == report["base"]["fingerprint_after"] and report["base"]["logits_unchanged"]
    assert "python -m pip install matplotlib" in capsys.readouterr().out


def test_adapter_and_full_copy_have_the_same_start_batches_and_schedule(demo, monkeypatch):
    seen, logits, rates = [], [], []
    loss_of, step_of = minilora.nn.CrossEntropyLoss.forward, minilora.optim.Adam.step

    def forward(self, x, labels):
        seen.append(labels.tolist())
        logits.append(x.numpy())
        return loss_of(self, x, labels)

    def step(self):
        rates.append(self.groups[0].settings["lr"])
        step_of(self)
    monkeypatch.setattr(minilora.nn.CrossEntropyLoss, "forward", forward)
    monkeypatch.setattr(minilora.optim.Adam, "step", step)
    demo(*TINY, "--lr", 0.01, "--lr-lora", 0.03)
    assert len(seen) == 9 * 2 and seen == seen[:2] * 9 and seen[0] != seen[1]
    assert rates == pytest.approx([0.01, 0.005] + 4 * [0.03, 0.015, 0.01, 0.005])
    for lora, full in zip(range(2, 18, 4), range(4, 18, 4)):  # B = 0: an adapter starts where the base is
        assert numpy.allclose(logits[lora], logits[full], rtol=1e-4, atol=1e-5)
        assert not numpy.allclose(logits[lora + 1], logits[full + 1], rtol=1e-4, atol=1e-5)


def test_seed_draws_weights_and_adapters(demo, monkeypatch):
    weights, drawn, inject = set(), [], demo.module.lora.inject

    def put_in(model, config, name, rng):
        inject(model, config, name, rng=rng)
        weights.add(model.conv1.weight.numpy().tobytes())
        drawn.append(model.hidden.adapters[name].lora_A.numpy().tobytes())
    monkeypatch.setattr(demo.module.lora, "inject", put_in)
    for seed in (1, 2):
        demo(*TINY, "--steps", 1, "--lr", 1e-30, "--seed", seed)  # so small that no weight moves
    assert len(weights) == 2 and len(set(drawn)) == len(drawn) == 8


@pytest.mark.parametrize(("flag", "label", "advice"), [
    ("--lr", "upright, all", "a smaller --lr than 1e+30"), ("--lr-lora", "rotated, LoRA", "a smaller --lr-lora than 1e+30")])
def test_divergence_gives_code_4_and_one_line(flag, label, advice, demo, capsys):
    code, report = demo(*SMALL, flag, 1e30)
    assert code == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"digits_shift.py: error: {label}: diverged in step ") and advice in line
    assert report["status"].startswith(f"diverged: {label}")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_leaves_what_is_known(drawn, tmp_path):
    (tmp_path / "report.png").write_bytes(b"of an earlier run")
    started = command(*SMALL, "--steps", 20, "--out", tmp_path, path=[drawn])
    with subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        for line in child.stderr:
            if line.startswith("adapting  rotated, all"):
                child.send_signal(signal.SIGINT)
                break
        _, rest = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.splitlines()[-1] == "digits_shift.py: interrupted" and "Traceback" not in rest
    assert os.listdir(tmp_path) == ["report.json"]
    report = report_in(tmp_path)
    assert report["status"] == "interrupted" and "base" in report and "mixed" not in report


def test_without_scikit_learn_it_is_one_line_and_code_2(tmp_path):
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("raise ModuleNotFoundError('hidden', name='sklearn')\n")
    done = run("--quick", "--out", tmp_path / "out", path=[tmp_path])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("digits_shift.py: error: the images come with scikit-learn, which is not installed: "
                           "run python -m pip install scikit-learn\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (("--width", 0, "--r", -1), ["--width must be at least 1, got 0", "--r must be at least 1, got -1"]),
    (("--width", 6), ["--width 6 must be a multiple of 4, the groups of its GroupNorm"]),
    (("--steps", 0), ["--steps must be at least 1, got 0"]),
    (("--batch-size", 0), ["--batch-size must be at least 1, got 0"]),
    (("--lora-alpha", "inf"), ["--lora-alpha must be a finite number above 0, got inf"]),
    (("--lr", 0), ["--lr must be a finite number above 0, got 0"]),
    (("--lr-lora", "nan"), ["--lr-lora must be a finite number above 0, got nan"]),
    (("--seed", -1), ["--seed must not be negative, got -1"]),
    (("--r", "many"), ["argument --r: invalid int value: 'many'"]),
    (("--device", "abacus"), ["argument --device: invalid choice: 'abacus'"]),
    (("--step", 3), ["unrecognized arguments: --step 3"]),
], ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) else "")
def test_wrong_flag_gives_one_line_and_code_2(flags, words, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*SMALL, *flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("digits_shift.py: error: ") and all(word in line for word in words)
    assert not (tmp_path / "out").exists()


def test_batch_that_is_larger_than_the_data(demo, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):  # no report is begun
        demo(*SMALL, "--batch-size", 211)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "digits_shift.py: error: --batch-size 211 is more than the 210 images of the training part"


def test_output_that_cannot_be_written_is_found_before_the_training(demo, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    with pytest.raises(FileNotFoundError):
        demo(*SMALL, "--out", tmp_path / "FILE" / "below")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("digits_shift.py: error: --out ") and "cannot write there" in line


@pytest.mark.gpu
def test_gpu_tells_the_same_story(drawn, tmp_path):
    reports = {}
    for device in ("cpu", "gpu"):
        done = run(*SMALL, "--device", device, "--out", tmp_path / device, path=[drawn])
        assert done.returncode == 0, done.stderr
        reports[device] = report_in(tmp_path / device)
    assert reports["gpu"]["device"] == "gpu" and reports["gpu"]["mixed"]["read_alike"] == 90
    for on_gpu, on_cpu in zip(reports["gpu"]["adapting"], reports["cpu"]["adapting"]):
        assert on_gpu["lora"]["right"] == pytest.approx(on_cpu["lora"]["right"], abs=0.1)
    assert reports["gpu"]["base"]["fingerprint"] == reports["gpu"]["base"]["fingerprint_after"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--quick",), ("--seed", 0), ("--seed", 1), ("--seed", 2)], ids=str)
def test_real_digits(flags, tmp_path):
    if not importlib.util.find_spec("sklearn"):
        pytest.skip("scikit-learn is not installed")
    done = run(*flags, "--out", tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    report = report_in(tmp_path)
    assert report["data"] == {"train": 1277, "test": 520, "held_out_of_each_digit": 52, "kinds": KINDS}
    least, gap = (0.85, 0.05) if "--quick" in flags else (0.92, 0.05)
    for record in report["adapting"]:
        assert record["base_right"] < 0.6
        assert least < record["lora"]["right"] > record["full"]["right"] - gap
    assert report["mixed"]["read_alike"] == 520
    assert report["base"]["fingerprint"] == report["base"]["fingerprint_after"] and report["base"]["logits_unchanged"]
