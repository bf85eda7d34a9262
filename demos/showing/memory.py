"""What a process has taken, and which processor it runs on: as far as the system says."""

import contextlib
import platform


def forget_peak():
    """Let the peak be that of what follows, where the system can (Linux); elsewhere it is that of the whole process."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak():
    """The most bytes that the process has had in memory since then; None where nobody knows."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def processor():
    """The processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
