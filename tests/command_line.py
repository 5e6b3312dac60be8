"""Reading what commands print."""

from __future__ import annotations

import json
from typing import Any


def last_json(out: str) -> Any:
    """The value that `--json` printed, always on the last line."""
    return json.loads(out.splitlines()[-1])
