"""Lets the clock jump under commands and under a server; a program for Linux with a C compiler.

    python tests/clocks.py FOLDER --moments N [--seed S] [--only NAME ...]

The time of day jumps several times a second, by seconds, by a day, back to 1970 or on to 2076 (clock_jumps.c). The
commands are those of killed.py: each must come to the same files bit for bit as under a clock that goes right, and the
seconds that it writes down must be some that have passed. "server" is tests/serve/killed.py in such a time: nothing
that was acknowledged may be lost, doubled or out of order. Prints a line for each failure and, last, a JSON object of
counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = {"seconds", "seconds_per_epoch", "valid_seconds", "seconds_per_1000_users"}
SERVER_KILLS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, required=True, help="commands that are run, and one server for each 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="commands, server")
    args = parser.parse_args()
    library = args.folder.resolve() / "clock_jumps.so"
    if str(library) not in os.environ.get("LD_PRELOAD", ""):
        compiler = shutil.which("cc")
        if compiler is None:
            print(json.dumps({"unavailable": "there is no C compiler"}))
            return 0
        args.folder.mkdir(parents=True, exist_ok=True)
        command = [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-Wall",
            "-o",
            str(library),
            str(HERE / "clock_jumps.c"),
            "-ldl",
        ]
        subprocess.run(command, check=True)
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": str(library)})
    clock = ctypes.CDLL(str(library))
    clock.clock_jumps.argtypes = [ctypes.c_uint64]
    import killed

    log = args.folder / "log"
    commands = killed.prepared(args.folder / "inputs", args.only, log) if args.only != ["server"] else {}
    counts = Counter(jumping_seconds=0)
    references = {
        name: killed.reference(command, args.folder / f"{name}-whole", log) for name, command in commands.items()
    }

    def failed(what: str, failure: str) -> None:
        counts["failures"] += 1
        print(f"{what}: {failure}", flush=True)

    for moment in range(args.moments if commands else 0):
        name = list(commands)[moment % len(commands)]
        command, (_, after, _) = commands[name], references[name]
        out = args.folder / f"{name}-{moment}" / "out"
        if command.prepare is not None:
            killed.in_child(lambda command=command, out=out: command.prepare(out), log)

        def work(command=command, out=out, seed=args.seed + moment + 1) -> None:
            clock.clock_jumps(seed)
            command.run(out, False)

        started = time.monotonic()
        counts["moments"] += 1
        try:
            killed.in_child(work, log)
        except RuntimeError as error:
            failed(f"{name}, moment {moment}", str(error))
            continue
        took = time.monotonic() - started
        counts["jumping_seconds"] += round(took)
        if killed.digests(out) != after:
            failed(f"{name}, moment {moment}", f"another outcome, {killed.difference(killed.digests(out), after)}")
        wrong = [found for found in durations(out) if not 0 <= found[2] <= 1000 * took]
        if wrong:
            failed(f"{name}, moment {moment}", f"seconds that have not passed ({took:.1f} have): {wrong[:3]}")
        shutil.rmtree(out.parent)
    if not args.only or "server" in args.only:
        for number in range(max(1, args.moments // 8)):
            command = [sys.executable, str(HERE / "serve/killed.py"), "--moments", str(SERVER_KILLS)]
            command += ["--seed", str(args.seed + number)]
            seed = {"HELLM_CLOCK_SEED": str(args.seed + number + 1)}
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | seed, cwd=HERE.parent)
            counts["servers"] += 1
            if done.returncode:
                failed(f"server {number}", (done.stdout + done.stderr)[-600:])
    print(json.dumps({"failures": 0} | counts))
    return 1 if counts["failures"] else 0


def durations(folder: Path) -> Iterator[tuple[str, str, float]]:
    """(file, name, seconds) of all that is noted."""
    for file in sorted(folder.rglob("*.json*")):
        for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
            yield from ((file.name, *one) for one in _seconds(json.loads(line)))


def _seconds(value) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, one in value.items():
            if name in SECONDS and isinstance(one, (int, float)):
                yield name, one
            else:
                yield from _seconds(one)
    elif isinstance(value, list):
        for one in value:
            yield from _seconds(one)


if __name__ == "__main__":
    sys.exit(main())
