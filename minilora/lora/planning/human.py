"""Numbers of bytes for people."""

from __future__ import annotations

__all__ = ["human"]


def human(nbytes: float) -> str:
    """Bytes in a decimal unit: 349.21 GB = 349.21e9 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} bytes" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.2f} TB"
