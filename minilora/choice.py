"""A choice for the whole process, on or off: somebody's, else that of a variable of the environment."""

from __future__ import annotations

import os
from collections.abc import Callable

from .errors import ConfigError

__all__ = ["Choice"]

WORDS = {"on": True, "1": True, "off": False, "0": False}


class Choice:
    """On or off.

    Parameters
    ----------
    variable : str
        What decides as long as nobody has chosen; read when it is first asked for.
    usual : callable
        What it is without that variable.
    cure : str
        Which lines to type, for whoever gave the variable another word.

    Attributes
    ----------
    chosen : bool or None
        What was chosen, or has been read, so far; None if nothing was.

    Examples
    --------
    >>> colours = Choice("MINILORA_COLOURS", lambda: True, "Type unset MINILORA_COLOURS")
    >>> colours.on(), colours.chosen
    (True, True)
    """

    def __init__(self, variable: str, usual: Callable[[], bool], cure: str) -> None:
        self.variable, self.usual, self.cure = variable, usual, cure
        self.chosen: bool | None = None

    def on(self) -> bool:
        """Whether it is on; `ConfigError` if nobody has chosen, and the variable is none of on, off, 1, 0."""
        if self.chosen is None:
            word = os.environ.get(self.variable)
            if word is not None and word not in WORDS:
                raise ConfigError(f"{self.variable} is {word!r}: expected on or off (or 1 or 0). {self.cure}")
            self.chosen = self.usual() if word is None else WORDS[word]
        return self.chosen
