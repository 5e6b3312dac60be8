"""A file that appears whole or not at all, and what is said when it cannot."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["DataError", "WriteError", "append_line", "atomic_path", "read_json", "reading", "update_digest", "writing"]

# What numpy, SQLite and writers in Rust say in place of an OSError.
_FULL = re.compile(r"\d+ requested and \d+ written|No space left on device|disk is full", re.IGNORECASE)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Bytes read at once.
_BLOCK = 1 << 20


class DataError(ValueError):
    """A file or folder that does not hold what it must; the message names file, line and column where known."""


class WriteError(OSError):
    """A file cannot be written; the message says which and why.

    Attributes:
        disk_is_full: whether that is the reason, or a quota.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, *, disk_is_full: bool = False) -> None:
        super().__init__(f"{os.fspath(path)} cannot be written: {reason}")
        self.disk_is_full = disk_is_full


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises: WriteError naming `path`, in place of whatever a writer raises for a full disk, missing rights, ..."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number, text = getattr(error, "errno", None), str(error)
        if number is None and (found := _OS_ERROR.search(text)):
            number = int(found[1])
        if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and _FULL.search(text)):
            raise WriteError(path, "the disk is full", disk_is_full=True) from error
        if number is None:
            raise
        raise WriteError(path, os.strerror(number).lower()) from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto it when the block ends well and removed when it does not.

    The content is on disk before the name changes, so `path` holds the old or the new file, never a part of one.

    Raises: WriteError, where the system cannot write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # Some writers make private files of their own; the result has the permissions of any new file.
            temporary.chmod(mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def append_line(path: str | os.PathLike[str], line: str, *, mode: int = 0o666) -> None:
    """Add a line to a file, whole or not at all; a new file has the rights of `mode`. Raises: WriteError."""

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with writing(path), open(path, "ab", buffering=0, opener=opened) as file:
        length = file.seek(0, os.SEEK_END)
        try:
            content = (line + "\n").encode("utf-8")
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(length)
            raise


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises: DataError naming `path`, in place of what a library raises for a file that is not what it must be.

    Errors of the system stay, as does a package that is missing, and a ValueError that names the file already.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError):
        raise
    except BaseException as error:
        # Libraries in Rust panic at some damaged files, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ValueError) and os.fspath(path) in str(error):
            raise
        raise DataError(f"{os.fspath(path)}: damaged, or not the file that must be there ({error})") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. Raises: FileNotFoundError; DataError naming the file, for anything else in it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{os.fspath(path)}: damaged, not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{os.fspath(path)}: damaged, must hold a JSON object, got {type(value).__name__}")
    return value


def update_digest(digest: Any, path: str | os.PathLike[str], start: int = 0) -> None:
    """Add the bytes of a file from `start` on to a digest of `hashlib`, a block at a time."""
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            digest.update(block)
