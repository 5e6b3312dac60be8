"""On which GPUs each backend has passed the self-test: in this release, and on this machine.

A result counts for the very code that was tested: what `hellm info --selftest` finds on this machine is kept with the
key of the backend, of that code and of the versions of what it stands on; what comes with the release with a digest of
its source. Nothing is read or digested until a GPU tensor asks for a choice.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

# Backend -> architecture ("sm_90") -> source digest of what passed the whole self-test when this release was made.
RELEASE: dict[str, dict[str, str]] = {}


class Tested(Protocol):
    """A backend whose results are kept."""

    name: str

    def source_digest(self) -> str: ...

    def key(self) -> list[str | None]: ...


def path() -> Path:
    """Where the results of this machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hellm" / "verified.json"


def tested(backend: Tested, architecture: str) -> bool:
    """Whether there is any result of a backend on an architecture; asks nothing of the backend."""
    return f"{backend.name} {architecture}" in of_this_machine() or architecture in RELEASE.get(backend.name, {})


def passed(backend: Tested, architecture: str) -> bool:
    """Whether the self-test of a backend, which is available, passed there with the code and versions in use."""
    here = of_this_machine().get(f"{backend.name} {architecture}")
    if here is not None and here["key"] == backend.key():
        return here["ok"] is True
    return RELEASE.get(backend.name, {}).get(architecture) == backend.source_digest()


def record(rows: Iterable[Mapping[str, Any]], backends: Mapping[str, Tested]) -> None:
    """Keep what the rows of `hellm.selftest.selftest` say of these backends; without any, nothing is written."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["backend"] in backends:
            name = f"{row['backend']} {row['instruction_set']}"
            ok = row["ok"] and (name not in found or found[name]["ok"])
            found[name] = {"ok": ok, "key": backends[row["backend"]].key()}
    if not found:
        return
    path().parent.mkdir(parents=True, exist_ok=True)
    unfinished = path().with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"results": of_this_machine() | found}), encoding="utf-8")
    unfinished.replace(path())
    of_this_machine.cache_clear()


@functools.cache
def of_this_machine() -> dict[str, dict[str, Any]]:
    """Backend and architecture -> {"ok", "key"}; nothing when the file is unreadable, of another form or not there."""
    try:
        results = json.loads(path().read_text(encoding="utf-8"))["results"]
        return {name: {"ok": one["ok"], "key": one["key"]} for name, one in results.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def digest(files: Iterable[Path]) -> str:
    """Of the names and the content of files."""
    found = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        found.update(f"{file.name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:32]
