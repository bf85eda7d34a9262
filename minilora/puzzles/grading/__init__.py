"""The grader: a learner's answer at a few points, and what is said about it."""

from .judge import grade, grade_file
from .outcome import Graded

__all__ = ["Graded", "grade", "grade_file"]
