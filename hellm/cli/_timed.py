"""`python -m hellm.cli._timed FILE VERB ...`: a command as `hellm` runs it, with what it took in FILE."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from hellm.cli import main


def peak_bytes() -> int:
    """The most memory that this program has had: of `ru_maxrss`, what came before it does not count on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    code = main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps({"peak": peak_bytes(), "processor_seconds": time.process_time()}))
    sys.exit(code)
