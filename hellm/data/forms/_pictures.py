"""Which picture belongs to which item of a shop: files of the data folder only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from hellm.data.pictures import SUFFIXES

FOLDER = "images"
_SHOWN = 3


def find_pictures(
    folder: Path, item_ids: Sequence[str], named: Sequence[str] | None, notes: list[str]
) -> list[str] | None:
    """Path of each item's picture: the file that the item table names, else `images/{id}.*`.

    Names may have backslashes or another case than the file. Nothing outside the folder is looked at, by whatever name
    or link.

    Args:
        folder: The data folder.
        item_ids: [num_items].
        named: What the table says, [at most num_items], or None.
        notes: Gains what was not found and not used.

    Returns: [num_items] paths, "" where there is none; None where the source has no pictures at all.
    """
    folder = folder.resolve()
    by_name, by_id, others = _listing(folder)
    if named is None and not by_name and not others:
        return None
    absent, outside, addresses, used = [], [], 0, set()
    found = [""] * len(item_ids)
    lower = {stem.lower(): path for stem, path in reversed(by_id.items())}
    for index, one in enumerate(item_ids):
        name = (named[index] if named is not None and index < len(named) else "").strip().replace("\\", "/")
        path = None
        if name.lower().startswith(("http://", "https://", "//", "data:")):
            addresses += 1
        elif name and (PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in name.split("/")):
            outside.append(name)
        elif name:
            path = _named(folder, name, by_name)
            if path is not None and not path.resolve().is_relative_to(folder):
                outside.append(name)
                path = None
            elif path is None:
                absent.append(name)
        if path is None:
            path = by_id.get(one) or lower.get(one.lower())
        if path is not None:
            found[index] = str(path)
            used.add(path)
    _say(notes, len(absent), "images named in the item table are not there", absent)
    _say(notes, len(outside), "images named in the item table lie outside the data folder and are not read", outside)
    if addresses:
        without = [one for one, path in zip(item_ids, found, strict=True) if not path]
        notes.append(
            f"{addresses} images are web addresses, which are not fetched; save them under {FOLDER}/ as ITEM.jpg or "
            f"the like ({len(without)} of {len(found)} items have no picture{': ' if without else ''}{_some(without)})"
        )
    left = sorted(path.name for path in by_name.values() if path not in used)
    _say(notes, len(left), f"pictures in {FOLDER}/ belong to no item, or to one that has another", left)
    _say(notes, len(others), f"files in {FOLDER}/ are not read, as they are no pictures or lie outside", others)
    return found


def _say(notes: list[str], number: int, what: str, names: Sequence[str]) -> None:
    if number:
        notes.append(f"{number} {what}: {_some(names)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _listing(folder: Path) -> tuple[dict[str, Path], dict[str, Path], list[str]]:
    """Pictures under `images/` by lower-case file name and by stem, and the names of other files there."""
    pictures = folder / FOLDER
    by_name: dict[str, Path] = {}
    by_id: dict[str, Path] = {}
    others: list[str] = []
    if not pictures.is_dir() or not pictures.resolve().is_relative_to(folder):
        return by_name, by_id, [FOLDER] if pictures.is_dir() else []
    for file in sorted(pictures.iterdir()):
        if file.name.startswith("."):
            continue
        if file.suffix.lower() in SUFFIXES and file.is_file() and file.resolve().is_relative_to(folder):
            by_name.setdefault(file.name.lower(), file)
            by_id.setdefault(file.stem, file)
        else:
            others.append(file.name)
    return by_name, by_id, others


def _named(folder: Path, name: str, by_name: dict[str, Path]) -> Path | None:
    for path in (folder / name, folder / FOLDER / name):
        # A name may be too long for the file system, or no name at all.
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):
            return None
    parts = PurePosixPath(name).parts
    if len(parts) == 1 or (len(parts) == 2 and parts[0].lower() == FOLDER):
        return by_name.get(parts[-1].lower())
    return None
