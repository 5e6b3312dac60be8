"""Folders that this program makes: marked as its own, held by one process at a time, replaced whole or not at all.

A marked folder holds `.hellm.json`, which says what kind of folder it is and which files are part of it. Nothing is
ever deleted but such files: a folder without the mark, or with a file that its mark does not name, is left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import glob
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hellm._files import WriteError, atomic_path, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "FolderInUseError",
    "cache_folder",
    "check_target",
    "clear_folder",
    "hold",
    "mark_folder",
    "new_folder",
    "read_mark",
]

logger = logging.getLogger(__name__)

_MARK, _LOCK, _FORMAT = ".hellm.json", ".hellm.lock", 1
# What writers of this program leave when they are killed, by the name of what they were writing.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?:lock|\d+\.tmp|[0-9a-f]{8}\.(?:new|old))")
# What safetensors writes before it gives a file its name.
_TEMPORARY = re.compile(r"\.tmp[0-9A-Za-z]{6}")
# What file managers put anywhere.
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
# Of 255 bytes, less what temporary names add.
_MAX_NAME = 200

Path_ = str | os.PathLike[str]


class FolderInUseError(OSError):
    """Another process writes into the folder."""


def cache_folder() -> Path:
    """What is kept for the next time: `$XDG_CACHE_HOME/hellm` or `~/.cache/hellm`. Raises: RuntimeError, no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hellm"


def read_mark(folder: Path_) -> dict[str, Any] | None:
    """What `.hellm.json` of a folder says ("kind", "format", "files" or "layout"); None where there is none.

    Raises: ValueError, a damaged one, or one of a later version.
    """
    file = Path(folder) / _MARK
    try:
        mark = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error})") from None
    if not isinstance(mark, dict) or mark.get("made_by") != "hellm" or not isinstance(mark.get("format"), int):
        raise ValueError(f"{file}: must be the mark of a folder made by hellm")
    if mark["format"] > _FORMAT:
        raise ValueError(f"{file}: format {mark['format']} is of a later version of hellm; known are 1..{_FORMAT}")
    return mark


def mark_folder(folder: Path_, kind: str, *, layout: Sequence[str] | None = None) -> None:
    """Mark a folder as made by this program.

    Args:
        folder: The folder.
        kind: What it is: "run", "data", ...
        layout: Patterns of the files that belong to it, segment by segment, for a folder that grows. None is all that
            are there now, with their sizes.
    """
    folder = Path(folder)
    mark: dict[str, Any] = {"made_by": "hellm", "kind": kind, "format": _FORMAT}
    if layout is not None:
        mark["layout"] = list(layout)
        if read_mark(folder) == mark:
            return
    else:
        files = sorted(one for one in folder.rglob("*") if one.is_file() and one.name != _MARK)
        mark["files"] = {one.relative_to(folder).as_posix(): one.stat().st_size for one in files}
    with atomic_path(folder / _MARK) as temporary:
        temporary.write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def check_target(
    path: Path_,
    *,
    kind: str,
    layout: Sequence[str] = (),
    resume: bool | None = None,
    overwrite: bool = False,
    inputs: Iterable[Path_ | None] = (),
    proof: str | None = None,
) -> None:
    """Whether a folder may be written; changes nothing, and is for calling before any work.

    Args:
        path: Folder to make, to go on with or to replace.
        kind: What it is to be, see `mark_folder`.
        layout: Of that kind.
        resume: Go on with what is there; None, for kinds that are made in one go.
        overwrite: Replace what is there.
        inputs: What is read. A folder that holds any of it is not replaced, nor one with the working directory or the
            home directory in it.
        proof: A folder without a mark is gone on with if it holds a folder of this name and nothing outside `layout`:
            earlier versions wrote no marks.

    Raises:
        FileExistsError: The folder holds something, and neither `resume` nor `overwrite` is given, or what it holds is
            not known to be made by this program.
        ValueError: Both are given, or the path cannot be a folder.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite must not both be given")
    folder = _resolved(path)
    for one in (folder, *folder.parents):
        if one.exists() and not one.is_dir():
            shown = path if one == folder else one
            raise FileExistsError(f"{shown} is a file; give another folder")
    if not folder.is_dir() or _is_empty(folder):
        return
    if not (resume or overwrite):
        on = "" if resume is None else "resume=True goes on with it, "
        raise FileExistsError(f"{path} is not empty; {on}overwrite=True replaces it, or give another folder")
    if overwrite:
        _check_protected(path, folder, inputs)
    mark = read_mark(folder)
    if mark is None:
        if resume and proof is not None and (folder / proof).is_dir() and _first_outside(folder, layout) is None:
            return
        owner = read_mark(folder.parent)
        if overwrite and owner is not None and _first_outside(folder, owner.get("layout", ()), folder.parent) is None:
            # A part of a folder that is marked as a whole.
            return
        raise FileExistsError(
            f"{path} holds no {_MARK}, so hellm did not make it (or an earlier version did), and nothing in it is "
            "replaced; give another folder, or delete it yourself"
        )
    if mark["kind"] != kind:
        raise FileExistsError(f"{path} is a {mark['kind']} folder, not a {kind} folder; give another folder")
    if overwrite and (foreign := _first_foreign(folder, mark)) is not None:
        raise FileExistsError(
            f"{path} holds {foreign}, which hellm did not write or which was changed since, so nothing there is "
            "replaced; move it away, or give another folder"
        )


def clear_folder(folder: Path_, *, first: Iterable[Path] = (), last: Iterable[Path] = ()) -> None:
    """Delete what is in a marked folder, but for the mark and the lock: `first`, then the others, then `last`."""
    first, last = list(first), list(last)
    kept = {*last, *(parent for one in last for parent in one.parents)}
    for one in first:
        _delete(one)
    for one in Path(folder).iterdir():
        if one.name not in (_MARK, _LOCK) and one not in kept:
            _delete(one)
    for one in last:
        _delete(one)
    for one in Path(folder).iterdir():
        if one.name not in (_MARK, _LOCK):
            _delete(one)


_held: dict[str, int] = {}
_held_changes = threading.Lock()


@contextlib.contextmanager
def hold(path: Path_, *, beside: bool = False) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made if absent; what a killed one left is removed.

    The system frees it when the process ends, however it ends. A thread may hold what it holds already.

    Args:
        path: The folder.
        beside: The lock stands beside the folder, which is not made then: for folders that are replaced as a whole.
    Raises: FolderInUseError, saying which process writes there. WriteError, the folder cannot be made or written.
    """
    folder = _resolved(path)
    file = folder.with_name(f".{folder.name}.lock") if beside else folder / _LOCK
    key = str(file)
    with _held_changes:
        mine = _held.get(key) == threading.get_ident()
    if mine:
        yield
        return
    made = _make(file.parent, path)
    try:
        descriptor = _lock(file, path)
        with _held_changes:
            _held[key] = threading.get_ident()
        try:
            for one in _unfinished(folder, beside=beside):
                _delete(one)
            yield
        finally:
            with _held_changes:
                _held.pop(key, None)
            # Removed before it is freed, so nobody waits on a file that is gone.
            with contextlib.suppress(OSError):
                file.unlink()
            os.close(descriptor)
    finally:
        if made and not beside and [one.name for one in folder.iterdir()] == [_MARK]:
            _delete(folder / _MARK)
        for one in made:
            with contextlib.suppress(OSError):
                one.rmdir()


@contextlib.contextmanager
def new_folder(
    path: Path_,
    *,
    kind: str = "data",
    overwrite: bool = False,
    inputs: Iterable[Path_ | None] = (),
) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `path`, marked, when the block ends well, and is removed if not.

    At every moment there is the old folder or the new one, whole. A link is followed: what it points to is replaced.

    Args:
        path: Folder to make.
        kind, overwrite, inputs: See `check_target`.
    Raises: As `check_target` and `hold`; WriteError, naming the file.
    """
    check_target(path, kind=kind, overwrite=overwrite, inputs=inputs)
    folder = _resolved(path)
    if folder.is_dir():
        _check_protected(path, folder, ())
        if os.path.ismount(folder):
            raise FileExistsError(f"{path} is a mount point, which cannot be replaced; give a folder in it")
    with hold(path, beside=True):
        _restore(folder)
        check_target(path, kind=kind, overwrite=overwrite, inputs=inputs)
        new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.new")
        try:
            with _naming_the_file(new, Path(path)):
                new.mkdir()
                yield new
                for file in new.rglob("*"):
                    if file.is_file():
                        _sync(file)
                mark_folder(new, kind)
            with writing(path):
                _replace(new, folder)
        finally:
            _delete(new)


def _resolved(path: Path_) -> Path:
    """The folder itself behind links. Raises: ValueError, a name that not all writers can take."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{os.fspath(path)!r}: the name of a folder to write must be UTF-8") from None
    if "\0" in os.fspath(path):
        raise ValueError(f"{os.fspath(path)!r}: the name of a folder to write must hold no NUL")
    folder = Path(os.path.realpath(path))
    if len(folder.name.encode("utf-8")) > _MAX_NAME:
        raise ValueError(f"{path}: the name of a folder to write must be at most {_MAX_NAME} bytes long")
    return folder


def _is_empty(folder: Path) -> bool:
    return all(one.name == _LOCK or _is_unfinished_mark(one) for one in folder.iterdir())


def _is_unfinished_mark(file: Path) -> bool:
    unfinished = _UNFINISHED.fullmatch(file.name)
    return unfinished is not None and unfinished["name"] == _MARK


def _check_protected(path: Path_, folder: Path, inputs: Iterable[Path_ | None]) -> None:
    """Raises: FileExistsError, if the folder is or holds what must stay."""
    protected = [(Path.cwd, "the working directory"), (Path.home, "the home directory")]
    protected += [(lambda one=one: Path(one), f"{one}, which is read") for one in inputs if one is not None]
    own = folder.stat()
    for find, what in protected:
        try:
            real = Path(os.path.realpath(find()))
        except (OSError, RuntimeError):
            continue
        for one in (real, *real.parents) if real.exists() else ():
            # Not by name: case, mounts and links give one folder several.
            if os.path.samestat(own, one.stat()):
                how = "is" if one == real else "holds"
                raise FileExistsError(f"{path} {how} {what}, so it is not replaced; give another folder")


def _first_foreign(folder: Path, mark: dict[str, Any]) -> str | None:
    """The first file in a folder that its mark does not name, relative to the folder; None if there is none."""
    return _first_unlisted(folder, mark["files"]) if "files" in mark else _first_outside(folder, mark["layout"])


def _first_outside(folder: Path, layout: Iterable[str], top: Path | None = None) -> str | None:
    """The first file in a folder that no pattern names; patterns and the result are relative to `top`.

    A folder within may have a mark of its own, which then decides, if it stands where the layout has files.
    """
    top, patterns = top or folder, [one.split("/") for one in layout]
    for one in sorted(folder.iterdir()):
        if one.name in (_MARK, _LOCK) or one.name in _LITTER or _TEMPORARY.fullmatch(one.name):
            continue
        if _is_unfinished_mark(one):
            continue
        parts, relative = list(one.relative_to(top).parts), one.relative_to(top).as_posix()
        if unfinished := _UNFINISHED.fullmatch(one.name):
            parts[-1] = unfinished["name"]
            if not any(_matches(parts, pattern[: len(parts)]) for pattern in patterns):
                return relative
        elif one.is_dir() and not one.is_symlink():
            if not any(len(pattern) > len(parts) and _matches(parts, pattern[: len(parts)]) for pattern in patterns):
                return relative
            mark = read_mark(one)
            inside = _first_outside(one, layout, top) if mark is None else _first_foreign(one, mark)
            if inside is not None:
                return inside if mark is None else f"{relative}/{inside}"
        elif one.is_symlink() or not any(_matches(parts, pattern) for pattern in patterns):
            return relative
    return None


def _first_unlisted(folder: Path, files: dict[str, int]) -> str | None:
    """The first file that a list does not have, or has with another size."""
    for top, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        for name in sorted([*names, *links]):
            one = Path(top, name)
            relative = one.relative_to(folder).as_posix()
            # A folder within may have a mark of its own, and marks are in no list.
            if relative == _LOCK or name == _MARK or name in _LITTER:
                continue
            if one.is_symlink() or files.get(relative) != one.stat().st_size:
                return relative
    return None


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(parts) == len(pattern) and all(fnmatch.fnmatchcase(*pair) for pair in zip(parts, pattern, strict=True))


def _make(folder: Path, shown: Path_) -> list[Path]:
    """Make a folder with its parents. Returns: those that were made, the innermost first."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing(shown):
        folder.mkdir(parents=True, exist_ok=True)
    return made


def _lock(file: Path, shown: Path_) -> int:
    """An open descriptor whose lock is ours."""
    while True:
        with writing(shown):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file after it was opened here.
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FolderInUseError(
                f"{shown} is being written by {holder}; wait until it has ended, or give another folder"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                os.close(descriptor)
                raise
            logger.warning("%s: this file system has no locks; see that no other process writes there", shown)
            break
        os.close(descriptor)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    # Only for the message of another process, so a full disk is no reason to stop.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _unfinished(folder: Path, *, beside: bool) -> list[Path]:
    """What killed writers left in a folder that is held, or of one that is to be replaced."""
    if beside:
        names = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(?:new|old)")
        found = [one for one in folder.parent.iterdir() if names.fullmatch(one.name)]
        # Without the folder itself, the old one is all there is.
        return [one for one in found if folder.exists() or one.suffix == ".new"]
    found, folders = [], [folder]
    while folders:
        for one in folders.pop().iterdir():
            if one.name != _LOCK and (_UNFINISHED.fullmatch(one.name) or _TEMPORARY.fullmatch(one.name)):
                found.append(one)
            elif one.is_dir() and not one.is_symlink() and not (one / _MARK).exists():
                folders.append(one)
    return found


def _restore(folder: Path) -> None:
    """Put back what a writer had moved away when it was killed."""
    if not folder.exists():
        for one in folder.parent.glob(f".{glob.escape(folder.name)}.*.old"):
            one.rename(folder)
            return


def _replace(new: Path, folder: Path) -> None:
    """Give `new` the name of `folder`; what had it is deleted."""
    if folder.exists():
        new.chmod(folder.stat().st_mode)
    if not folder.exists() or not any(folder.iterdir()):
        new.rename(folder)
    elif not _exchange(new, folder):
        old = new.with_suffix(".old")
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        _delete(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, on systems that can (Linux, on most file systems)."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    rename: Callable[..., int] | None = getattr(library, "renameat2", None)
    if rename is None:
        return False
    here, swap = -100, 2
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextlib.contextmanager
def _naming_the_file(new: Path, path: Path) -> Iterator[None]:
    """Raises: WriteError naming the file that was being written, as it would have been called."""
    try:
        with writing(path):
            yield
    except WriteError as error:
        files = sorted((one for one in new.rglob("*") if one.is_file()), key=lambda one: one.stat().st_mtime_ns)
        if not files:
            raise
        reason = str(error).rpartition(" cannot be written: ")[2]
        name = files[-1].relative_to(new)
        raise WriteError(path / name, reason, disk_is_full=error.disk_is_full) from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _sync(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
