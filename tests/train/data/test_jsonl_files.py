"""JSON lines from files that people and programs write, good and bad."""
import json
import tracemalloc

import pytest
from letters import Letters

from minilora.errors import FileError, FormatError
from minilora.train.data import jsonl, read


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


GOOD = '{"text": "good"}'


@pytest.mark.parametrize(("line", "words"), [
    ('{"text": "a"', "no JSON: Expecting ',' delimiter at character 13"),
    ("{'text': 'a'}", "JSON has double quotation marks"),
    ("{", "is an object written over several lines?"),
    ('[{"text": "a"}]', "got a list: is this a file with one JSON list?"),
    ("[", "is this a file with one JSON list?"),
    ('"text"', "expected a JSON object, {...}, got a text"),
    ("17", "got a number"),
    ("true", "got true or false"),
    ("null", "got null"),
    ('{"text": "a", "text": "b"}', "the name 'text' is there twice"),
    ('{"text": NaN}', "NaN is no number of JSON"),
    ('{"text": -Infinity}', "-Infinity is no number of JSON"),
    (b'{"text": "caf\xe9"}', "no UTF-8: invalid continuation byte at byte 14 of the line. save the file as UTF-8"),
    ("[" * 200_000, "nested too deeply"),
    ('{"text": ' * 200_000, "nested too deeply"),
    ('{"text": ' + "9" * 5000 + "}", "4300"),
    (GOOD + "\r" + GOOD, "Lines end with CR alone here"),
    ('{"text": "\\ud800"}', "'text' has half a character (a lone surrogate) at 0"),
    ("text", "no JSON: Expecting value at character 1"),
], ids=range(19))
def test_a_bad_line_is_told_with_its_number(tmp_path, line, words):
    path = write(tmp_path / "rows.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(FormatError) as caught:
        read(path, Letters())
    assert str(caught.value).startswith(f"{path}:3: ") and words in str(caught.value)


def test_all_problems_come_in_one_message_ten_of_them_told(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, *["{"] * 3, '{"text": 5}', *["[]"] * 20)
    with pytest.raises(FormatError, match="24 problems:") as caught:
        read(path, Letters())
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[1:11]] == [str(n) for n in range(2, 12)] and lines[11:] == ["  and 14 more"]
    assert "'text' must be a text, got 5" in lines[4]


def test_problems_of_all_files_come_together(tmp_path):
    write(tmp_path / "train.jsonl", GOOD, "{")
    write(tmp_path / "valid.jsonl", "{")
    write(tmp_path / "test.jsonl", "")
    with pytest.raises(FormatError, match="3 problems:") as caught:
        read(tmp_path, Letters())
    assert [part in str(caught.value) for part in ("train.jsonl:2:", "valid.jsonl:1:", "test.jsonl: the file has no rows")]


def test_blank_lines_a_mark_and_windows_line_ends_change_nothing(tmp_path):
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ("one", "two\nthree", "öç\u2028😀")]
    plain = read(write(tmp_path / "a.jsonl", *rows), Letters())
    other = (tmp_path / "b.jsonl")
    other.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["", *rows[:2], " \t", rows[2], "", ""]).encode())
    assert read(other, Letters()).train.fingerprint == plain.train.fingerprint and len(plain.train) == 3


def test_a_mark_is_one_at_the_beginning_only(tmp_path):
    with pytest.raises(FormatError, match=":2: no JSON"):
        read(write(tmp_path / "a.jsonl", GOOD, b"\xef\xbb\xbf" + GOOD.encode()), Letters())


def test_utf_16_is_told_as_such(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(FormatError, match="It looks like UTF-16: save the file as UTF-8"):
        read(path, Letters())


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(FormatError, match="train.jsonl: the file has no rows"):
        read(tmp_path, Letters())


def test_a_huge_line_is_never_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST", 1 << 16)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD.encode() + b"\n" + b'{"text": "')
        for _ in range(200):
            file.write(b"a" * (1 << 16))
        file.write(b'"}\n{"text"}\n')
    tracemalloc.start()
    with pytest.raises(FormatError, match="2 problems:\n .*a.jsonl:2: the line is longer than 0 MiB.*\n .*a.jsonl:3: no JSON"):
        read(path, Letters())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 21


def test_a_line_of_the_longest_length_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST", 40)
    row = json.dumps({"text": "a" * 28})
    assert len(row) == 40
    for end in ("", "\n"):
        (tmp_path / "a.jsonl").write_text(row + end)
        if end:
            with pytest.raises(FormatError):  # with its line end it is one longer
                read(tmp_path / "a.jsonl", Letters())
        else:
            assert len(read(tmp_path / "a.jsonl", Letters()).train) == 1


@pytest.mark.parametrize("make", ["missing", "folder without", "empty folder", "folder for a file"])
def test_files_that_are_not_there(tmp_path, make):
    path = tmp_path / "data"
    if make != "missing":
        path.mkdir()
    if make == "folder without":
        write(path / "reviews.jsonl", GOOD)
        write(path / "README.md", "")
    if make == "folder for a file":
        (path / "train.jsonl").mkdir()
    words = {"missing": "there is no such file or folder", "empty folder": "the folder has no files",
             "folder without": "no train.jsonl, but README.md, reviews.jsonl: give",
             "folder for a file": "there is no train.jsonl"}[make]
    with pytest.raises(FileError, match=words):
        read(path, Letters())


def test_escape_sequences_in_a_file_reach_no_terminal(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, json.dumps({"text": "a", "\x1b[31mred": 1}), json.dumps({"text": ["\x1b[0m"]}))
    with pytest.raises(FormatError) as caught:
        read(path, Letters())
    assert "\x1b" not in str(caught.value) and "\\x1b[31mred" in str(caught.value)
