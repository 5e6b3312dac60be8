"""Encoded rows on disk, so that a killed run goes on and a changed item costs one row."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hellm._files import WriteError, writing
from hellm._folders import cache_folder
from hellm.data import DataError

__all__ = ["FeatureCache", "content_key", "default_cache", "encoder_key", "file_key"]

logger = logging.getLogger(__name__)

# SQLite takes at most 999 values in one statement on older builds.
_AT_ONCE = 900


def default_cache() -> Path | None:
    """`$XDG_CACHE_HOME/hellm` or `~/.cache/hellm`; None, with a warning, where that cannot be written."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:
        logger.warning(
            "the cache of encoded texts and pictures cannot be written (%s), so nothing is kept for the next time; "
            "--cache names another folder",
            error,
        )
        return None


def content_key(content: bytes) -> bytes:
    """16 bytes that stand for what an encoder is given."""
    return hashlib.sha256(content).digest()[:16]


def file_key(path: str | Path) -> bytes:
    """`content_key` of what a file holds, in little memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()[:16]


def encoder_key(weights: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Hex digest of an encoder's weights (name -> tensor) and settings.

    It is of the weights rather than of the name, because a folder may be filled anew and a hub name may move on.
    """
    import torch

    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class FeatureCache:
    """Rows of float32 by encoder and content, in `features.sqlite` of a folder.

    Each `put` is one transaction: after a kill the file holds every earlier one, whole. Processes may share it.

    Args:
        folder: Made if absent.
        encoder: See `encoder_key`.

    Raises (all methods):
        DataError: The file that is there is no such cache, or is damaged.
        WriteError: It cannot be written.
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.path, self.encoder = Path(folder) / "features.sqlite", encoder
        columns = "encoder TEXT, content BLOB, value BLOB, PRIMARY KEY (encoder, content)"
        with self._transaction() as database:
            database.execute(f"CREATE TABLE IF NOT EXISTS rows ({columns})")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with writing(self.path), closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                yield database
        except sqlite3.OperationalError as error:
            # Locked for a minute, read-only, or a folder without rights.
            raise WriteError(self.path, str(error)) from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: not a feature cache ({error}); remove it or name another folder") from None

    def get(self, contents: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The rows [dim] float32 that are there, by content."""
        found: dict[bytes, np.ndarray] = {}
        with self._transaction() as database:
            for start in range(0, len(contents), _AT_ONCE):
                part = list(contents[start : start + _AT_ONCE])
                marks = ",".join("?" * len(part))
                query = f"SELECT content, value FROM rows WHERE encoder = ? AND content IN ({marks})"
                for content, value in database.execute(query, [self.encoder, *part]):
                    found[content] = np.frombuffer(value, np.float32)
        return found

    def put(self, rows: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Add rows (content, [dim] float32)."""
        values = [(self.encoder, content, np.ascontiguousarray(row, np.float32).tobytes()) for content, row in rows]
        with self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", values)
