"""The outline of a checkpoint: its model with all names, shapes and kinds, and no number of the file read or drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .held import linear_weights
from .names import match
from .reading import SENTENCES, prepared
from .sentences import read_pooling

__all__ = ["Outline", "outline"]


class Outline(NamedTuple):
    """A model without numbers, beside its file.

    Attributes
    ----------
    model : Module
        As `load` makes it, in evaluation mode; every parameter is one zero, repeated by strides of 0.
    file : StateFile
        Its tensors: names, shapes and dtypes, read when they are asked for.
    taken : mapping of str to str
        Path of a parameter to the name of its tensor.
    transposed : tuple of str
        Endings of the paths whose tensors are stored as (in, out).
    notes : tuple of str
        Settings that count in training and are not computed here; parts that were left aside.
    """

    model: Any
    file: Any
    taken: Mapping[str, str]
    transposed: tuple[str, ...]
    notes: tuple[str, ...]

    def take(self, paths: Iterable[str]) -> None:
        """Put the tensors of these parameters into the model: read-only views of the file, in its dtype, bfloat16 too."""
        own = dict(self.model.named_parameters())
        for path in paths:
            array = self.file[self.taken[path]]
            own[path].data = array.T if path.endswith(self.transposed) else array


def outline(folder: Any, head: str | None = None) -> Outline:
    """The model of a folder as `load` makes it, without its numbers: for what only asks for names and shapes.

    A model of a hundred billion numbers takes no memory. That config and file belong together is checked as `load` does. A
    folder of a sentence encoder gives the body.

    Parameters
    ----------
    folder : str or path
    head : str, optional
        As in `load`.

    Raises
    ------
    FileError, FormatError, ConfigError
        As `load` does.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> minilora.models.save(minilora.nn.GPT2(config, rng=0), "drawn")
    >>> outline("drawn").model.wte.weight.data.strides
    (0, 0)
    """
    from ...formats.tensors.durable import recover_folder

    folder = recover_folder(Path(folder))
    if head in SENTENCES or (head is None and (folder / "modules.json").is_file()):
        folder, head = read_pooling(folder).folder, "base"
    made = prepared(folder, head)
    found = match(dict(made.model.named_parameters()), made.file.shapes, made.file.dtypes, made.family, made.head,
                  made.file.path, head is not None, linear_weights(made.model))
    notes = [*made.notes, *([f"left aside: {', '.join(found.aside)}"] if found.aside else [])]
    return Outline(made.model.eval(), made.file, found.taken, made.family.transposed, tuple(notes))
