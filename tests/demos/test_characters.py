"""demos/characters.py as a user runs it: adapters know their texts, and what is kept writes the same again."""
import functools
import importlib.util
import io
import json
import os
import shlex
import sys

import demo_runs
import numpy
import pytest
from demo_runs import inside, on_terminal, report_in, widest, words

import minilora
from minilora import formats, lora, models

SMALL = ("--width", 16, "--layers", 1, "--context", 64, "--steps", 60, "--steps-lora", 40, "--batch-size", 8, "--lr", 0.03,
         "--lr-lora", 0.05, "--r", 4, "--length", 50, "--begin", "the ")
WORDS = {"tales": "the cat and a dog sat on mat , then ran home .".split(), "laws": "NO ONE IS HELD TO IT ;".split(),
         "code": "def f(x): y = x + 1".split()}

command = functools.partial(demo_runs.command, "characters")
run = functools.partial(demo_runs.run, "characters")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags for three texts of few words each; the first has some of the others' words too, and so all letters."""
    folder, rng = tmp_path_factory.mktemp("texts"), numpy.random.default_rng(0)
    for name, some in {**WORDS, "tales": 4 * WORDS["tales"] + WORDS["laws"] + WORDS["code"]}.items():
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(some, 1500)) + "\n")
    return ("--text", folder / "tales.txt", "--style", folder / "laws.txt", "--style", folder / "code.txt")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    return inside("characters", monkeypatch, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new" / "folder"
    done = run(*SMALL, *files, "--out", folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def test_says_what_it_does(finished):
    done, report, _ = finished
    assert [line[:2] for line in done.stdout.splitlines() if line[1:3] == ". "] == [f"{i}." for i in range(1, 7)]
    assert "1 layers of width 16, 60 steps, then LoRA of rank 4, 40 steps for each text, float32 on cpu" in words(done.stdout)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("  cd ", "wrote "))]  # a path is as it is
    assert widest("\n".join(lines)) <= 80 and widest(done.stderr or ".") <= 80
    for one in report["written"]:
        assert f"{one['name']}:\n    the " in done.stdout and one["text"][:20].split("\n")[0] in done.stdout
    assert "unchanged to the last bit: yes" in done.stdout and "has its own bits again: yes" in words(done.stdout)


def test_picture_or_one_line_about_it(finished):
    done, _, folder = finished
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG") and "report.png" in done.stdout
    else:
        assert not (folder / "report.png").exists() and "python -m pip install matplotlib" in done.stdout
    assert sorted(os.listdir(folder))[:3] == ["base", "code", "laws"]


def test_each_adapter_knows_its_text_best(finished):
    _, report, _ = finished
    bits = report["bits"]
    assert list(bits) == ["base", "laws", "code", "half of each"]
    for name, other in (("laws", "code"), ("code", "laws")):
        assert bits[name][name] == min(row[name] for row in bits.values()) < bits["base"][name] - 0.5
        assert bits[name][name] < bits["half of each"][name] < bits[other][name]
    assert bits["base"]["tales"] == min(row["tales"] for row in bits.values()) < 2.8


def test_a_person_sees_the_style(finished):
    _, report, _ = finished
    texts = {one["name"]: one["text"] for one in report["written"]}
    capitals, marks = ({name: sum(c in some for c in text) / len(text) for name, text in texts.items()}
                       for some in ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "=()+:1"))
    assert capitals["laws"] > 0.3 > 0.15 > capitals["base"] and marks["code"] > marks["base"] + 0.03


def test_merged_weights_and_two_users(finished):
    _, report, _ = finished
    assert report["merged"]["back"] is True and report["merged"]["moved"] is True
    texts = {one["name"]: one["text"] for one in report["written"]}
    assert report["merged"]["same_text"] == (texts["laws"] == texts["laws, merged into the weights"])
    assert report["users"]["users"] == ["laws", "code"] and len(set(report["users"]["texts"])) == 2
    if report["users"]["alike"][0]:  # row 0 of a batch draws as the text alone
        assert report["users"]["texts"][0] == texts["laws"]
    assert report["base"]["fingerprint"] == report["base"]["fingerprint_after"]


def test_what_is_kept_writes_the_same_again(finished):
    _, report, folder = finished
    tokenizer = json.loads((folder / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    letters = list(tokenizer)
    model = models.load(folder / "base")
    for name in ("laws", "code"):
        formats.load_adapter(model, folder / name, name)
    for name, active in (("base", []), ("laws", ["laws"]), ("code", ["code"]), ("half of each", ["laws", "code"])):
        lora.activate(model, *active, weights=[0.5, 0.5] if len(active) == 2 else None)
        made = models.generate(model, [tokenizer[c] for c in "the "], 50, temperature=0.5, seed=0)
        text = next(one["text"] for one in report["written"] if one["name"] == name)
        assert "".join(letters[i] for i in made.ids[0]) == text
    assert report["bytes"]["laws"] == (folder / "laws" / "adapter_model.safetensors").stat().st_size


def test_the_line_to_go_on_with_works(finished, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    from minilora.cli.main import main

    done, report, folder = finished
    line = done.stdout[done.stdout.index("  minilora generate"):].split("\n\n")[0].replace("\\\n", " ")
    monkeypatch.chdir(folder)
    given = shlex.split(line)[1:]
    assert given[:4] == ["generate", "base", "laws=0.5", "code=0.5"]
    assert main([*given[:4], "--prompt", "the ", "--temp", "0.5", "--max-tokens", "50", "--seed", "0", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out == next(one["text"] for one in report["written"] if one["name"] == "half of each") + "\n"


def test_report_holds_the_run(finished):
    _, report, _ = finished
    assert report["status"] == "finished" and report["device"] == "cpu" and report["seconds"] > 0.0
    assert report["versions"]["minilora"] == minilora.__version__ and report["config"]["width"] == 16
    assert [text["name"] for text in report["texts"]] == ["tales", "laws", "code"]
    assert report["base"]["training"]["losses"][-1][0] == 60
    weights = models.Llama(models.LlamaConfig(
        vocab_size=report["alphabet"], hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=40, max_position_embeddings=64, tie_word_embeddings=True), rng=0)
    assert report["base"]["weights"] == report["base"]["training"]["trained"] == sum(p.size for p in weights.parameters())
    assert report["adapters"]["laws"]["trained"] == 4 * (4 * (16 + 16) + 3 * (16 + 40))


def test_quick_runs_on_the_texts_that_python_brings(tmp_path, monkeypatch):
    done = run("--quick", "--steps", 10, "--steps-lora", 5, "--out", tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    report = report_in(tmp_path)
    assert [text["name"] for text in report["texts"]] == ["documentation", "licences", "source-code"]
    assert all(text["characters"] > 10_000 for text in report["texts"]) and 80 <= report["alphabet"] < 300
    assert "documentation" in done.stdout and "pre-training" in done.stderr


def test_one_style_has_the_base_as_its_neighbour(demo, files, capsys):
    code, report = demo(*SMALL, *files[:4], "--steps", 2, "--steps-lora", 2)
    assert code == 0 and report["users"]["users"] == ["laws", "__base__"] and list(report["bits"]) == ["base", "laws"]
    assert "minilora generate base laws=1 " in capsys.readouterr().out


def test_the_stream_wraps_and_keeps_line_ends(demo):
    out = io.StringIO()
    stream = demo.module.pages.Stream("begin", out)
    for character in "x" * 80 + "\nnew":
        stream.write(character)
    stream.end()
    assert out.getvalue() == "    begin" + "x" * 71 + "\n    " + "x" * 9 + "\n    new\n\n"


def test_texts_of_all_kinds(demo, tmp_path):
    tidy, Alphabet = demo.module.tidy, demo.module.Alphabet
    assert tidy("a\tb\r\n\n\n\n\x1b[2Jc\x00é" + " " * 30 + "d") == "a   b\n\n[2Jcé        d\n"
    alphabet = Alphabet(["ab" * 10, "é" * 9, "a\n" * 10])
    assert alphabet.characters == ["\N{REPLACEMENT CHARACTER}", "\n", "a", "b"]
    assert alphabet.encode("abé\n") == [2, 3, 0, 1] and alphabet.decode([2, 3, 1]) == "ab\n"
    (tmp_path / "my style.v2.txt").write_text("")
    assert demo.module.name_of(tmp_path / "my style.v2.txt") == "my-style.v2" and demo.module.name_of("...") == "text"


def test_without_the_help_texts_docstrings_do(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert len(demo.module.documentation()) > 10_000


@pytest.mark.parametrize(("flags", "expected"), [
    (("--width", 12), ["--width 12 must be a multiple of 8"]), (("--width", 0, "--steps", 0), ["--width must", "--steps must"]),
    (("--temperature", 0), ["--temperature must be a finite number above 0"]), (("--begin", ""), ["--begin is empty"]),
    (("--style", "a", "--style", "b", "--style", "c"), ["--style is there 3 times"]), (("--seed", -1), ["--seed"]),
    (("--lr", "nan"), ["--lr must be"]),
    (("--length", 254, "--context", 256), ["--length 254 and --begin are longer than --context 256", "Give --length 253 or"]),
])
def test_wrong_flag_gives_one_line_and_code_2(flags, expected, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("characters.py: error: ") and all(word in line for word in expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("make", "expected"), [
    (lambda folder: ("--style", folder / "none.txt"), "none.txt: cannot be read: No such file"),
    (lambda folder: ("--style", folder / "short.txt"), "characters are too few to learn from"),
    (lambda folder: ("--style", folder / "short.txt", "--style", folder / "sub" / "short.txt"), "no two may have the same"),
    (lambda folder: ("--style", folder / "base.txt"), "none may be called base"),
    (lambda folder: ("--batch-size", 100_000), "--batch-size 100000 is more than the "),
])
def test_texts_that_will_not_do(make, expected, demo, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for name in ("short.txt", "base.txt", "sub/short.txt"):
        (tmp_path / name).write_text("too short")
    with pytest.raises(FileNotFoundError):  # no report is begun
        demo("--quick", *make(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("characters.py: error: ") and expected in line


def test_interrupt_leaves_a_report(files, tmp_path):
    """On a terminal, which hears of a training at once; elsewhere the first line takes its ten seconds."""
    code, shown = on_terminal(command(*SMALL, *files, "--steps", 100_000, "--out", tmp_path), 80, interrupt_at=b"pre-training")
    assert code == 130 and shown.splitlines()[-1].split("\r")[-1] == "characters.py: interrupted"
    report = report_in(tmp_path)
    assert report["status"] == "interrupted" and len(report["texts"]) == 3 and "bits" not in report
