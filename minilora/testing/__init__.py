"""Is this gradient right? Tools for whoever writes an operation: public, since users write ops too.

`gradcheck` compares hand-written gradients with numerical ones, `taylor_test` needs no tolerance, and `compare` sets
two arrays side by side. Each gives a report that is true or false, prints as a short table, guesses at the mistake,
and raises `GradcheckError` from its ``check()``.
"""

from ..calls import answered_names
from .comparison import Comparison, compare
from .gradients import gradcheck
from .reports import GradcheckError, Report, Row
from .taylor import TaylorReport, taylor_test

__all__ = ["Comparison", "GradcheckError", "Report", "Row", "TaylorReport", "compare", "gradcheck", "taylor_test"]

answered_names(globals(), ["compare", "gradcheck", "taylor_test"])
