"""On which GPUs each backend has passed the self-test: in this release, and on this machine.

What `hellm info --selftest` finds on this machine goes before what the release says.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

# Backend -> architectures ("sm_90") on which the whole self-test passed when this release was made.
RELEASE: dict[str, frozenset[str]] = {"triton": frozenset()}


def path() -> Path:
    """Where the results of this machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hellm" / "verified.json"


def passed(backend: str, architecture: str) -> bool:
    """Whether the self-test of a backend passed on an architecture; False if it was never run there."""
    return _of_this_machine().get(f"{backend} {architecture}", architecture in RELEASE.get(backend, ()))


def record(rows: Iterable[Mapping[str, Any]], backends: Iterable[str]) -> None:
    """Keep what the rows of `hellm.ops._selftest.selftest` say of GPU backends; without any, nothing is written."""
    found: dict[str, bool] = {}
    for row in rows:
        if row["backend"] in backends:
            key = f"{row['backend']} {row['instruction_set']}"
            found[key] = found.get(key, True) and row["ok"]
    if not found:
        return
    text = json.dumps({"versions": _versions(), "passed": _of_this_machine() | found})
    path().parent.mkdir(parents=True, exist_ok=True)
    unfinished = path().with_suffix(f".{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path())
    _of_this_machine.cache_clear()


def _versions() -> list[str]:
    from hellm import __version__

    return [__version__, torch.__version__]


@functools.cache
def _of_this_machine() -> dict[str, bool]:
    """Backend and architecture -> passed; nothing when the file is of other versions, unreadable or not there."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        return content["passed"] if content["versions"] == _versions() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
