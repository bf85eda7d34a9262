"""What processes must agree on before they train together; and how they read each other's texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy

from ...errors import StateError
from .comm import Comm

__all__ = ["agree", "first_told", "gathered"]

SHOWN = 8  # ranks, and differences, that a message names


def gathered(comm: Comm, text: str) -> list[str]:
    """The texts of all processes, in the order of their ranks: two messages.

    Examples
    --------
    >>> from minilora.train.distributed.comm import Serial
    >>> gathered(Serial(), "here")
    ['here']
    """
    data = text.encode("utf-8", "surrogatepass")
    lengths = numpy.zeros(comm.size, dtype=numpy.int64)
    lengths[comm.rank] = len(data)
    comm.sum_(lengths)
    rows = numpy.zeros((comm.size, -(-int(lengths.max()) // 8)), dtype=numpy.int64)  # but for one's own: a sum is a gathering
    rows[comm.rank:comm.rank + 1].view(numpy.uint8)[0, :len(data)] = numpy.frombuffer(data, numpy.uint8)
    comm.sum_(rows)
    return [row.tobytes()[:length].decode("utf-8", "surrogatepass") for row, length in zip(rows, lengths.tolist())]


def first_told(comm: Comm, text: str) -> str:
    """The text of the first process that has one, for all of them."""
    return next(filter(None, gathered(comm, text)), "")


def agree(comm: Comm, facts: Mapping[str, Any]) -> None:
    """Refuse to go on, in every process, unless all hold the same.

    Parameters
    ----------
    comm : Comm
    facts : dict
        What must be the same, by the names for an error: plain values, and dicts of them, whose fields are compared by
        themselves where the whole differs.

    Raises
    ------
    StateError
        In each process the same one: what differs, and in which processes.
    """
    if comm.size == 1:
        return
    apart = _different(comm, facts)
    if not apart:
        return
    parts = {f"{name}: {key}" if key else name: each for name in apart for key, each in _fields(facts.get(name))}
    lines = [f"{name}: {words}" for name, words in _different(comm, parts).items()]
    more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    raise StateError("the processes do not hold the same, and would train apart; nothing was trained:\n  "
                     + "\n  ".join(lines[:SHOWN]) + more + "\nGive every process the same command, files and versions")


def _fields(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else [("", value)]


def _different(comm: Comm, facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts that are not the same in all processes, and who has which; by digests."""
    own = {name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
           for name, value in facts.items()}
    every = [json.loads(text) for text in gathered(comm, json.dumps(own))]
    names = dict.fromkeys(name for one in every for name in one)
    return {name: _parties([one.get(name) for one in every]) for name in names if len({one.get(name) for one in every}) > 1}


def _parties(values: list[str | None]) -> str:
    """Which ranks are with rank 0, and which hold something else."""
    groups: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return ", another in ".join(_listed(ranks) + (" has none" if value is None else "") for value, ranks in groups.items())


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
