"""What a checkpoint belongs to, and in what two runs differ.

Equal bits need an equal run: settings, model, data, loss, optimizer, the frozen base to the last bit, versions, and a machine
that adds in the same order. All of it is written beside the numbers, and compared before anything is taken from there. Each
difference has a name, and may be permitted by it, at the price that the run is another one from there on:

    steps, epochs       a run is made longer: the schedule is that of the new length, continued at the same step
    learning_rate ...   any other setting, by its name
    data, valid, loss   it goes on with other rows, or another loss
    base                the frozen weights are others: nothing that was learned is sure to fit them
    stored              they are held in another kind, nf4 or bfloat16, and so are others too
    model, adapter      layers, or the adapter's config, are described in other words: a dropout, an alpha
    threads, processes, device, machine, versions
                        it is computed elsewhere: the same numbers up to rounding

What is trained, by name, shape and dtype, and the optimizer's kind cannot be permitted: the numbers would have no place.

The base costs one SHA-256 over its bytes, once when a run begins: see `frozen`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy

from ... import backend, blas
from ...lora.layers.places import layers_of
from ...nn.module import Module
from ...release import __version__
from ...stored import Stored
from ..run import Run
from .contents import as_array, trained

__all__ = ["Difference", "FREE", "PERMITTED", "differences", "frozen", "held_kinds", "identity"]

FREE = {"keep", "save_every", "steps_per_report", "threads"}  # settings that change no bit; of threads those in use count
PLACES = ("threads", "processes", "device", "machine", "versions")
PERMITTED = ("data", "valid", "loss", "base", "stored", "model", "adapter", *PLACES)  # and every setting
WORDS = {"stored": "in what the frozen weights are held", "data": "the training data, by their fingerprint",
         "valid": "the data of the evaluation", "loss": "the loss function",
         "threads": "threads of the backward pass", "processes": "processes", "device": "the device",
         "machine": "arithmetic", "versions": "versions"}
BLOCK = 1 << 24  # bytes hashed together; of arrays that are not contiguous, or on a device, copies of that size
SHOWN = 5


class Difference(NamedTuple):
    """In what two runs differ: the name by which it can be permitted, None if it cannot, and the two in words."""

    name: str | None
    words: str


def identity(run: Run) -> dict[str, Any]:
    """What a run is, as plain values that JSON can hold. It does not change while the run goes on."""
    made = {
        "settings": run.settings.as_dict(),
        "rates": list(run.scheduler.base),
        "optimizer": type(run.optimizer).__name__,
        "groups": [{key: value for key, value in group.settings.items() if key != "lr"} for group in run.optimizer.groups],
        "model": repr(run.model).splitlines(),
        "adapter": adapters(run.model),
        "stored": held_kinds(run.model),
        "base": frozen(run.model),
        "data": run.data.fingerprint,
        "valid": None if run.valid is None else run.valid.fingerprint,
        "loss": called(run.loss),
        "threads": run.threads,
        "processes": run.comm.size,
        "device": ", ".join(sorted({p.device.name for p in run.model.parameters()})),
        "machine": f"{blas.described()}; {processor()}{'' if backend.kernels() else '; without kernels'}"
                   f"{on_tensor_cores(run.model)}",
        "versions": f"minilora {__version__}, numpy {numpy.__version__}",
    }
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]  # tuples as lists: as a file gives it back


def held(run: Run, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the processes of a run must all hold: its `identity`, and what is to be trained.

    Not the machine: its instructions decide the last bits of a process's own gradients, and what is summed is everybody's.
    """
    state = {path: digest(as_array(value)) for path, value in run.model.named_state()}
    numbers = {path: digest(p.data) for path, p in trained(run).items()}
    return {**{name: value for name, value in known.items() if name != "machine"}, "trained": numbers, "state": state}


def called(loss: Any) -> str:
    """What a loss function is called."""
    return f"{getattr(loss, '__module__', '?')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def processor() -> str:
    """The instructions that NumPy's own loops use here."""
    simd = numpy.show_config(mode="dicts").get("SIMD Extensions", {})
    return "NumPy's loops for " + ("+".join([*simd.get("baseline", []), *simd.get("found", [])]) or "any processor")


def adapters(model: Module) -> dict[str, Any]:
    """The config of each adapter of a model, by its name; none of one that was put in by hand."""
    return {name: adapter.config.to_dict() for layer in layers_of(model).values() for name, adapter in layer.adapters.items()
            if adapter.config is not None}


def frozen(model: Module) -> dict[str, str]:
    """The SHA-256 of every parameter that is not trained, by path: over its shape, its dtype and its bits.

    Nothing is copied. An AMD EPYC with instructions for SHA does 1.4 GB a second: 0.4 s for 500 MB; 1.4 s where sixteen other
    programs wanted its two cores.
    """
    return {path: digest(p.data) for path, p in model.named_parameters() if not p.trainable}


def held_kinds(model: Module) -> dict[str, int]:
    """How many weights are held in each kind of low precision."""
    kinds = Counter(p.data.kind for p in model.parameters() if isinstance(p.data, Stored))
    return dict(sorted(kinds.items()))


def on_tensor_cores(model: Module) -> str:
    """What products of this model round their factors to, where they do: they have other bits then."""
    parameters = list(model.parameters())
    in_16_bits = any(getattr(p.data, "as_it_is", False) and p.device.multiplies_16_bits for p in parameters)
    return ("; TF32" if any(p.device.in_tf32 for p in parameters) else "") + ("; products in 16 bits" if in_16_bits else "")


def digest(array: Any) -> str:
    """SHA-256 of an array, of any device, by shape, dtype and bits, in C order; of a weight in low precision that of its parts.

    The same numbers held in another way are another base: what is computed from them differs in the last bits.
    """
    if isinstance(array, Stored):
        parts = " ".join(f"{ending} {digest(part)}" for ending, part in array.arrays().items())
        return hashlib.sha256(f"{list(array.shape)} {array.dtype.name} {array.kind} {parts}".encode()).hexdigest()
    found = hashlib.sha256(f"{list(array.shape)} {array.dtype.name} ".encode())
    flat = array.reshape(-1)  # a view where the numbers lie one behind the other
    step = max(1, BLOCK // max(1, array.dtype.itemsize))
    for start in range(0, flat.shape[0], step):
        found.update(numpy.ascontiguousarray(backend.to_host(flat[start:start + step])).view("uint8").data)
    return found.hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
    """In what a saved run (`there`) differs from another: all of it. `there` may come from a file, and hold anything."""
    there = {"stored": {}, **there}  # runs of before have no word of it
    yield from _settings(_dict(there.get("settings")), here["settings"])
    if not _same(there.get("rates"), here["rates"]):
        yield _other("learning_rate", "the optimizer's learning rates", there.get("rates"), here["rates"])
    if there.get("optimizer") != here["optimizer"]:
        yield _other(None, "the optimizer", there.get("optimizer"), here["optimizer"])
    groups: Any = there.get("groups")
    if not isinstance(groups, list) or len(groups) != len(here["groups"]):
        groups = []
        yield Difference(None, "the optimizer: its parameters are in other groups there")
    for i, (old, new) in enumerate(zip(groups, here["groups"])):
        for name in sorted({*_dict(old), *new}):
            if not _same(_dict(old).get(name), new.get(name)):
                what = f"{name} of the optimizer's group {i}"
                yield _other(name if name in new else None, what, _dict(old).get(name), new.get(name))
    yield from _lines(there.get("model"), here["model"])
    yield from _named("adapter", "the config of adapter", _dict(there.get("adapter")), here["adapter"])
    yield from _base(_dict(there.get("base")), here["base"])
    for name, what in WORDS.items():
        if not _same(there.get(name), here[name]):
            yield _other(name, what, there.get(name), here[name])


def _settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
    for name in sorted({*there, *here} - FREE):
        if not _same(there.get(name), here.get(name)):
            yield _other(name if name in here else None, name, there.get(name), here.get(name))


def _lines(there: Any, here: list[str]) -> Iterator[Difference]:
    """How two descriptions of a model differ, by their first lines."""
    old = [str(line) for line in there] if isinstance(there, list) else []
    if old != here:
        changes = [line for line in difflib.ndiff(old[:2000], here[:2000]) if line[:1] in "+-"]
        shown = "; ".join(f"{'there' if line[0] == '-' else 'here'}: {line[1:].strip():.100}" for line in changes[:SHOWN])
        yield Difference("model", f"the model: {shown or 'other layers'}{' ...' if len(changes) > SHOWN else ''}")


def _base(there: Mapping[str, Any], here: Mapping[str, str]) -> Iterator[Difference]:
    changed = sorted(path for path in {*there, *here} if there.get(path) != here.get(path))
    if changed:
        shown = ", ".join(f"{path:.80}" for path in changed[:SHOWN]) + (" ..." if len(changed) > SHOWN else "")
        yield Difference("base", f"the frozen weights: {len(changed)} of {len({*there, *here})} are not those that the run was "
                                 f"trained beside: {shown}")


def _named(name: str, what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
    for key in sorted({*there, *here}):
        old, new = _dict(there.get(key)), _dict(here.get(key))
        for field in sorted({*old, *new}):
            if not _same(old.get(field), new.get(field)):
                yield _other(name, f"{field} in {what} {key!r:.64}", old.get(field), new.get(field))


def _other(name: str | None, what: str, there: Any, here: Any) -> Difference:
    return Difference(name, f"{what:.100}: {_short(there)} there, {_short(here)} here")


def _same(there: Any, here: Any) -> bool:
    """Whether two plain values are the same; true is not 1."""
    return json.dumps(there, sort_keys=True) == json.dumps(here, sort_keys=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:80]} ... {text[-70:]}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
