"""A model in a subspace as a file: v, λ, and what everything else follows from. A few hundred bytes beside the numbers of v.

A safetensors file with the tensors "v" (d,) and, where there is one, "scales" (m,), and in its metadata, under `KEY`, as JSON

    {"version": 1, "method": "did" or "said", "projection": "fastfood" or "dense", "block": L of Fastfood, else null,
     "d": numbers in v, "size": D, "tensors": m, "seed": seed, "drawn": SHA-256 of what the projection draws,
     "base": SHA-256 of the model that it moves}

P is drawn again from the seed. Whether NumPy still draws the same numbers, and whether the model is the one that v belongs to,
the two digests tell: with another P, or from another θ0, v means nothing. That of the base is over path, shape and numbers of
every parameter as the space began, those that it does not move too; float16 counts as float32 there, as in `fingerprint`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy

from .. import backend
from ..errors import ConfigError, FormatError, StateError
from ..nn.module import Module
from ..stored import Stored
from ..tensor import Parameter
from ..tuners.intrinsic.projections import KINDS, Fastfood
from ..tuners.intrinsic.subspace import METHODS, Subspace, moved_in
from .json_rules import no_number, once
from .placing.fingerprint import hashed
from .tensors.reading import load_state, open_state
from .tensors.writing import save_state

__all__ = ["FILE", "KEY", "load_subspace", "save_subspace"]

FILE = "subspace.safetensors"
KEY = "minilora.subspace"
FIELDS = {**dict.fromkeys(("version", "d", "size", "tensors", "seed"), (int,)), "block": (int, type(None)),
          **dict.fromkeys(("method", "projection", "drawn", "base"), (str,))}


def save_subspace(space: Subspace, path: str | os.PathLike[str]) -> Path:
    """Write what a space has learned: in one piece, or not at all.

    Parameters
    ----------
    space : Subspace
    path : path
        A file ``*.safetensors``, or a folder for ``subspace.safetensors``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    StateError
        If v or λ holds NaN or inf, or the space was folded.
    FileError
        If it cannot be written; what was there is there still.
    """
    written = space.inside()
    tensors = {name: p.data for name, p in (("v", space.v), ("scales", space.scales)) if p is not None}
    if not all(numpy.isfinite(backend.to_host(array)).all() for array in tensors.values()):
        raise StateError("save_subspace: v or its scales hold NaN or inf, and would load as nothing: train with a smaller "
                         "learning rate")
    projection = space.projection
    said = {"version": 1, "method": space.method, "projection": projection.kind, "block": getattr(projection, "block", None),
            "d": len(space.v), "size": projection.size, "tensors": len(written.start), "seed": projection.seed,
            "drawn": projection.digest(), "base": base_digest(inside(space))}
    target = placed(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_state(target, tensors, {KEY: json.dumps(said, sort_keys=True)})
    return target


def load_subspace(path: str | os.PathLike[str], model: Module) -> Subspace:
    """Put a saved space around a model: the one that it was trained from, with the same parts trainable.

    Parameters
    ----------
    path : path
        As in `save_subspace`.
    model : Module
        Changed, as `Subspace` says; not at all, if this fails.

    Returns
    -------
    Subspace

    Raises
    ------
    FormatError
        If the file is damaged or is no such file, if the model is another, or if what the projection draws is.
    FileError
        If it cannot be read.
    ConfigError
        If nothing in the model is trained.

    Examples
    --------
    >>> import minilora
    >>> from minilora.tuners.intrinsic import Subspace
    >>> space = Subspace(minilora.nn.Linear(30, 20, rng=0), d=4)
    >>> minilora.formats.save_subspace(space, "learned").name
    'subspace.safetensors'
    >>> minilora.formats.load_subspace("learned", minilora.nn.Linear(30, 20, rng=0)).v.shape
    (4,)
    """
    target = placed(path)
    tensors = load_state(target)
    said = parsed(target, open_state(target).metadata, tensors)
    named = moved_in(model)
    faults = []
    size, count = sum(p.size for _, p in named), len(named)
    if (said["size"], said["tensors"]) != (size, count):
        faults.append(f"it moves {said['size']:,} numbers in {said['tensors']} tensors, and the model trains {size:,} in "
                      f"{count}: is it another model? Make the same parts of it trainable, and only those, before loading")
    elif base_digest(model.named_parameters()) != said["base"]:
        faults.append("the model's weights are not those that it was trained from: v means nothing there. Load the same "
                      "checkpoint, or draw the model with the same seed")
    if faults:
        raise FormatError(f"{target}: {faults[0]}")
    projection = made(said)
    if projection.digest() != said["drawn"]:
        raise FormatError(f"{target}: seed {said['seed']} gives other random numbers here than where it was written (NumPy "
                          f"{numpy.__version__} here): use the version of NumPy that it was trained with, and fold there")
    space = Subspace(model, len(tensors["v"]) + len(tensors.get("scales", ())), method=said["method"],
                     projection=said["projection"], seed=said["seed"])
    space.projection = projection
    for p, name in ((space.v, "v"), (space.scales, "scales")):
        if p is not None:
            p.data = backend.to_device(tensors[name].astype(p.dtype), p.device)
    space.write()
    return space


def placed(path: str | os.PathLike[str]) -> Path:
    """The file that is meant."""
    target = Path(os.fsdecode(path))
    return target if target.suffix == ".safetensors" else target / FILE


def inside(space: Subspace) -> Iterable[tuple[str, Parameter]]:
    """The parameters of a space's model as it began, under the model's own paths."""
    instead = space.inside().instead()
    return ((path, instead.get(id(p), p)) for path, p in space.model.named_parameters())


def base_digest(named: Iterable[tuple[str, Parameter]]) -> str:
    """SHA-256 over paths, shapes and numbers."""
    found = hashlib.sha256()
    for path, p in named:
        arrays = p.data.arrays() if isinstance(p.data, Stored) else {"": p.data}
        for ending, array in arrays.items():
            host = backend.to_host(array)
            kind = host.dtype.name if host.dtype.kind != "f" else "float64" if host.dtype == "float64" else "float32"
            found.update(f"{path} {ending} {hashed(host, kind)} ".encode())
    return found.hexdigest()


def made(said: Mapping[str, Any]) -> Any:
    """The projection that a file tells of."""
    block = {"block": said["block"]} if said["projection"] == Fastfood.kind else {}
    return KINDS[said["projection"]](said["d"], said["size"], said["seed"], **block)


def parsed(target: Path, metadata: Mapping[str, str], tensors: Mapping[str, numpy.ndarray]) -> dict[str, Any]:
    """What the metadata say, checked, also beside the tensors: it comes from a file."""
    if KEY not in metadata:
        raise FormatError(f"{target}: its metadata have no {KEY!r}: this is no file of a subspace. Of an adapter: "
                          "formats.load_adapter(model, path)")
    try:
        said = json.loads(metadata[KEY], object_pairs_hook=once, parse_constant=no_number)
        wrong = [name for name, kinds in FIELDS.items() if type(said[name]) not in kinds]
        if not wrong and said["version"] != 1:
            raise FormatError(f"{target}: version {said['version']} of this format, and 1 is read here: update minilora")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{target}: the metadata {KEY!r} are damaged: {type(error).__name__} {error}") from error
    faults = [f"{name} is of another type" for name in wrong]
    if not faults:
        wanted = {"v": (said["d"],), **({"scales": (said["tensors"],)} if said["method"] == "said" else {})}
        shapes = {name: array.shape for name, array in tensors.items()}
        faults = [f"{what} {said[what]!r:.40} is none of {', '.join(known)}" for what, known in (
            ("method", METHODS), ("projection", tuple(KINDS))) if said[what] not in known]
        if shapes != wanted:
            faults.append(f"expected the tensors {wanted}, got {shapes}")
        elif not all(a.dtype in ("float32", "float64") and numpy.isfinite(a).all() for a in tensors.values()):
            faults.append("expected finite numbers of float32 or float64")
    if not faults:
        try:
            made(said)
        except ConfigError as error:
            faults = [str(error)]
    if faults:
        raise FormatError(f"{target}: {'; '.join(faults)}: the file is damaged")
    return said  # type: ignore[no-any-return]
