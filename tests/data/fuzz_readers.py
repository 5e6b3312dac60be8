"""Damaged files for every reader: each must give a data set, or a DataError that names the file.

`python tests/data/fuzz_readers.py --count 10000` prints a line for each reader and exits with 1 if one did otherwise.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from hellm.data import DataError, load_dataset, save_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.datasets import make_dataset

WRITTEN = ("hellm", "recbole", "mmrec", "lattice", "json", "sasrec", "shop")
READERS = (*WRITTEN, "shop tables", "shop parquet", "amazon", "amazon gz")
MOST_SECONDS = 10.0
MOST_BYTES = 2 << 30
WORDS = [b"NaN", b"nan", b"null", b"NULL", b"None", b"-1", b"0", b"1.0", b"1e308", b"-1e400", b"4000000000", b"9" * 25,
         b"9" * 5000, b"inf", b"2024-05-31", b"2024-02-30 25:00", b'""', b'"', b"'", b"[", b"]", b"{", b"}", b"[[[[",
         b"\\", b"\x00", b"\xff", b"\xe9", "é".encode(), b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\r\n", b"\t",
         b",", b";", b"|", b" ", b":token", b"true", b"a" * 300, b"{}", b"[]", b"\xed\xa0\x80", b"user", b"item",
         b"sep=;\n", b"../../etc/passwd", b"http://x/y.png", b"*", b"?", b"10000000000000000000"]  # fmt: skip
ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1252", "cp500", "shift_jis")
SHOP = """user_id,item_id,event_time,event_type,price
ann,7,2024-05-31 14:00:00,buy,"1,5"
"b, ob",8,2024-05-31T14:00Z,view,2
ann,8,1717164000,buy,3
"""
REVIEWS = "".join(
    f'{{"reviewerID": "{user}", "asin": "{item}", "unixReviewTime": {at}, "overall": 5.0}}\n'
    for user, item, at in (("A", "x", 1), ("B", "y", 2), ("A", "y", 3))
)


def make_source(reader: str, folder: Path) -> None:
    """A small sound data set of one reader."""
    if reader in WRITTEN:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_dataset(replace(make_dataset(), name="toy"), folder, form=reader)
        return
    folder.mkdir()
    if reader == "shop parquet":
        lists = {"user": ["a", "b", "a"], "item": [["x"], ["x", "y"], ["z"]], "time": [1.5, 2.0, 3.0]}
        pl.DataFrame(lists).write_parquet(folder / "events.parquet")
        pl.DataFrame({"item": ["x", "y", "z"], "title": ["X", None, "Z"]}).write_parquet(folder / "items.parquet")
    elif reader == "shop tables":
        (folder / "events.csv").write_text(SHOP)
        (folder / "items.csv").write_text('item_id,title,image,colour\n7,"19"" screen",images\\7.png,red|blue\n8,B,,\n')
    elif reader == "amazon":
        (folder / "reviews_T.json").write_text(REVIEWS)
        (folder / "meta_T.json").write_text("{'asin': 'x', 'title': 'X', 'categories': [['a', 'b']]}\n")
    else:
        with gzip.open(folder / "reviews_T.json.gz", "wt") as file:
            file.write(REVIEWS)


def damage(folder: Path, chance: random.Random) -> str:
    """Change one file of a folder in up to four ways; gives its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = chance.choice(files)
    data = path.read_bytes()
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = _damaged(data, chance)
    path.write_bytes(data)
    return str(path.relative_to(folder))


def _damaged(data: bytes, chance: random.Random) -> bytes:
    at, other = (chance.randint(0, len(data)) for _ in range(2))
    start, end = min(at, other), min(max(at, other), min(at, other) + 40)
    way = chance.randrange(13)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if way == 2:
        return data[:start] + data[end:]
    if way == 3:
        return data[:at] + data[start:end] + data[at:]
    if way in (4, 5):
        return data[:at] + chance.choice(WORDS) + data[at:]
    if way == 6:
        return data[:start] + chance.choice(WORDS) + data[end:]
    if way == 7:
        return data[:at] + bytes(chance.randrange(256) for _ in range(chance.randint(1, 20))) + data[at:]
    if way == 8:
        return data.decode("utf-8", "replace").encode(chance.choice(ENCODINGS), "replace")
    if way == 9:
        lines = data.split(b"\n")
        chance.shuffle(lines)
        return b"\n".join(lines)
    if way == 10:
        return data.replace(b"\n", chance.choice([b"\r", b"\r\n", b"\n\n", b""]))
    if way == 11:
        return data.replace(
            chance.choice([b",", b"\t", b" ", b'"']), chance.choice([b";", b"|", b"\t", b",", b"", b'"'])
        )
    return data.split(b"\n", 1)[-1] if chance.random() < 0.5 else data * 2


def read(folder: Path) -> tuple[str, str]:
    """How a reader ends: "data", "error" (a DataError that names the file), or "wrong", with the words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = load_dataset(folder)
            dataset.item_attributes  # noqa: B018
    except DataError as error:
        named = str(folder) in str(error)
        return ("error" if named else "wrong"), str(error)
    except BaseException as error:
        return "wrong", f"{type(error).__name__}: {error}"
    finite = dataset.timestamps is None or np.isfinite(dataset.timestamps).all()
    return ("data" if finite else "wrong"), "times that are not finite"


def try_one(reader: str, seed: int, place: Path) -> tuple[str, str, float]:
    """Damage a fresh copy of a reader's files and read it: how it ends, the words, seconds of processor time."""
    source, folder = place / "source", place / "case"
    if not source.exists():
        make_source(reader, source)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    name = damage(folder, random.Random(f"{reader} {seed}"))
    started = time.process_time()
    end, words = read(folder)
    return end, f"{name}: {words}", time.process_time() - started


def _run(reader: str, first: int, count: int, report) -> None:
    ends, slowest = Counter(), 0.0
    with tempfile.TemporaryDirectory() as place:
        make_source(reader, Path(place) / "source")
        if read(Path(place) / "source")[0] != "data":
            report.put(("wrong", -1, "the sound files: " + read(Path(place) / "source")[1]))
        for seed in range(first, first + count):
            report.put(("at", seed))
            end, words, seconds = try_one(reader, seed, Path(place))
            ends[end] += 1
            slowest = max(slowest, seconds)
            if end == "wrong" or seconds > MOST_SECONDS:
                report.put(("wrong", seed, f"{words[:300]} ({seconds:.1f} s)"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report.put(("done", dict(ends), slowest, peak))


def run_reader(reader: str, count: int, first: int = 0) -> tuple[bool, str, dict[str, float]]:
    """Try a reader on damaged files in a process of its own.

    Returns: Whether all went well, a line that says so, and the figures in it: "inputs", "read", "refused", "wrong",
    "slowest" (seconds) and "peak" (bytes); "ended" is the seed at which the process ended.
    """
    context = multiprocessing.get_context("spawn")
    report = context.SimpleQueue()
    process = context.Process(target=_run, args=(reader, first, count, report))
    process.start()
    seed, wrong, done = first, [], None
    while done is None and (process.is_alive() or not report.empty()):
        if report.empty():
            time.sleep(0.01)
            continue
        kind, *values = report.get()
        if kind == "at":
            seed = values[0]
        elif kind == "wrong":
            wrong.append(values)
        else:
            done = values
    process.join()
    lines = [f"    seed {seed}: {words}" for seed, words in wrong[:20]]
    if done is None:
        line = f"{reader:<13} the process ended at seed {seed} (exit {process.exitcode})"
        return False, "\n".join([line, *lines]), {"inputs": seed - first + 1, "wrong": len(wrong) + 1, "ended": seed}
    ends, slowest, peak = done
    well = not wrong and peak < MOST_BYTES
    line = (
        f"{reader:<13} {count} files: {ends.get('data', 0)} read, {ends.get('error', 0)} refused by name, "
        f"{len(wrong)} otherwise; slowest {slowest:.2f} s, peak {peak / 2**20:.0f} MiB"
    )
    figures = {"inputs": count, "read": ends.get("data", 0), "refused": ends.get("error", 0), "wrong": len(wrong)}
    return well, "\n".join([line, *lines]), figures | {"slowest": round(slowest, 3), "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="files for each reader")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--readers", nargs="+", default=READERS, help="which")
    parser.add_argument("--json", action="store_true", help="print the figures of all at the end, as a line of JSON")
    args = parser.parse_args()
    well, figures = True, {}
    for reader in args.readers:
        good, line, figures[reader] = run_reader(reader, args.count, args.first)
        well &= good
        print(line, flush=True)
    if args.json:
        print(json.dumps(figures))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
