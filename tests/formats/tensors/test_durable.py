"""Files and folders that are replaced: the old one or the new one, whatever happens."""
import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora.errors import FileError
from minilora.formats import open_state, save_state
from minilora.formats.tensors import durable, exchange, temporary
from minilora.formats.tensors.durable import recover_folder, replace_file, replace_folder

SCRIPT = Path(__file__).with_name("saving.py")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@pytest.fixture(params=["exchange", "steps"])
def either_way(request, monkeypatch):
    """Folders exchanged in one step, and in two as where the system cannot."""
    if request.param == "steps":
        monkeypatch.setattr(durable, "exchange", lambda a, b: False)
    return request.param


def write(path, text):
    with replace_file(path) as file:
        file.write(text.encode())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


SAVERS = ["file", "shards", "either", "folder", "folder_in_steps"]


def run(way, number, folder, savers=SAVERS):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[3])}
    done = subprocess.run([sys.executable, SCRIPT, way, str(number), folder, *savers], capture_output=True, text=True,
                          env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(savers)


@needs_fork
@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_call(tmp_path, step):
    run("every", step, tmp_path)


@needs_fork
@pytest.mark.parametrize("times", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_times(tmp_path, times):
    run("times", times, tmp_path)


@needs_fork
@pytest.mark.parametrize("times", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_read_while_it_is_replaced(tmp_path, times):
    run("read", times, tmp_path, ["folder", "folder_in_steps", "shards"])


def test_read_steadily_passes_on_what_the_reader_says(tmp_path):
    with pytest.raises(KeyError):
        durable.read_steadily(tmp_path, lambda: {}["a"])
    with pytest.raises(FileNotFoundError):
        durable.read_steadily(tmp_path / "nothing", lambda: os.stat(tmp_path / "nothing"))


def test_the_order_that_outlives_a_power_cut(tmp_path, monkeypatch):
    """The numbers are on the disk before they get the name, and the name before the call returns."""
    calls = []

    def noted(name):
        function = getattr(os, name)

        def call(what, *more):
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) and os.path.exists("/proc") else what
            calls.append((name, "folder" if os.path.isdir(path) else "file"))
            return function(what, *more)
        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace"):
        noted(name)
    write(tmp_path / "a", "new")
    assert calls == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]


def test_a_block_that_raises_changes_nothing(tmp_path, either_way):
    write(tmp_path / "a", "old")
    with replace_folder(tmp_path / "f") as new:
        (new / "x").write_text("old")
    for error in (ValueError, KeyboardInterrupt, FileNotFoundError):
        with pytest.raises(error):
            with replace_file(tmp_path / "a") as file:
                file.write(b"half")
                raise error("of the caller")
        with pytest.raises(error):
            with replace_folder(tmp_path / "f") as new:
                (new / "x").write_text("half")
                raise error("of the caller")
    assert contents(tmp_path) == {"a": "old", "f/x": "old"} and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("number, says", [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "error")])
@pytest.mark.parametrize("name", ["fsync", "open", "replace", "rename"])
def test_what_the_system_refuses(tmp_path, monkeypatch, number, says, name, either_way):
    path, folder = tmp_path / "a.safetensors", tmp_path / "f"
    save_state(path, {"a": np.ones(3)})
    with replace_folder(folder) as new:
        (new / "x").write_text("old")
    before = path.read_bytes()

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number), *arguments[:1] if isinstance(arguments[0], (str, Path)) else ())

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        if name != "rename":
            with pytest.raises(FileError, match=says) as caught:
                save_state(path, {"a": np.zeros(3)})
            assert str(path) in str(caught.value) and caught.value.errno == number
        if name == "rename":
            patch.setattr(durable, "exchange", refuse if either_way == "exchange" else durable.exchange)
        if name != "replace":
            with pytest.raises(FileError, match=says) as caught:
                with replace_folder(folder) as new:
                    (new / "x").write_text("new")
            assert str(folder) in str(caught.value)
    assert path.read_bytes() == before and contents(folder) == {"x": "old"}
    save_state(path, {"a": np.zeros(3)})
    with replace_folder(folder):
        pass  # whatever is left, because removing it was refused too, is removed now
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "f"]


def test_a_disk_that_fills_up_while_writing(tmp_path):
    """A limit on the size of files: every number of bytes from which on the file cannot grow."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    save_state(path, {"a": np.ones(3)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 7, 8, 100, 4096, 100_000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(FileError) as caught:
                save_state(path, {"a": np.zeros(20_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "larger than the system allows" in str(caught.value)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for path, match in [("folder", "this is a folder"), ("nothing/a", "no such file or folder"),
                        ("file/a", "is a file, not a folder"), ("x" * 300, "the name is too long"), ("a\0b", "zero byte")]:
        with pytest.raises(FileError, match=match):
            write(f"{tmp_path}/{path}", "new")
    with pytest.raises(FileError, match="the path is empty"):
        write("", "new")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileError, match="this is a pipe or device"):
            write(tmp_path / "pipe", "new")
        with pytest.raises(FileError, match="this is no file but a pipe or device"):
            open_state(tmp_path / "pipe")
        os.unlink(tmp_path / "pipe")
    for path, match in [("file", "this is a file"), ("file/a", "a file is in the way"), ("y" * 300, "too long")]:
        with pytest.raises(FileError, match=match):
            with replace_folder(tmp_path / path):
                pass
    monkeypatch.chdir(tmp_path / "folder")
    for path in (".", "..", tmp_path / "folder"):
        with pytest.raises(FileError, match="current working folder"):
            with replace_folder(path):
                pass
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(FileError, match="it is mounted: save into a folder inside it"):
        with replace_folder(tmp_path / "mounted"):
            pass
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests as root may write everywhere
    with pytest.raises(FileError, match="is not to be written to: save into a folder inside it"):
        with replace_folder(tmp_path / "other"):
            pass
    with pytest.raises(FileError, match="the file is read-only"):
        write(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "old"} and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_long_name_can_be_written(tmp_path):
    path = tmp_path / ("é" * 120 + "x" * 15)
    for text in ("1", "2"):
        write(path, text)
        with replace_folder(tmp_path / ("f" * 255)) as new:
            (new / "x").write_text(text)
    assert path.read_text() == "2" and len(os.listdir(tmp_path)) == 2


def test_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        write(tmp_path / "a", "1")
        with replace_folder(tmp_path / "f"):
            pass
    finally:
        os.umask(mask)

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert (mode(tmp_path / "a"), mode(tmp_path / "f")) == (0o640, 0o750)
    (tmp_path / "a").chmod(0o604)
    (tmp_path / "f").chmod(0o705)
    write(tmp_path / "a", "2")
    with replace_folder(tmp_path / "f"):
        pass
    assert (mode(tmp_path / "a"), mode(tmp_path / "f")) == (0o604, 0o705)


def test_a_link_is_followed(tmp_path, either_way):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "links").symlink_to(tmp_path / "real", target_is_directory=True)
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "new"
    with replace_folder(tmp_path / "links") as folder:
        (folder / "a").write_text("newer")
    assert (tmp_path / "links").is_symlink() and (tmp_path / "link").read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["link", "links", "real"]


def test_a_new_folder_takes_over_what_others_put_there(tmp_path, either_way):
    folder = tmp_path / "runs" / "a"
    with replace_folder(folder) as new:
        (new / "weights").write_text("old")
        (new / "model-00001-of-00002").write_text("old")
        (new / "second").mkdir()
        (new / "second" / "weights").write_text("second")
    (folder / "log").write_text("begin;")
    (folder / "link").symlink_to("log")
    (folder / "gone").symlink_to("nowhere")
    with open(folder / "log", "a") as log:
        with replace_folder(folder, drop=["model-*"]) as new:
            assert os.listdir(new) == [] and new.parent == folder.parent
            (new / "weights").write_text("new")
            (folder / "late").write_text("while the block runs")
        log.write("end")
    (folder / "gone").unlink()
    assert contents(folder) == {"weights": "new", "log": "begin;end", "link": "begin;end", "second/weights": "second",
                                "late": "while the block runs"}
    assert (folder / "link").is_symlink() and os.listdir(tmp_path / "runs") == ["a"]


def test_what_is_written_while_the_folders_change_places(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    whole = durable._put_in_place

    def late(new, target):
        (target / "late").write_text("after all was taken over")
        return whole(new, target)

    monkeypatch.setattr(durable, "_put_in_place", late)
    with replace_folder(folder) as new:
        (new / "x").write_text("new")
    assert contents(folder) == {"late": "after all was taken over", "x": "new"}


def test_a_disk_without_links(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_text("kept")
    monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
    with replace_folder(tmp_path / "a"):
        pass
    assert contents(tmp_path / "a") == {"log": "kept"}


def test_a_run_that_is_alive_keeps_its_temporary_file(tmp_path, either_way):
    with replace_file(tmp_path / "a") as slow, replace_folder(tmp_path / "f") as slow_folder:
        slow.write(b"slow")
        (slow_folder / "x").write_text("slow")
        write(tmp_path / "a", "quick")
        with replace_folder(tmp_path / "f") as quick:
            (quick / "x").write_text("quick")
            (quick / "y").write_text("quick")
        assert (tmp_path / "a").read_text() == "quick" and (tmp_path / "f" / "x").read_text() == "quick"
    assert contents(tmp_path) == {"a": "slow", "f/x": "slow", "f/y": "quick"} and len(os.listdir(tmp_path)) == 2


def test_leftovers(tmp_path, monkeypatch):
    left = [tmp_path / f".a.{digit * 16}.{ending}" for digit, ending in [("0", "tmp"), ("1", "old"), ("2", "new")]]
    for path in left[:2]:
        path.write_text("half")
    left[2].mkdir()
    (left[2] / "x").write_text("half")
    others = [tmp_path / name for name in (".a.tmp", ".ab.0000000000000000.tmp", ".a.000000000000000g.tmp",
                                           "a.0000000000000000.tmp")]
    for path in others:
        path.write_text("not ours")
    with monkeypatch.context() as patch:
        patch.setattr(temporary, "_lock", lambda descriptor: None)  # no locks here: what is young may be somebody's work
        write(tmp_path / "a", "1")
        assert all(path.exists() for path in left)
        for path in left:
            os.utime(path, (0, 0))
        write(tmp_path / "a", "2")
        assert not any(path.exists() for path in left)
    left[0].write_text("half")
    write(tmp_path / "a", "3")
    assert not left[0].exists() and all(path.exists() for path in others)


def test_a_replacement_that_was_killed_between_its_steps(tmp_path):
    """The old name is aside, the new folder complete: whoever reads or saves first finishes it."""
    old, new = tmp_path / f".f.{'0' * 16}.old", tmp_path / f".f.{'0' * 16}.new"
    for reader in (recover_folder, lambda path: replace_folder(path).__enter__() and None):
        for folder, text in ((old, "old"), (new, "new")):
            folder.mkdir()
            (folder / "x").write_text(text)
        reader(tmp_path / "f")
        assert contents(tmp_path / "f") == {"x": "new"} and not new.exists()
        (tmp_path / "f" / "x").unlink()
        (tmp_path / "f").rmdir()
        for path in tmp_path.iterdir():
            temporary.shutil.rmtree(path)
    assert recover_folder(tmp_path / "nothing") == tmp_path / "nothing" and not (tmp_path / "nothing").exists()
    assert recover_folder(tmp_path / "no" / "parent") == tmp_path / "no" / "parent"


def test_the_second_step_that_fails_is_taken_back(tmp_path, monkeypatch):
    with replace_folder(tmp_path / "f") as new:
        (new / "x").write_text("old")
    monkeypatch.setattr(durable, "exchange", lambda a, b: False)
    rename = os.rename

    def failing(a, b):
        if Path(b) == tmp_path / "f" and Path(a).suffix == ".new":
            raise OSError(errno.EIO, "broken")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(FileError, match="broken"):
        with replace_folder(tmp_path / "f") as new:
            (new / "x").write_text("new")
    assert contents(tmp_path) == {"f/x": "old"} and os.listdir(tmp_path) == ["f"]


def test_exchange(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    done = exchange.exchange(tmp_path / "a", tmp_path / "b")
    assert done or sys.platform not in ("linux", "darwin")
    assert os.listdir(tmp_path / "a") == ["b" if done else "a"]
    if done:
        with pytest.raises(OSError) as caught:
            exchange.exchange(tmp_path / "a", tmp_path / "nothing")
        assert caught.value.errno == errno.ENOENT


def test_a_folder_is_replaced_under_the_eyes_of_a_reader(tmp_path):
    with replace_folder(tmp_path / "f") as new:
        save_state(new / "a.safetensors", {"a": np.ones(3)})
    state = open_state(tmp_path / "f" / "a.safetensors")
    with replace_folder(tmp_path / "f") as new:
        save_state(new / "a.safetensors", {"a": np.zeros(3)})
    assert state["a"].sum() == 3 and open_state(tmp_path / "f" / "a.safetensors")["a"].sum() == 0
    assert re.fullmatch(r"\w+", os.listdir(tmp_path)[0])
