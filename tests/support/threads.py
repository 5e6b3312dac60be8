"""Work in many threads at once."""

from __future__ import annotations

import sys
import threading
import time


def at_once(*works, seconds: float | None = None) -> list[str]:
    """Run each in a thread of its own, again and again for so long; what they raised."""
    errors, stop = [], time.monotonic() + (seconds or 0)

    def run(work):
        try:
            work()
            while time.monotonic() < stop:
                work()
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    return errors
