"""The words and numbers that every verb shares: exit codes."""

__all__ = ["CHECK_FAILED", "DIVERGED", "FAILED", "INTERRUPTED", "OK", "USAGE"]

OK = 0
FAILED = 1
USAGE = 2
CHECK_FAILED = 3  # the command did its work, and what it looked at is not as it should be
DIVERGED = 4
INTERRUPTED = 130
