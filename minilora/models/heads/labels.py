"""What a classifier tells apart, and the loss that belongs to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy

from ... import backend, ops
from ...errors import ConfigError, DTypeError, ShapeError
from ...ops.indices import integers
from ...tensor import Tensor

__all__ = ["PROBLEMS", "Labels", "loss_of_classes"]

IGNORED = -100  # a label that counts nothing
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclasses.dataclass(frozen=True)
class Labels:
    """The outputs of a classifier.

    Parameters
    ----------
    names : sequence of str, or int
        What the classes are called, in order; or how many there are: then they are called LABEL_0, LABEL_1 and so on.
    problem_type : {"regression", "single_label_classification", "multi_label_classification"}, optional
        Which loss; see `loss_of_classes`. Without it, it follows from the labels that are given.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Examples
    --------
    >>> Labels(["negative", "positive"]).count, Labels(3).names
    (2, ('LABEL_0', 'LABEL_1', 'LABEL_2'))
    """

    names: Any = 2
    problem_type: str | None = None

    def __post_init__(self) -> None:
        names = self.names
        if isinstance(names, int) and not isinstance(names, bool) and names >= 1:
            names = [f"LABEL_{i}" for i in range(names)]
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"labels must be an int >= 1, or the names of the classes in order, got {self.names!r}")
        if self.problem_type not in (None, *PROBLEMS):
            raise ConfigError(f"problem_type must be None or one of {', '.join(PROBLEMS)}, got {self.problem_type!r}")
        object.__setattr__(self, "names", tuple(names))

    @property
    def count(self) -> int:
        return len(self.names)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Labels:
        """From config.json: id2label, or num_labels, or two classes as everywhere in transformers.

        Raises
        ------
        ConfigError
            If the ids are not 0 to n - 1, or the two fields disagree.
        """
        named, count = fields.get("id2label"), fields.get("num_labels")
        names: Any = 2 if count is None else count
        if named is not None:
            wanted = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
            if not wanted or sorted(named, key=_as_number) != wanted:
                raise ConfigError(f"id2label must give a name to each of the ids 0 to n - 1, got {named!r:.200}")
            names = [str(named[i]) for i in wanted]
            if count is not None and count != len(names):
                raise ConfigError(f"num_labels is {count!r}, but id2label names {len(names)} classes: they must agree")
        return cls(names, fields.get("problem_type"))

    def write(self) -> dict[str, Any]:
        """The fields of config.json."""
        ids = {str(i): name for i, name in enumerate(self.names)}
        return {"id2label": ids, "label2id": {name: i for i, name in enumerate(self.names)}, "problem_type": self.problem_type}


def _as_number(text: str) -> tuple[int, str]:
    return (len(text), text)  # "2" before "10"


def loss_of_classes(logits: Tensor, labels: Any, kind: Labels) -> Tensor:
    """The loss of a text classifier, as transformers defines it.

    Parameters
    ----------
    logits : Tensor, shape (..., n)
    labels : array, Tensor, or nested lists
        For single_label_classification ints (...), -100 where a text is not to count; for regression numbers (..., n), or (...)
        if n = 1; for multi_label_classification numbers in [0, 1], (..., n).
    kind : Labels
        Its problem_type; if that is None: regression for n = 1, single_label_classification for labels that are integers,
        else multi_label_classification.

    Returns
    -------
    Tensor, shape ()
        Regression: the mean square of the differences. Single label: the mean of -log softmax(z)_k. Multi label, with
        p = 1 / (1 + e^-z), the mean over texts and classes of -t log p - (1 - t) log(1 - p): as (0, z) are logits of two
        classes whose softmax is (1 - p, p), it is their log-softmax, weighted by (1 - t, t).
    """
    given: Any = labels.data if isinstance(labels, Tensor) else labels
    if isinstance(given, (list, tuple, int, float)):
        given = numpy.asarray(given)
    if getattr(getattr(given, "dtype", None), "kind", "") not in ("b", "i", "u", "f"):
        raise DTypeError(f"labels must be an array, a Tensor or nested lists of numbers, got {type(labels).__name__}")
    n = logits.shape[-1]
    problem = kind.problem_type or (PROBLEMS[0] if n == 1 else PROBLEMS[1] if given.dtype.kind in "iu" else PROBLEMS[2])
    if problem == "single_label_classification":
        return ops.cross_entropy(logits, integers("label", given, n, IGNORED), IGNORED)
    if given.shape != logits.shape and not (problem == "regression" and n == 1 and given.shape == logits.shape[:-1]):
        raise ShapeError(f"{problem}: expected labels of the shape of the logits, {logits.shape}, got {given.shape}")
    target = _beside(logits, given)
    if problem == "regression":
        return ops.mse(logits, Tensor(target.reshape(logits.shape)))
    pairs = ops.log_softmax(ops.stack([logits * 0.0, logits], axis=-1))
    weights = Tensor(logits.device.xp.stack([1.0 - target, target], axis=-1))
    return -ops.sum(ops.sum(pairs * weights, -1)) / float(target.size)


def _beside(logits: Tensor, given: Any) -> Any:
    """Numbers in the dtype and on the device of the logits."""
    if isinstance(given, numpy.ndarray):
        given = backend.to_device(given, logits.device)
    return given.astype(logits.dtype, copy=False)
