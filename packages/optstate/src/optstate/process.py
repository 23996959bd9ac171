"""The resident memory of this process, where the system tells it."""

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident_bytes(peak: bool = False) -> int | None:
    """Bytes of this process in memory; None if the system has no ``/proc``.

    Args:
        peak: the most since `forget_resident_peak`, or since the process began.
    """
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def forget_resident_peak() -> bool:
    """Begins a new peak of resident memory; returns whether the system allows it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True
