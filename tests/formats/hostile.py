"""Files that harm or mislead: drawn from a seed, so that a file that breaks something can be made again from its label.

`hand_made` are files that somebody would think of, `bombs` some that ask for much memory; `mutated` spoils any file, a
config as well as a header; `hostile` is a stream of them all.
"""
import json
import re
import struct

import numpy as np

LFS = (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"3" * 64 + b"\nsize 54810517\n")
JUNK = [b"-1", b"1.0", b"true", b"null", b"1e3", b"NaN", b"{}", b"[]", b"[[]]", b"\"\"", b"9223372036854775808", b"00",
        b"18446744073709551616", b"1" * 5000, b"0", b"1", b"\"F32\"", b"\"BF16\"", b"\"I64\"", b"\"F4\"", b"\"Q9\"",
        b"\"../../x\"", b"\"\\ud800\"", b"\"\xff\"", b"\"__metadata__\"", b"\"weight_map\"", b",", b":", b"}", b"]"]


def packed(header, data=b"", length=None):
    """A safetensors file: a header (as text, or what JSON makes text of), and the numbers."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def valid():
    """Small files without a fault, from which the others are made."""
    numbers = np.arange(64, dtype="float32").tobytes()
    return {
        "one": packed({"a": tensor()}, numbers[:8]),
        "none": packed({"__metadata__": {"format": "pt"}}),
        "several": packed({"__metadata__": {"format": "pt", "note": "né \" \\ \n"}, "h.0.w": tensor("F32", (2, 3), (0, 24)),
                           "e": tensor("F16", (0, 3), (24, 24)), "../x": tensor("I8", (), (24, 25)),
                           "b": tensor("BOOL", (3,), (25, 28)), "": tensor("F64", (1, 1), (28, 36))},
                          numbers[:24] + b"\7\1\0\1" + numbers[:8]),
        "long header": packed(json.dumps({"a": tensor()}).encode().ljust(100_000), numbers[:8]),
        "odd header": packed(b" " + json.dumps({"a": tensor(), "b": tensor("I16", (1,), (8, 10))}).encode(), numbers[:10]),
    }


def hand_made():
    """Files that break one rule each, by the rule."""
    good, eight = packed({"a": tensor()}, b"12345678"), b"12345678"
    twice = json.dumps({"a": tensor()}).encode()[:-1] + b"," + json.dumps({"a": tensor()}).encode()[1:]
    entries = {
        "negative axis": tensor(shape=(-2,)), "float axis": tensor(shape=(2.0,)), "bool axis": tensor(shape=(True, 2)),
        "text axis": tensor(shape=("2",)), "axis of 2^63": tensor(shape=(2**63,)),
        "product beyond 2^64": tensor(shape=(2**33, 2**33)), "no list": {**tensor(), "shape": 2},
        "empty, and too large": tensor(shape=(0, 2**62, 2**62), offsets=(0, 0)),
        "65 axes": tensor(shape=(1,) * 65, offsets=(0, 4)), "a thousand axes": tensor(shape=(1,) * 1000, offsets=(0, 4)),
        "offsets backwards": tensor(offsets=(8, 0)), "offsets negative": tensor(offsets=(-8, 0)),
        "three offsets": tensor(offsets=(0, 4, 8)), "offsets float": tensor(offsets=(0.0, 8.0)),
        "bool offset": tensor(offsets=(False, 8)), "more bytes than numbers": tensor(offsets=(0, 7)),
        "other size": tensor(shape=(3,)), "unknown dtype": tensor("F33"), "dtype no text": tensor(3),
        "dtype null": tensor(None), "half a byte": tensor("F4", (3,), (0, 2)), "extra field": tensor(strides=[1]),
        "no shape": {"dtype": "F32", "data_offsets": [0, 8]}, "empty object": {}, "null": None, "number": 3, "text": "F32",
        "list": ["F32", [2], [0, 8]], "nested": {"a": tensor()}, "beyond the file": tensor(shape=(3,), offsets=(0, 12)),
        "hole at the beginning": tensor(shape=(1,), offsets=(4, 8)), "bytes left": tensor(shape=(1,), offsets=(0, 4)),
        "a dtype that no array has": tensor("F4", (16,), (0, 8)), "neither true nor false": tensor("BOOL", (8,), (0, 8)),
    }
    files = {name: packed({"a": entry}, eight) for name, entry in entries.items()}
    files |= {f"metadata {value!r}"[:40]: packed({"__metadata__": value, "a": tensor()}, eight)
              for value in (3, "text", [], ["a"], {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]})}
    files |= {
        "overlap": packed({"a": tensor(offsets=(0, 8)), "b": tensor(offsets=(4, 12))}, b"1" * 12),
        "the same bytes": packed({"a": tensor(), "b": tensor()}, eight),
        "hole": packed({"a": tensor(), "b": tensor(offsets=(12, 20))}, b"1" * 20),
        "inside another": packed({"a": tensor(shape=(4,), offsets=(0, 16)), "e": tensor(shape=(0,), offsets=(8, 8))},
                                 b"1" * 16),
        "a name twice": packed(twice, eight), "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{}}'),
        "a key twice": packed(b'{"__metadata__":{"a":"b","a":"c"}}'),
        "a field twice": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', eight),
        "one byte less": good[:-1], "one byte more": good + b"\0", "empty": b"", "three bytes": b"abc",
        "eight zeros": b"\0" * 8, "only the length": good[:8],
        "header beyond the file": packed({"a": tensor()}, eight, 1000),
        "header of 2^63": packed({"a": tensor()}, eight, 2**63), "header of 2^64-1": packed({"a": tensor()}, eight, 2**64 - 1),
        "header of 100 MB and one": packed({"a": tensor()}, eight, 100_000_001),
        "header one short": packed({"a": tensor()}, eight, 50),
        "a list": packed(b"[]"), "a number": packed(b"3"), "no JSON": packed(b"{a:1}"),
        "a comma too many": packed(b'{"__metadata__":{},}'), "open": packed(b'{"a":'), "open text": packed(b'{"a'),
        "open escape": packed(b'{"a\\"'), "two objects": packed(b"{}{}"), "zeros behind": packed(b"{}\0\0"),
        "a mark of UTF-8": packed(b"\xef\xbb\xbf{}"), "UTF-16": packed("{}".encode("utf-16")),
        "no UTF-8": packed(b'{"\xff\xfe":{}}'),
        "half a pair": packed(b'{"\\ud800":' + json.dumps(tensor()).encode() + b"}", eight),
        "a control character": packed(b'{"a\1":{}}'), "a bad escape": packed(b'{"\\x":{}}'), "a comment": packed(b"{/* */}"),
        "deep": packed(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        "deep metadata": packed(b'{"__metadata__":' + b'{"a":' * 5000),
        "a number of 5000 digits": packed(b'{"a":' + b"1" * 5000 + b"}"), "infinity": packed(b'{"a":Infinity}'),
        "LFS pointer": LFS, "web page": b"<!DOCTYPE html>\n<html><title>404</title></html>",
        "config": b'{\n  "model_type": "gpt2"\n}\n',
        "index": b'{"metadata": {"total_size": 8}, "weight_map": {"a": "../../etc/passwd"}}',
        "pickle": b"\x80\x02}q\0X\1\0\0\0aq\1K\1s.",
        "old torch": b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
        "torch zip": b"PK\3\4" + b"\0" * 22 + b"\x10\0\0\0archive/data.pklFB",
        "npz": b"PK\3\4" + b"\0" * 22 + b"\5\0\0\0a.npy", "npy": b"\x93NUMPY\1\0v\0{'descr': '|O'",
        "gguf": b"GGUF\3\0\0\0" + b"\0" * 24, "zip": b"PK\3\4" + b"\0" * 40,
        "gzip": b"\x1f\x8b\x08\0" + b"\0" * 30, "spaces": b" " * 300, "zeros": b"\0" * 300,
    }
    return files


def bombs(size):
    """Files of about `size` bytes whose text would be many times that as Python's objects."""
    def fill(piece, before=b"{", after=b"}"):
        return packed(before + piece * (size // len(piece)) + after)

    return {
        "lists": fill(b"[],", b'{"a":['), "objects": fill(b"{},", b'{"a":['), "numbers": fill(b"7,", b'{"a":['),
        "shape": fill(b"1,", b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[', b"1]}}"),
        "offsets": fill(b"0,", b'{"a":{"dtype":"F32","shape":[],"data_offsets":[', b"1]}}"),
        "brackets": fill(b"["), "quotes": fill(b'"'), "backslashes": fill(b"\\", b'{"'),
        "escapes": fill(b"\\n", b'{"', b'":{}}'),
        "metadata of lists": fill(b'"a":[],', b'{"__metadata__":{'), "long text": fill(b"a", b'{"', b'":{}}'),
        "bad entries": fill(b'"a":0,'), "long metadata": fill(b"a", b'{"__metadata__":{"a":"', b'"}}'),
        "empty tensors": packed({f"{i}": tensor(shape=(0,), offsets=(0, 0)) for i in range(size // 60)}),
        "spaces": fill(b" ", b"{", b"}"), "junk": packed({"a": tensor()}, b"\0" * size),
    }


def mutated(data, random):
    """A file with one to three faults of a kind: bits, bytes, numbers, words, places, ends.

    Parameters
    ----------
    data : bytes
    random : numpy.random.Generator
    """
    for _ in range(random.integers(1, 4)):
        data = FAULTS[random.integers(len(FAULTS))](data, random)
    return data


def _place(data, random):
    """An offset, in the first kilobyte more often than not: that is where most is decided."""
    near = min(len(data), 1024) if random.integers(4) else len(data)
    return int(random.integers(near + 1))


def _bit(data, random):
    at = min(_place(data, random), len(data) - 1)
    return data[:at] + bytes([data[at] ^ (1 << int(random.integers(8)))]) + data[at + 1:] if data else data


def _byte(data, random):
    at = min(_place(data, random), len(data) - 1)
    return data[:at] + random.bytes(1) + data[at + 1:] if data else data


def _cut(data, random):
    return data[:_place(data, random)]


def _cut_head(data, random):
    return data[_place(data, random):]


def _pad(data, random):
    return data + (random.bytes if random.integers(2) else bytes)(int(random.integers(1, 40)))


def _drop(data, random):
    at = _place(data, random)
    return data[:at] + data[at + int(random.integers(1, 20)):]


def _double(data, random):
    at, length = _place(data, random), int(random.integers(1, 90))
    return data[:at + length] + data[at:]


def _insert(data, random):
    at = _place(data, random)
    return data[:at] + random.bytes(int(random.integers(1, 9))) + data[at:]


def _number(data, random):
    """Another number in the text, or one more or less; the length of the header follows more often than not."""
    found = list(re.finditer(rb"\d+", data[8:1024]))
    if not found:
        return data
    match = found[random.integers(len(found))]
    number = int(match[0]) + int(random.choice([-1, 1, 4, -8, 2**31]))
    return _replaced(data, match, str(number).encode(), random)


def _word(data, random):
    """Junk in the place of a number, a text or a bracket."""
    found = list(re.finditer(rb'\d+|"[^"]*"|[][{},:]', data[8:1024]))
    if not found:
        return data
    return _replaced(data, found[random.integers(len(found))], JUNK[random.integers(len(JUNK))], random)


def _replaced(data, match, text, random):
    begin, end = match.start() + 8, match.end() + 8
    first = data[:8]
    if random.integers(4):
        first = ((int.from_bytes(first, "little") + len(text) - (end - begin)) % 2**64).to_bytes(8, "little")
    return first + data[8:begin] + text + data[end:]


def _length(data, random):
    return struct.pack("<Q", int(random.choice([0, 1, len(data) - 8, len(data), 2**31, 2**62])) % 2**64) + data[8:]


FAULTS = [_bit, _byte, _cut, _cut_head, _pad, _drop, _double, _insert, _number, _number, _word, _word, _word, _length]


def hostile(count, seed=0):
    """`count` files and their labels: all that are made by hand, then mutations of those and of the valid ones.

    Yields
    ------
    label : str
    data : bytes
    """
    made = list(hand_made().items())
    yield from made[:count]
    sources = [*valid().items(), *valid().items(), *made]
    for i in range(count - len(made)):
        random = np.random.default_rng([seed, i])
        # the valid ones more often: a file with one fault gets further than one with two
        name, data = sources[random.integers(len(sources))] if random.integers(2) else sources[random.integers(10)]
        yield f"{name}, mutation {i} of seed {seed}", mutated(data, random)
