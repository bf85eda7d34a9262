"""What a file is that was given as a safetensors file and is none: one sentence, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["disguise"]

_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = ("minilora reads no pickles, since reading one runs whatever is in it. Where PyTorch is installed, and you trust "
            "the file, convert it: python -c \"import torch, safetensors.torch as s; "
            "s.save_file(torch.load({old!r}, weights_only=True, map_location='cpu'), {new!r})\"")
_MODEL = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how PyTorch's files before version 1.6 begin


def disguise(path: Path, data: Any) -> str:
    """What the file is, and the cure; "" if nothing is known about it.

    Parameters
    ----------
    path : Path
        For the ending of the name, and for the line to type.
    data : bytes-like
        The whole file, such as a map of it: the first and last bytes are looked at.
    """
    size = len(data)
    head = bytes(data[:512])
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not size:
        return "the file is empty: copy or download it again"
    if head.startswith(b"version https://git-lfs.github.com"):
        return (f"this is a pointer of Git LFS ({size} bytes), not the file it stands for: run git lfs pull in its folder, or "
                "download the file itself")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "this is a web page, not a file of tensors: an error or login page was saved in its place; download it again"
    if head.startswith(b"GGUF"):
        return "this is a GGUF file of llama.cpp: use the safetensors file of the same model"
    if head.startswith(b"\x93NUMPY"):
        return "this is a .npy file: read it with numpy.load(path, allow_pickle=False), and write it with save_state"
    if head.startswith(b"PK"):
        return _zip(path, head)
    if path.suffix.lower() in _PICKLE or head.startswith(_MODEL) or _is_pickle(head, bytes(data[-1:])):
        return f"this is a pickle. {_convert(path)}"
    if text.startswith((b"{", b"[")):
        return "this is JSON text, not a file of tensors: give the .safetensors file, or the index that ends in .index.json"
    return ""


def _zip(path: Path, head: bytes) -> str:
    name = head[30:30 + int.from_bytes(head[26:28], "little")]
    if path.suffix.lower() == ".npz" or name.endswith(b".npy"):
        return "this is a .npz file: read it with numpy.load(path, allow_pickle=False), and write it with save_state"
    if path.suffix.lower() in _PICKLE or b"data.pkl" in head or b".pkl" in name:
        return f"this is a file of torch.save, which is a pickle in a zip. {_convert(path)}"
    return "this is a zip archive: unpack it, and give the .safetensors file inside"


def _is_pickle(head: bytes, last: bytes) -> bool:
    return head[:1] == b"\x80" and 2 <= int.from_bytes(head[1:2], "little") <= 5 and last == b"."


def _convert(path: Path) -> str:
    return _CONVERT.format(old=str(path), new=str(path.with_suffix(".safetensors")))
