"""Giving commands, and reading what they print."""

from __future__ import annotations

import json
from typing import Any

FAST = ["--preset", "demo", "--num-threads", "1", "--tensorboard", "false", "--batch-size", "64"]


def last_json(out: str) -> Any:
    """The value that `--json` printed, always on the last line."""
    return json.loads(out.splitlines()[-1])
