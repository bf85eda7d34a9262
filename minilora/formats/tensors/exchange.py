"""Two names exchanged in one step of the system, where it has one."""

from __future__ import annotations

import errno
import functools
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["exchange"]

_HERE = -100        # AT_FDCWD: a path that is relative is so to the working folder; ours are not
_EXCHANGE = 2       # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # a kernel or disk that has no such step


def exchange(a: Path, b: Path) -> bool:
    """Let two folders that exist change names, in one step; False, and nothing is done, where that cannot be.

    Raises
    ------
    OSError
        If the system has such a step and refuses it here.
    """
    call = _call()
    if call is None:
        return False
    import ctypes

    ctypes.set_errno(0)
    if call(os.fsencode(a), os.fsencode(b)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(b))


@functools.cache
def _call() -> Any:
    """A function of two paths that exchanges them and gives 0, or None."""
    if sys.platform not in ("linux", "darwin"):
        return None
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    name = "renameat2" if sys.platform == "linux" else "renamex_np"
    function = getattr(library, name, None)
    if function is None:
        return None
    if name == "renamex_np":
        function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
        return lambda a, b: function(a, b, _EXCHANGE)
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return lambda a, b: function(_HERE, a, _HERE, b, _EXCHANGE)
