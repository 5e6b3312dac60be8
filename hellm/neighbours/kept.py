"""Found neighbours in files, so that no later run searches the same again.

Each file is named by a digest of all that its content depends on, the values of the features included, so none can be
out of date. Files are written whole; one that is damaged or of something else counts as absent. The folder may be
deleted at any time; beyond 4 GiB, what was not used for longest is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hellm._files import atomic_path
from hellm._mapped import read_blocks

__all__ = ["MOST_BYTES", "key_of", "read_found", "write_found"]

logger = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
"""Of all files; a single one that is larger is not written."""
_FORM, _FOLDER, _SUFFIX = "hellm neighbours 1", "neighbours", ".safetensors"
# Of what a killed writer leaves.
_DAY = 86400.0
# Threads of a process would share a temporary name.
_WRITING = threading.Lock()


def key_of(values: np.ndarray, mask: np.ndarray, **settings: Any) -> str:
    """Hex digest of features and of how they are searched."""
    digest = hashlib.sha256(json.dumps([_FORM, sorted(settings.items()), values.shape, values.dtype.str]).encode())
    digest.update(np.ascontiguousarray(mask).data)
    for _, block in read_blocks(values):
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def read_found(folder: Path, key: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor, float | None] | None:
    """Rows [N, K] int64, similarities [N, K] and recall as they were written; None where they are not there."""
    from safetensors import SafetensorError, safe_open

    path = _path(folder, key)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            rows, similarities = file.get_tensor("rows"), file.get_tensor("similarities")
        recall = json.loads(metadata["recall"])
        if metadata["key"] != key or metadata["digest"] != _digest(rows, similarities) or rows.shape != shape:
            return None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return rows.long(), similarities, recall


def write_found(folder: Path, key: str, rows: Tensor, similarities: Tensor, recall: float | None) -> None:
    """Keep rows [N, K] and similarities [N, K], where the disk takes them."""
    from safetensors.torch import save_file

    rows = (rows.int() if len(rows) < 2**31 else rows).cpu().contiguous()
    similarities, path = similarities.cpu().contiguous(), _path(folder, key)
    if rows.nbytes + similarities.nbytes > MOST_BYTES:
        return
    metadata = {"key": key, "digest": _digest(rows, similarities), "recall": json.dumps(recall)}
    try:
        with _WRITING:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({"rows": rows, "similarities": similarities}, temporary, metadata=metadata)
            _trim(path.parent)
    except OSError as error:
        logger.debug("neighbours are not kept for the next time: %s", error)


def _path(folder: Path, key: str) -> Path:
    return folder / _FOLDER / f"{key}{_SUFFIX}"


def _digest(rows: Tensor, similarities: Tensor) -> str:
    digest = hashlib.sha256()
    for one in (rows, similarities):
        digest.update(f"{one.dtype} {tuple(one.shape)}".encode())
        digest.update(one.numpy().data)
    return digest.hexdigest()


def _trim(folder: Path) -> None:
    """Delete what was not used for longest until the rest is within `MOST_BYTES`, and what killed writers left."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.suffix == _SUFFIX:
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
            elif path.suffix == ".tmp" and path.stat().st_mtime < time.time() - _DAY:
                path.unlink()
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= MOST_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        left -= size
