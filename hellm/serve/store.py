"""What came while the server ran, on disk: an append-only log in SQLite.

An entry is an event or an item, with a number that rises and a key that the sender chose, under which it is there once.
The log is in WAL mode with `synchronous=FULL`: when `append` returns, its entries survive a kill and a power failure,
and one that was cut off is there as a whole or not at all. Other processes may read meanwhile, for example

    sqlite3 RUN.sqlite "SELECT body FROM entries WHERE kind = 'event' ORDER BY number"
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from hellm._files import DataError, WriteError, reading, writing
from hellm._folders import hold

__all__ = ["Entry", "Store", "read_entries", "state_after"]

_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL,
    features BLOB,
    picture BLOB,
    received REAL NOT NULL,
    UNIQUE (kind, key)
);
CREATE TABLE IF NOT EXISTS learned (
    run_hash TEXT PRIMARY KEY,
    number INTEGER NOT NULL
);
"""
_LARGEST = 2**63 - 1
# SQLite takes at most 999 values in one statement on older builds.
_AT_ONCE = 900
# KiB of the file in memory. SQLite would keep 2 MiB of what was written last, and the system has it in memory anyway.
_CACHE = 256
# Entries in memory at a time; an item has some kilobytes of features.
_PAGE = 256


class Entry(NamedTuple):
    """An event or an item.

    Attributes:
        kind: "event" or "item".
        key: Under which it is there once: the id of the event or of the item.
        body: Plain values: of an event "user" and "item", of an item "title" and "attributes".
        features: Of an item: modality -> [dim] float32.
        picture: The image file of an item, as it came.
        number: In the log; 0 for one that is not there yet.
        encoders: Of an item: modality -> what its features are by, as the run had it then (`Dataset.encoders`).
    """

    kind: str
    key: str
    body: dict[str, Any]
    features: Mapping[str, np.ndarray] = MappingProxyType({})
    picture: bytes | None = None
    number: int = 0
    encoders: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

    def same_as(self, other: Entry) -> bool:
        """Whether the sender said the same, whatever an encoder made of it."""
        return (self.body, self.picture) == (other.body, other.picture)


def state_after(state: str, entry: Entry) -> str:
    """16 hexadecimal digits of a state and of an entry that was taken up in it.

    The entry counts with all by which a model knows it; with the picture, features that were made of it stand for it.
    """
    told = [state, entry.kind, entry.key, entry.body, sorted(entry.features)]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(entry.features):
        digest.update(np.ascontiguousarray(entry.features[name], np.float32).tobytes())
    return digest.hexdigest()[:16]


# What SQLite says of a damaged name is no text.
_DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError)


def read_entries(path: str | os.PathLike[str], after: int = 0, until: int | None = None) -> Iterator[Entry]:
    """What a log holds, also while a server writes to it; nothing of the file is changed.

    Few entries are in memory at a time, however many there are.

    Args:
        path: The file.
        after, until: Numbers: those above the one, up to and with the other; None is all.
    Returns: In their order, without the pictures of items.
    Raises: FileNotFoundError; DataError, the file is no such log, or damaged, or of a later version. Both also while
        entries are taken.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no store {path}")
    query = (
        "SELECT kind, key, body, features, NULL, number FROM entries "
        "WHERE number > ? AND number <= ? ORDER BY number LIMIT ?"
    )
    return _pages(path, query, after, _LARGEST if until is None else until)


def _pages(path: Path, query: str, after: int, until: int) -> Iterator[Entry]:
    """A page is a transaction of its own, so that a long reading holds up no writer."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)
        ) as database:
            _check_format(path, database)
            while rows := database.execute(query, [after, until, _PAGE]).fetchall():
                after = rows[-1][-1]
                yield from (_entry(path, row) for row in rows)
    except _DAMAGED as error:
        raise DataError(f"{path}: not a log of hellm serve, or damaged ({error})") from None


def _check_format(path: Path, database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > _FORMAT:
        raise DataError(f"{path}: format {version} is of a later version; known are 1..{_FORMAT}")


class Store:
    """The log of one server. While it is open, no other can open it for writing.

    Args:
        path: The file; it is made if absent, with `-wal` and `-shm` beside it.

    Raises (all methods):
        DataError: The file is no such log, or damaged, or of a later version.
        WriteError: It cannot be written.
        FolderInUseError: Another process has it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._closing = contextlib.ExitStack()
        self._closing.enter_context(hold(self.path, beside=True))
        try:
            with self._told():
                # Of the thread that writes, and of the one that opens and closes; never of two at once.
                self._database = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
                self._closing.callback(self._database.close)
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=FULL")
                self._database.execute(f"PRAGMA cache_size=-{_CACHE}")
                _check_format(self.path, self._database)
                self._database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_FORMAT}; COMMIT;")
        except BaseException:
            self._closing.close()
            raise

    def close(self) -> None:
        """Free it for others."""
        self._closing.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with writing(self.path):
                yield
        except sqlite3.OperationalError as error:
            raise WriteError(self.path, str(error), disk_is_full="full" in str(error)) from error
        except _DAMAGED as error:
            raise DataError(f"{self.path}: not a log of hellm serve, or damaged ({error})") from None

    @property
    def last(self) -> int:
        """Number of the newest entry; 0 where there is none."""
        with self._told():
            return self._database.execute("SELECT coalesce(max(number), 0) FROM entries").fetchone()[0]

    def entries(self, after: int = 0, until: int | None = None) -> Iterator[Entry]:
        """See `read_entries`."""
        # Another connection, which does not see what is being written.
        return read_entries(self.path, after, until)

    def find(self, kind: str, keys: Sequence[str]) -> dict[str, Entry]:
        """Those that are there, by key."""
        found = {}
        with self._told():
            for start in range(0, len(keys), _AT_ONCE):
                part = list(keys[start : start + _AT_ONCE])
                query = (
                    "SELECT kind, key, body, NULL, picture, number FROM entries "
                    f"WHERE kind = ? AND key IN ({','.join('?' * len(part))})"
                )
                found |= {row[1]: _entry(self.path, row) for row in self._database.execute(query, [kind, *part])}
        return found

    def picture(self, item: str) -> bytes | None:
        """The picture of an item that came, as a file. Any thread may ask."""
        query = "SELECT picture FROM entries WHERE kind = 'item' AND key = ?"
        with self._told(), contextlib.closing(sqlite3.connect(self.path, timeout=30)) as database:
            row = database.execute(query, [item]).fetchone()
        return row[0] if row else None

    def append(self, entries: Sequence[Entry]) -> int:
        """Put entries on disk, all or none.

        Returns: The number of the last.
        """
        now = time.time()
        rows = [(one.kind, one.key, json.dumps(one.body), _packed(one), one.picture, now) for one in entries]
        with self._told():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                columns = "(kind, key, body, features, picture, received) VALUES (?, ?, ?, ?, ?, ?)"
                self._database.executemany(f"INSERT INTO entries {columns}", rows)
                self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise
        return self.last

    def learned(self, run_hash: str) -> int:
        """Number of the last entry that a run was trained with; 0 where nobody said so."""
        with self._told(), contextlib.closing(sqlite3.connect(self.path, timeout=30)) as database:
            row = database.execute("SELECT number FROM learned WHERE run_hash = ?", [run_hash]).fetchone()
        return row[0] if row else 0

    def set_learned(self, run_hash: str, number: int) -> None:
        """Note that a run was trained with the entries up to a number, so that they are not taken up again."""
        with self._told():
            self._database.execute("INSERT OR REPLACE INTO learned VALUES (?, ?)", [run_hash, number])


_ENCODERS = "encoders"


def _packed(entry: Entry) -> bytes | None:
    from safetensors.numpy import save

    if not entry.features:
        return None
    tensors = {name: np.ascontiguousarray(values, np.float32) for name, values in entry.features.items()}
    return save(tensors, {_ENCODERS: json.dumps(dict(entry.encoders))})


def _entry(path: Path, row: tuple) -> Entry:
    """Raises: DataError, a row that SQLite takes for whole and that holds no entry."""
    from safetensors.numpy import load

    kind, key, body, packed, picture, number = row
    with reading(path):
        if packed is None:
            return Entry(kind, key, json.loads(body), {}, picture, number)
        # A safetensors file: the length of its header, the header as JSON, the numbers.
        header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
        encoders = json.loads(header.get("__metadata__", {}).get(_ENCODERS, "{}"))
        return Entry(kind, key, json.loads(body), load(packed), picture, number, encoders)
