"""A report is on the disk whole or not at all: after a crash, a full disk, Ctrl-C; and JSON, whatever numbers it holds."""
import doctest
import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import demo_runs
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.errors import FileError

report = demo_runs.piece("report")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, limits and permissions of POSIX")


def child(code, *arguments):
    """Run code that has the module as `report`, in a process of its own."""
    path = [str(demo_runs.DEMOS), str(demo_runs.ROOT)]
    code = f"import os, signal, sys\nsys.path[:0] = {path}\nfrom showing import report\n{code}"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True, capture_output=True, timeout=60)


def test_doctest():
    assert doctest.testmod(report).attempted and not doctest.testmod(report).failed


def test_writes_and_replaces_and_leaves_nothing_beside(tmp_path):
    for data in (b"", b"one", b"two" * 100_000):
        report.write(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data and os.listdir(tmp_path) == ["file"]


@POSIX
def test_the_new_file_has_the_usual_permissions_and_a_link_stays_one(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    mask = os.umask(0o027)
    try:
        report.write(tmp_path / "link", b"new")
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o640


def test_order_on_the_disk(tmp_path, monkeypatch):
    """The bytes first, then the name, then the folder: in another order a crash could leave a name without bytes."""
    seen, fsync, replace = [], os.fsync, os.replace

    def sync(handle):
        seen.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def rename(source, target):
        assert Path(source).parent == Path(target).parent  # else it would be a copy
        seen.append("rename")
        replace(source, target)
    monkeypatch.setattr(report.os, "fsync", sync)
    monkeypatch.setattr(report.os, "replace", rename)
    report.write(tmp_path / "file", b"data")
    assert seen == (["file", "rename", "folder"] if os.name == "posix" else ["file", "rename"])


@POSIX
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_in_between_the_old_file_is_whole(moment, tmp_path):
    path = tmp_path / "report.json"
    report.save(path, {"run": "old"})
    old = path.read_bytes()
    done = child(f"""
report.os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
report.save(sys.argv[1], {{"run": "new", "numbers": list(range(100_000))}})
""", path)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert all(name == "report.json" or name.endswith(".part") for name in os.listdir(tmp_path))
    report.save(path, {"run": "next"})  # what was left behind is in nobody's way
    assert json.loads(path.read_text()) == {"run": "next"}


@POSIX
def test_a_file_that_gets_too_large_says_so_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    report.save(path, {"run": "old"})
    old = path.read_bytes()
    done = child("""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    report.save(sys.argv[1], {"run": "new", "numbers": list(range(100_000))})
except OSError as error:
    print(error)
""", path)
    assert done.stdout == f"cannot write {path}: File too large: raise the limit (ulimit -f unlimited)\n"
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize(("number", "cure"), [
    (errno.ENOSPC, "free some space (df -h {folder} shows it), or choose another folder"),
    (errno.EACCES, "chmod u+w {folder}, or choose another folder"), (errno.EROFS, "choose another folder"),
    (errno.EIO, "choose another folder")])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_disk_that_refuses_says_what_helps(number, cure, moment, tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(report.os, moment, fail)
    with pytest.raises(FileError) as stop:
        report.write(folder / "file", b"new")
    assert str(stop.value) == f"cannot write {folder / 'file'}: {os.strerror(number)}: " + cure.format(folder=f"'{folder}'")
    assert stop.value.__cause__.errno == number
    assert (folder / "file").read_bytes() == b"old" and os.listdir(folder) == ["file"]


@POSIX
def test_a_read_only_folder_is_found_before_the_work():
    done = child("""
import shutil, tempfile
folder = tempfile.mkdtemp()
os.chmod(folder, 0o555)
owner = os.geteuid()
if owner == 0:
    os.seteuid(65534)  # whom permissions hold for
try:
    with report.recording(os.path.join(folder, "report.json"), {}):
        print("worked")
except OSError as error:
    print(error)
os.seteuid(owner)
print(os.listdir(folder))
os.chmod(folder, 0o755)
shutil.rmtree(folder)
""")
    message, left = done.stdout.splitlines()
    assert "Permission denied: chmod u+w " in message and "report.json" in message and left == "[]", done.stderr


@pytest.mark.parametrize("path", ["file/report.json", "file/below/report.json", "folder"])
def test_a_path_that_cannot_be_is_found_before_the_work(path, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="move it away, or choose another folder"):
        with report.recording(tmp_path / path, {}):
            raise AssertionError("the work has begun")
    assert (tmp_path / "file").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_what_is_not_finite(tmp_path):
    report.save(tmp_path / "file", {
        "nan": math.nan, "inf": [math.inf, -math.inf], "f32": numpy.float32(0.5), "f16": numpy.float16("nan"),
        "long": numpy.longdouble(0.25), "i64": numpy.int64(7), "yes": numpy.bool_(True), "true": True, "none": None,
        "array": numpy.array([[1.0, numpy.nan], [2.0, 3.0]]), "0-d": numpy.array(4), "empty": numpy.zeros((0, 2)),
        "text": numpy.str_("é\udcff"), "tuple": (1, (2,)), "path": Path("a"), numpy.int64(3): 1})
    assert json.loads((tmp_path / "file").read_bytes().decode("ascii")) == {
        "nan": None, "inf": [None, None], "f32": 0.5, "f16": None, "long": 0.25, "i64": 7, "yes": True, "true": True,
        "none": None, "array": [[1.0, None], [2.0, 3.0]], "0-d": 4, "empty": [], "text": "é\udcff", "tuple": [1, [2]],
        "path": "a", "3": 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)


def same(value, read):
    """Whether a value came back, by the stated rule."""
    if isinstance(value, dict):
        return value.keys() == read.keys() and all(same(value[key], read[key]) for key in value)
    if isinstance(value, list):
        return len(value) == len(read) and all(map(same, value, read))
    if isinstance(value, float) and not math.isfinite(value):
        return read is None
    return type(value) is type(read) and value == read


@given(value=st.dictionaries(st.text(), VALUES))
def test_everything_comes_back(value):
    def forbidden(constant):
        raise AssertionError(f"{constant} is not JSON")
    text = json.dumps(report.plain(value), allow_nan=False)
    assert same(value, json.loads(text, parse_constant=forbidden))


@pytest.mark.parametrize(("value", "words"), [
    ({"a": [1, {"b": 2j}]}, r"report\['a'\]\[1\]\['b'\] is a builtins.complex"),
    ({"a": numpy.array([1j])}, r"report\['a'\]\[0\] is a builtins.complex"),
    ({"x": {1, 2}}, r"report\['x'\] is a builtins.set"),
    ({"when": numpy.datetime64("2026-01-01")}, r"report\['when'\] is a numpy.datetime64"),
    ({1.5: 0}, r"report has the key 1.5: .* write '1.5'"), ({None: 0}, "report has the key None"),
    ({1: 0, "1": 0}, "report has two keys that are '1' as a text"),
])
def test_what_json_has_no_form_for_is_named_with_its_place(value, words, tmp_path):
    report.save(tmp_path / "file", {"run": "old"})
    with pytest.raises(TypeError, match=words):
        report.save(tmp_path / "file", value)
    assert json.loads((tmp_path / "file").read_text()) == {"run": "old"} and os.listdir(tmp_path) == ["file"]


def test_a_tensor_is_refused_and_the_advice_works(device):
    tensor = minilora.tensor(numpy.ones(2))
    with pytest.raises(TypeError, match=r"report\['x'\] is a minilora.tensor.Tensor.* store minilora.to_host\(it\)"):
        report.plain({"x": tensor})
    assert report.plain({"x": minilora.to_host(tensor.data)}) == {"x": [1.0, 1.0]}


# -- the run ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    status = "stopped: enough"


@pytest.mark.parametrize(("error", "status"), [
    (None, "finished"), (KeyboardInterrupt, "interrupted"), (ValueError, "failed"), (Stopped, "stopped: enough"),
    (SystemExit, "failed")])
def test_status_and_what_is_known(error, status, tmp_path):
    path, record = tmp_path / "new" / "folder" / "report.json", {"losses": []}
    try:
        with report.recording(path, record) as kept:
            assert kept is record and json.loads(path.read_text()) == {"losses": [], "status": "running"}
            record["losses"].append(math.nan)
            if error is not None:
                raise error
    except BaseException as caught:
        assert type(caught) is error
    read = json.loads(path.read_text())
    assert (read["status"], read["losses"]) == (status, [None]) and 0.0 <= read["seconds"] < 60.0


def test_a_status_set_inside_stays(tmp_path):
    with report.recording(tmp_path / "report.json", {}) as record:
        record["status"] = "passed"
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "passed"


@POSIX
def test_ctrl_c_in_the_loop_leaves_what_is_known(tmp_path):
    done = child("""
with report.recording(sys.argv[1], {"steps": 0}) as record:
    for step in range(1, 10**9):
        record["steps"] = step
        if step == 1000:
            os.kill(os.getpid(), signal.SIGINT)
""", tmp_path / "report.json")
    assert done.returncode == -signal.SIGINT
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["status"] == "interrupted" and read["steps"] >= 1000
