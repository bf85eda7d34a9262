"""Exercises in backpropagation and LoRA, with a grader that says what is wrong: ``python -m minilora.puzzles``.

Each puzzle is a small file with a task and a blank. In a notebook the same works without files::

    from minilora import puzzles
    puzzles.show("dA")                 # the task
    puzzles.check("dA", LowRank)       # grades the class or function that it asks for
    puzzles.hint("dA", 2)

See docs/puzzles.md. The rooms are those of the list: basics, lora, training.
"""

from typing import TYPE_CHECKING

from ..later import later

if TYPE_CHECKING:
    from .grading.outcome import Graded
    from .notebook import check, check_files, hint, names, show

__all__ = ["Graded", "check", "check_files", "hint", "names", "show"]

__getattr__, __dir__ = later(globals(), {"grading.outcome": "Graded", "notebook": "check check_files hint names show"})
