"""The frozen weights that an adapter's updates belong to, out of the files of a base: to look at, and nothing is merged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy

from ...errors import FormatError
from ..adapters.saved import SavedAdapter
from .checkpoint import open_checkpoint
from .fitting import Fitting
from .site import Given, as_matrix

__all__ = ["Beside", "weights_beside"]


class Beside(NamedTuple):
    """What an adapter's updates stand beside: (path, W) one after the other, and what deserves a look."""

    weights: Iterator[tuple[str, numpy.ndarray]]
    notes: list[str]


def weights_beside(adapter: SavedAdapter, base: str | os.PathLike[str], label: str = "the adapter") -> Beside:
    """The weight for every update of an adapter that the base has a tensor for: W (out, in) as D = s B A has it.

    Of a convolution W is a matrix (out, in k); of an embedding (dimension, vocabulary). One weight at a time is read. An
    adapter of other weights, by its fingerprint, is looked at all the same: a note says so.

    Raises
    ------
    FormatError
        If the adapter does not fit the base: all that is wrong.
    FileError
        If the base cannot be read.
    """
    fitting = Fitting(open_checkpoint(Path(base)), [Given(label, 1.0, adapter)], force=True)
    fitting.fit()
    if fitting.problems:
        raise FormatError("\n  ".join([f"{base} is no base of {label}:", *fitting.problems]))
    return Beside(_weights(fitting, adapter), [f"another base: {words}" for words in fitting.forced.values()])


def _weights(fitting: Fitting, adapter: SavedAdapter) -> Iterator[tuple[str, numpy.ndarray]]:
    for site in fitting.sites.values():
        for part in site.parts:
            if site.source is not None:
                W = as_matrix(fitting.state[site.source])
                W = W.T if site.turned or adapter.updates[part.path].kind == "embedding" else W
                yield part.path, W if W.dtype in ("float32", "float64") else W.astype("float32")
