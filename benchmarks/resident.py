"""Resident memory of this process, and its peak. Linux only."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes of this process that are resident: field "VmRSS" now, "VmHWM" at the peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Bring the peak down to the present resident size, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # The peak then includes what came before, so the extra memory is over-stated, never under-stated.
        return
