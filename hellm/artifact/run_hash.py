"""What a run answers by, as a hash: two runs with the same hash give the same lists."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hellm._files import update_digest
from hellm.artifact.files import CONTENT, EMBEDDINGS, HISTORIES, IDS, LANGUAGE_MODEL, SEQUENCE_MODEL, TOWERS

__all__ = ["run_hash"]


def run_hash(run: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits of all files that `Recommender.load` reads, in whichever order safetensors writes a header.

    Measurements, settings and checkpoints are no part of it, nor is the language model that a run only refers to.

    Raises: FileNotFoundError: There is no finished run at `run`.
    """
    folder = Path(run)
    if not (folder / EMBEDDINGS).is_file():
        raise FileNotFoundError(f"{folder} holds no {EMBEDDINGS}: it is no run directory, or the run is not finished")
    files = [folder / name for name in (EMBEDDINGS, IDS, HISTORIES, CONTENT)]
    for part in (LANGUAGE_MODEL, SEQUENCE_MODEL, TOWERS):
        files += sorted(one for one in (folder / part).rglob("*") if not one.name.startswith("."))
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
            start = _add_header(digest, file) if file.suffix == ".safetensors" else 0
            update_digest(digest, file, start)
    return digest.hexdigest()[:16]


def _add_header(digest: Any, file: Path) -> int:
    """Add the header of a safetensors file, sorted. Returns: where the tensors begin."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        try:
            header = json.loads(content.read(size)) if size <= file.stat().st_size else None
        except ValueError:
            header = None
    if header is None:
        # Damaged: `Recommender.load` says so.
        return 0
    digest.update(json.dumps(header, sort_keys=True).encode())
    return 8 + size
