"""What holds for every demo: where it may be started, what may be in its way, and how it ends."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import demo_runs
import pytest
from demo_runs import DEMOS, ROOT, inside, report_in, widest

TINY = {
    "synthetic_shift": ("--n", 20, "--d-in", 4, "--d-out", 3, "--epochs", 2, "--batch-size", 10),
    "attention_lora": ("--tokens", 3, "--content", 2, "--n", 20, "--r", 2, "--steps", 2, "--batch-size", 4),
    "check_gradients": ("--quick",),
    "rank_sweep": ("--n", 20, "--d-in", 4, "--d-out", 3, "--k", 1, "--steps", 2),
    "characters": ("--width", 8, "--layers", 1, "--context", 64, "--most", 9000, "--steps", 2, "--steps-lora", 2,
                   "--batch-size", 2, "--r", 1, "--length", 3),
    "digits_shift": ("--width", 4, "--r", 1, "--steps", 1, "--batch-size", 10),
    "film_reviews": ("--quick", "--epochs", 1),
    "qlora": ("--quick", "--epochs", 1),
    "rank_analysis": ("--quick",),
    "intrinsic_dimension": ("--quick", "--width", 2, "--sizes", 1, "--seeds", 1, "--doublings", 0, "--steps", 2),
    "image_styles": ("--quick", "--base-steps", 1, "--steps", 1, "--sampler-steps", 1),
}
APART = ("digits_shift", "film_reviews", "image_styles", "intrinsic_dimension", "qlora", "rank_analysis")  # tested apart
TRAINING = [name for name in TINY if name not in ("check_gradients", *APART)]
QUICK = ("synthetic_shift", *TINY["synthetic_shift"])  # of all demos the one that is done first


def started(arguments, folder, **settings):
    environment = {**demo_runs.command("check_gradients")["env"], **settings}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, text=True, capture_output=True,
                          timeout=120)


@pytest.fixture
def unseen(tmp_path):
    """A folder that hides matplotlib: a picture takes longer than all the rest."""
    (tmp_path / "hidden").mkdir()
    return demo_runs.hide("matplotlib", tmp_path / "hidden")


def test_the_scripts_are_at_the_top_and_nothing_else():
    assert sorted(path.stem for path in DEMOS.glob("*.py")) == sorted(TINY)
    for name in TINY:
        assert (DEMOS / "showing" / f"{name}.py").exists() and (ROOT / "tests" / "demos" / f"test_{name}.py").exists()


@pytest.mark.parametrize("way", [
    "from the root", "from its folder", "from elsewhere", "as a module", "as a module from elsewhere"])
def test_starts_from_anywhere(way, tmp_path, unseen):
    folder = {"from the root": ROOT, "from its folder": DEMOS, "as a module": DEMOS}.get(way, tmp_path)
    name, *flags = QUICK
    script = ["-m", name] if "module" in way else [os.path.relpath(DEMOS / f"{name}.py", folder)]
    path = os.pathsep.join(map(str, (unseen, ROOT, *([DEMOS] if way == "as a module from elsewhere" else []))))
    done = started([*script, *flags, "--out", tmp_path / "out"], folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert report_in(tmp_path / "out")["status"] == "finished"


def test_another_package_of_that_name_is_in_nobodys_way(tmp_path, unseen):
    """A script's own folder comes first, and `showing` is a package with an __init__.py: a folder without would come last."""
    (unseen / "showing").mkdir()
    (unseen / "showing" / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    done = demo_runs.run(*QUICK, "--out", tmp_path / "out", path=[unseen])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", TINY)
def test_without_minilora_it_says_what_to_type(name, tmp_path):
    shutil.copytree(DEMOS, tmp_path / "demos")
    demo_runs.hide("minilora", tmp_path)
    done = started([tmp_path / "demos" / f"{name}.py"], tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("minilora is not installed: run `python -m pip install -e .` in the folder that holds setup.cfg\n")


def test_no_locale_and_letters_it_has_not(tmp_path, unseen):
    done = subprocess.run(
        [sys.executable, str(DEMOS / "check_gradients.py"), "--quick", "--out", os.fsencode(tmp_path / "Übung → 1")],
        env={**demo_runs.command("check_gradients", path=[unseen])["env"], "LC_ALL": "C", "PYTHONIOENCODING": "ascii",
             "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, capture_output=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert b"wrote " in done.stdout and done.stdout.isascii()
    assert report_in(tmp_path / "Übung → 1")["status"] == "passed"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder_is_one_line_and_code_2(tmp_path):
    code = f"""
import os, shutil, sys, tempfile
sys.path[:0] = {[str(DEMOS), str(ROOT)]}
import check_gradients as demo
sys.modules["matplotlib"] = None
sys.argv = ["check_gradients.py", "--quick", "--out", sys.argv[1]]
demo.main()  # loads all that it needs, which the other user may not be allowed to read
folder, owner = tempfile.mkdtemp(), os.geteuid()
os.chmod(folder, 0o555)
if owner == 0:
    os.seteuid(65534)  # whom permissions hold for
sys.argv = ["check_gradients.py", "--quick", "--out", folder]
code = demo.console.run(demo.main, "check_gradients.py")
os.seteuid(owner)
print(os.listdir(folder))
os.chmod(folder, 0o755)
shutil.rmtree(folder)
sys.exit(code)
"""
    done = started(["-c", code, tmp_path / "first"], tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2, "[]"), done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(r"check_gradients\.py: error: --out (\S+): cannot write there: "
                    r".*: Permission denied: chmod u\+w \1, or choose another folder", line)


@pytest.mark.parametrize("name", TRAINING)
def test_out_that_is_a_file_stays_one(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("a file")
    call = inside(name, monkeypatch, tmp_path / "out")
    with pytest.raises(NotADirectoryError):  # of the test, which looks for a report
        call(*TINY[name])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out " in line and "a file has this name: move it away, or choose another folder" in line
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("name", [name for name in TINY if name not in APART])
def test_a_second_run_into_the_same_folder_replaces_the_first(name, tmp_path, monkeypatch, capsys):
    call = inside(name, monkeypatch, tmp_path)
    first = call(*TINY[name])
    (tmp_path / "report.png").write_bytes(b"of the first run")
    second = call(*TINY[name], "--seed", 5)
    assert (first[0], second[0]) == (0, 0) and (first[1]["config"]["seed"], second[1]["config"]["seed"]) == (0, 5)
    files = [found.name for found in tmp_path.iterdir() if found.is_file()]  # characters.py keeps models in folders
    assert files == ["report.json"]  # without a picture that is not its own
    shown = capsys.readouterr()
    assert widest(shown.out) <= 80 and widest(shown.err or ".") <= 80


@pytest.mark.parametrize("name", TRAINING)
def test_the_line_that_a_divergence_says_to_type_works(name, tmp_path, monkeypatch, capsys):
    call = inside(name, monkeypatch, tmp_path)
    code, report = call(*TINY[name], "--lr", 1e30)
    assert code == 4 and report["status"].startswith("diverged: ")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    advice = shlex.split(re.search(r" Try: python (.*)$", line)[1])
    assert advice[0] == f"{name}.py" and advice[-2] == "--lr"
    code, report = call(*advice[1:])
    assert code == 0 and report["status"] == "finished"


def test_nan_in_the_middle_of_the_main_job(tmp_path, monkeypatch, capsys):
    call = inside("synthetic_shift", monkeypatch, tmp_path)
    mean_loss, seen = call.module.mean_loss, []

    def poisoned(*arguments):
        seen.append(mean_loss(*arguments))
        return float("nan") if len(seen) == 3 else seen[-1]
    monkeypatch.setattr(call.module, "mean_loss", poisoned)
    code, report = call(*TINY["synthetic_shift"], "--epochs", 10)
    err = capsys.readouterr().err.splitlines()
    assert code == 4 and "the loss is nan in epoch 3: a smaller --lr than 0.001 may help. It was " in err[-1]
    assert " in epoch 3; " in err[-1]  # the last batch of that epoch was finite
    assert err[-1].endswith(" --lr 0.0001") and report["pretraining"]["losses"] == seen[:2]


def test_what_is_blamed_for_a_divergence(monkeypatch):
    console = demo_runs.piece("console")
    monkeypatch.setattr(sys, "argv", ["demos/a demo.py", "--n", "3"])
    settings = {"lr": (0.1, 0.2, ""), "lora_alpha": (4.0, 8.0, "")}

    def gentler(lr, lora_alpha, quick=False):
        config = type("Config", (), {"lr": lr, "lora_alpha": lora_alpha, "quick": quick})
        return console.gentler(config, settings, "lr", "lora_alpha")
    line = "python 'demos/a demo.py' --n 3 "
    assert gentler(5.0, 4.0) == ("a smaller --lr than 5 may help", line + "--lr 0.1")
    assert gentler(0.2, 4.0, quick=True) == ("a smaller --lr than 0.2 may help", line + "--lr 0.02")
    assert gentler(0.1, -50.0) == ("a smaller --lora-alpha than -50 may help", line + "--lora-alpha 4")
    assert gentler(1.0, 5.0) == ("a smaller --lr than 1 and a smaller --lora-alpha than 5 may help",
                                 line + "--lr 0.1 --lora-alpha 4")


def test_the_picture_of_an_update_that_stayed_0(tmp_path):
    """With so large an alpha the gradients overflow, and Adam divides by infinity: nothing moves."""
    pytest.importorskip("matplotlib")
    done = demo_runs.run("synthetic_shift", *TINY["synthetic_shift"], "--lora-alpha", 1e30, "--out", tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr and (tmp_path / "report.png").exists()


def test_ctrl_c_leaves_a_report_of_the_checks_that_were_made(tmp_path, monkeypatch, capsys):
    call = inside("check_gradients", monkeypatch, tmp_path)

    def interrupt(problem):
        raise KeyboardInterrupt
    monkeypatch.setattr(call.module, "plant", interrupt)
    code, report = call("--quick")
    assert code == 130 and capsys.readouterr().err == "check_gradients.py: interrupted\n"
    assert report["status"] == "interrupted" and report["trained"]["passed"] and "planted" not in report


def test_a_title_is_broken_between_its_parts(monkeypatch):
    console = demo_runs.piece("console")
    text = "Synthetic shift: 10,000 rows, 1001 inputs, 1000 outputs, rank 1, float32 on cpu, seed 0"
    lines = console.title(text).split("\n")
    assert len(lines) == 2 and lines[1] == "seed 0" and " ".join(lines) == text
    long = "one: " + "word " * 30 + "end, two"
    assert max(map(len, console.title_lines(f"{long}\nthree", 40).split("\n"))) <= 40
    assert console.title_lines("one\ntwo", 40) == "one\ntwo"


def test_a_picture_has_few_bytes_and_its_colours(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from PIL import Image
    figure = Figure(figsize=(4, 3), dpi=100)
    figure.subplots().bar([1, 2], [1, 2], color=["#0072B2", "#D55E00"])
    (tmp_path / "drawn.png").write_bytes(demo_runs.piece("console").png_of(figure))
    with Image.open(tmp_path / "drawn.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors()}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0), (255, 255, 255)} <= colours and len(colours) <= 256


def lines_on(shown):
    """What stood on a terminal at one time or another, line by line; at a carriage return the cursor goes back."""
    return [line for row in shown.replace("\r\n", "\n").split("\n") for line in row.split("\r")]


# The demo, the flags of a run of a second or two, and the loss as its line of progress has it.
SMALL = ("--n", 300, "--d-in", 21, "--d-out", 20, "--batch-size", 30)
ON_TERMINALS = {"synthetic_shift": ((*SMALL, "--epochs", 60), r"epoch +\d+/60  (last batch|all data) +\d"),
                "rank_sweep": (TINY["rank_sweep"], r"loss \d")}


@pytest.mark.parametrize("name", ON_TERMINALS)
@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_shows_the_loss_and_no_line_wider_than_it_is(name, columns, tmp_path, unseen):
    flags, loss = ON_TERMINALS[name]
    begun = demo_runs.command(name, *flags, "--out", tmp_path, path=[unseen])
    code, shown = demo_runs.on_terminal(begun, columns, out=columns == 80)
    assert code == 0 and report_in(tmp_path)["status"] == "finished"
    lines = [line for line in lines_on(shown) if not line.startswith("wrote ")]
    assert max(map(len, lines)) <= columns
    assert any(re.search(loss, line) for line in lines)


def test_an_interrupt_and_an_error_on_a_terminal(tmp_path, unseen):
    slow = ("synthetic_shift", *SMALL, "--epochs", 10 ** 6, "--out", tmp_path)
    code, shown = demo_runs.on_terminal(demo_runs.command(*slow, path=[unseen]), 80, out=True, interrupt_at=b"last batch")
    assert code == 130 and lines_on(shown)[-2].strip() == "synthetic_shift.py: interrupted"  # alone on its line
    code, shown = demo_runs.on_terminal(demo_runs.command(*slow, "--lr", 1e30, path=[unseen]), 60)
    *lines, line = lines_on(shown)[:-1]
    assert code == 4 and max(map(len, lines)) <= 60 and re.match(r"  python \S+synthetic_shift\.py .* --lr 0\.001$", line)
