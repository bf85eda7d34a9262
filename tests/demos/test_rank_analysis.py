"""demos/rank_analysis.py as a user runs it: on adapters that it trains itself, and on folders of adapters."""
import functools
import importlib.util
import os

import demo_runs
import numpy
import pytest
from demo_runs import inside, report_in, widest, words

from minilora import formats, lora, models

run = functools.partial(demo_runs.run, "rank_analysis")
D = 16


@pytest.fixture
def demo(monkeypatch, tmp_path):
    return inside("rank_analysis", monkeypatch, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new"
    done = run("--quick", "--out", folder)
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def saved(folder, seed, r, layers=(0, 1), weights=("query", "value"), prefix="encoder.layer", A=None):
    """An adapter's folder, with drawn factors or with the rows of A that are given."""
    rng = numpy.random.default_rng(seed)
    updates = {f"{prefix}.{layer}.attention.self.{weight}": formats.Update(
        "linear", rng.standard_normal((r, D)) if A is None else A, rng.standard_normal((D, r)), 0.5)
        for layer in layers for weight in weights}
    config = lora.Config(r=r, lora_alpha=0.5 * r, target_modules=list(updates))
    formats.write_adapter(formats.SavedAdapter(updates, config), folder)
    return folder


@pytest.fixture
def given(tmp_path):
    """The flags of a run on folders: the small adapter's rows are the first of the large one's."""
    config = models.BertConfig(vocab_size=9, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                               max_position_embeddings=8)
    models.save(models.Bert(config, rng=0), tmp_path / "model")
    rows = numpy.linalg.qr(numpy.random.default_rng(0).standard_normal((D, 8)))[0].T
    return ["--model", tmp_path / "model", "--small", saved(tmp_path / "small", 1, 3, A=rows[:3]),
            "--large", saved(tmp_path / "large", 2, 8, A=rows), "--again", saved(tmp_path / "again", 3, 8), "--layer", 1]


def test_says_what_it_does(finished):
    done, report, folder = finished
    assert [line[:2] for line in done.stdout.splitlines() if line[1:3] == ". "] == ["1.", "2.", "3."]
    assert widest(done.stdout) <= 80 and widest(done.stderr or ".") <= 80
    assert "Warning" not in done.stderr and report["status"] == "finished"
    for figure in ("6.91", "0.32", "21.67", "0.02", "3.57", "1.90", "37.71", "0.33", "2106.09685", "61.95"):
        assert figure in words(done.stdout)
    assert {name: one["r"] for name, one in report["adapters"].items()} == {"small": 2, "large": 16, "again": 16}
    assert [(one["layer"], one["weight"]) for one in report["similarities"]] == [
        (0, "query"), (0, "value"), (1, "query"), (1, "value")]


def test_trained_adapters_share_more_than_random_matrices(finished):
    _, report, _ = finished
    for pair in ("small_large", "two_seeds"):
        own, random = (numpy.mean([numpy.array(one[pair]["V"][key])[:2].mean() for one in report["similarities"]])
                       for key in ("grid", "random"))
        assert own > random + 0.05, pair


def test_folders_of_adapters(given, demo):
    code, report = demo(*given)
    assert code == 0
    for one in report["similarities"]:
        grid = numpy.array(one["small_large"]["A"]["grid"])
        assert grid.shape == (3, 8) and numpy.allclose(grid[:, -1], 1.0)  # contained
        assert numpy.array(one["two_seeds"]["A"]["random"]).shape == (8, 8)
        assert numpy.allclose(numpy.array(one["two_seeds"]["V"]["grid"])[-1, -1],
                              numpy.array(one["two_seeds"]["A"]["grid"])[-1, -1])  # the row space is the same
    found = next(one for one in report["amplification"] if (one["layer"], one["weight"]) == (1, "value"))
    update = formats.read_adapter(given[3]).updates["encoder.layer.1.attention.self.value"]
    W = models.load(given[1]).encoder.layer[1].attention.self.value.weight.numpy().astype("float64")
    delta = update.s * update.B @ update.A
    U, _, Vt = numpy.linalg.svd(delta)
    inside = numpy.linalg.norm(U[:, :3].T @ W @ Vt[:3].T)
    assert found["small"]["factor"] == pytest.approx(numpy.linalg.norm(delta) / inside, rel=1e-6)
    assert found["small"]["along_weight"] == pytest.approx(numpy.linalg.norm(numpy.linalg.svd(W)[1][:3]), rel=1e-6)


def test_a_run_that_is_repeated(given, demo):
    one, two, other = (demo(*given, "--seed", seed)[1] for seed in (3, 3, 4))
    assert one["similarities"] == two["similarities"] != other["similarities"]  # of the random ones
    assert one["amplification"] == other["amplification"]


@pytest.mark.parametrize("changes, text", [
    ({"--layer": 7}, "--layer 7: the adapters share the layers 0, 1"),
    ({"--small": "nowhere"}, "nowhere"),
    ({"--model": "nowhere.whl"}, "No such file"),
    ({"--large": "others"}, "no update of a query or a value"),
    ({"--again": "apart"}, "no layer in common"),
    ({"--small": "other_model"}, "is it another model?"),
])
def test_folders_that_do_not_fit(changes, text, given, demo, tmp_path, capsys):
    saved(tmp_path / "others", 1, 3, weights=("dense",))
    saved(tmp_path / "apart", 1, 3, layers=(5,))
    saved(tmp_path / "other_model", 1, 3, prefix="transformer.layer")
    flags = dict(zip(given[::2], given[1::2]))
    flags.update({name: tmp_path / value if isinstance(value, str) else value for name, value in changes.items()})
    code, report = demo(*(item for pair in flags.items() for item in pair))
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and report["status"] == "failed" and text in line and "Traceback" not in line


@pytest.mark.parametrize("flags, text", [
    ((), "missing: --model, --small, --large, --again. film_reviews.py makes the adapters"),
    (("--model", "x", "--large", "y"), "missing: --small, --again."),
    (("--quick", "--small", "x"), "--quick trains its own adapters: leave out --small, or --quick"),
    (("--quick", "--layer", -1), "--layer must not be negative, got -1"),
    (("--quick", "--seed", -1), "--seed must not be negative"),
])
def test_wrong_flag_gives_one_line_and_code_2(flags, text, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and text in line and not (tmp_path / "out").exists()


def test_picture_or_one_line_about_it(finished):
    done, _, folder = finished
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
        assert done.stdout.endswith("report.json and report.png\n")
    else:
        assert "report.png" not in os.listdir(folder) and "python -m pip install matplotlib" in done.stdout
