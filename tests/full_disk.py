"""Gives commands a disk with too little room and checks what they leave; a program for Linux.

    python tests/full_disk.py FOLDER --moments N [--seed S] [--only NAME ...]

The commands are those of killed.py. The disk is a tmpfs that only this process sees, of which a random part of what
the command needs is free. The command must say in one line that the disk is full, and leave the old folder or the new
one where it replaces one. With room made, the same command must come to the same files bit for bit, and leave nothing
unfinished. Prints a line for each failure and, last, a JSON object of counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000
_REMOUNT, _PRIVATE = 32, 1 << 18 | 1 << 14
ROOM = 1 << 30


def mount(folder: Path) -> None:
    """A tmpfs at `folder` that nobody else sees. Raises: OSError. To be called before there are threads."""
    folder.mkdir(parents=True)
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS if user == 0 else _NEW_USERS | _NEW_MOUNTS)
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, _PRIVATE, None)
    _call("mount", b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={ROOM}".encode())


def resize(folder: Path, num_bytes: int) -> None:
    """Let the tmpfs at `folder` hold `num_bytes`. Raises: OSError."""
    _call("mount", b"tmpfs", bytes(folder), b"tmpfs", _REMOUNT, f"size={max(num_bytes, 4096)}".encode())


def used(folder: Path) -> int:
    """Bytes that the disk of `folder` holds."""
    seen = os.statvfs(folder)
    return (seen.f_blocks - seen.f_bfree) * seen.f_frsize


def _call(name: str, *arguments) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="commands")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    disk = args.folder / "disk"
    try:
        mount(disk)
    except OSError as error:
        print(json.dumps({"unavailable": f"no file system of a given size can be made here ({error})"}))
        return 0
    import killed

    log = args.folder / "log"
    commands = killed.prepared(args.folder / "inputs", args.only, log)
    rng, counts, references, needs = random.Random(args.seed), Counter(), {}, {}
    for name, command in commands.items():
        before = used(disk)
        references[name] = killed.reference(command, disk / f"{name}-whole", log)
        needs[name] = used(disk) - before
        killed.in_child(lambda name=name: _remove(disk / f"{name}-whole"), log)
    for moment in range(args.moments):
        name = list(commands)[moment % len(commands)]
        place = disk / f"{name}-{moment}"
        failures = attempt(commands[name], place / "out", references[name], rng.random() * needs[name], log, counts)
        counts["moments"] += 1
        counts["failures"] += bool(failures)
        for failure in failures:
            print(f"{name}, moment {moment}: {failure}", flush=True)
        resize(disk, ROOM)
        _remove(place)
    print(json.dumps(counts))
    return 1 if counts["failures"] else 0


def attempt(command, out: Path, whole, room: float, log: Path, counts: Counter) -> list[str]:
    import killed

    disk, (before, after, _), failures = out.parent.parent, whole, []
    if command.prepare is not None:
        killed.in_child(lambda: command.prepare(out), log)
    resize(disk, used(disk) + int(room))
    try:
        killed.in_child(lambda: command.run(out, False), log)
    except RuntimeError as error:
        counts["full"] += 1
        # A call in place of a command ends with 70, and its error.
        said = log.read_text(errors="replace").strip().splitlines() or [""]
        if "the disk is full" not in said[-1] or not str(error).startswith(("exit code 2:", "exit code 70:")):
            failures.append(f"does not say in a line that the disk is full, {str(error)[:400]}")
    if before is not None:
        state = killed.digests(out) if out.is_dir() else None
        counts["old"] += state == before
        if state not in (before, after):
            failures.append(f"neither the old nor the new folder, {killed.difference(state or {}, after)}")
    resize(disk, ROOM)
    try:
        killed.in_child(lambda: command.run(out, True), log)
    except RuntimeError as error:
        return [*failures, f"the command does not go on, {error}"]
    if killed.digests(out) != after:
        failures.append(f"another outcome, {killed.difference(killed.digests(out), after)}")
    left = [one.name for one in out.parent.rglob("*") if killed.UNFINISHED.fullmatch(one.name)]
    if left:
        failures.append(f"left behind: {left}")
    return failures


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
