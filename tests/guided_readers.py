"""Coverage-guided fuzzing of everything that reads a file; a program that needs atheris (libFuzzer for Python).

    python tests/guided_readers.py FOLDER --count N [--readers NAME ...]

Each reader starts from sound files and is given N inputs, of which those that reach new edges of hellm's code are kept
and changed further. A reader must give a value, or a ValueError or OSError that names the file. What else it raises, an
input that takes `MOST_SECONDS` of processor time and memory beyond `MOST_MIB` are failures. Each reader has a process
of its own, and its inputs end at its first failure, which is left in FOLDER. Prints a line for each reader and, last, a
JSON object: for each the inputs, the edges that were reached at the start and at the end, the failures, the slowest
input in seconds of processor time and the most memory in MiB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "data"), str(HERE / "serve")]
MOST_SECONDS, MOST_MIB = 10, 2048
# Of the clock on the wall, after which an input hangs on any machine.
_HANGS = 600
_DATA = ("hellm", "recbole", "mmrec", "lattice", "json", "sasrec", "shop", "shop tables", "shop parquet", "amazon")
# File of a run -> module and function that reads it, which takes the folder, or the file where it is so marked.
_RUN = {
    "embeddings.safetensors": ("hellm.recommend.recommender", "Recommender.load", False),
    "ids.parquet": ("hellm.recommend.recommender", "Recommender.load", False),
    "histories.parquet": ("hellm.recommend.recommender", "Recommender.load", False),
    "content.safetensors": ("hellm.recommend.recommender", "Recommender.load", False),
    "card.json": ("hellm.recommend.recommender", "Recommender.load", False),
    "metrics.jsonl": ("hellm.artifact.run_directory", "read_metrics", False),
    "test_evaluations.jsonl": ("hellm.artifact.evaluation_log", "read_test_evaluations", False),
    "test_users.safetensors": ("hellm.artifact.test_users", "read_test_users", False),
    "last.safetensors": ("hellm.training.checkpoint", "load_checkpoint", True),
    ".hellm.json": ("hellm._folders", "read_mark", False),
    "result.json": ("guided_readers", "result_of", False),
    "config.yaml": ("guided_readers", "settings_of", True),
    "store.sqlite": ("guided_readers", "entries_of", True),
    "users.jsonl": ("guided_readers", "asked_by", True),
    "users.parquet": ("guided_readers", "asked_by", True),
    "users.txt": ("guided_readers", "asked_by", True),
    "exposures.parquet": ("hellm.evaluate.ab", "read_exposures", True),
}
READERS = (*(f"data {name}" for name in _DATA), *(f"file {name}" for name in _RUN))


def result_of(folder: Path) -> object:
    from hellm.artifact.run_directory import RunDirectory

    return RunDirectory(folder, resume=True).read_result()


def settings_of(file: Path) -> object:
    from hellm.config import PretrainConfig, load_saved_config

    return load_saved_config(PretrainConfig, file)


def entries_of(file: Path) -> object:
    from hellm.serve.store import read_entries

    return list(read_entries(file))


def asked_by(file: Path) -> object:
    from hellm.recommend.user_files import asked_in

    return list(asked_in(file, 8))


def make_files(folder: Path) -> None:
    """Sound files of each name in `_RUN`."""
    import numpy as np
    import polars as pl
    import torch
    from safetensors.numpy import save_file
    from served import save_run

    from hellm._folders import mark_folder
    from hellm.artifact.evaluation_log import log_test_evaluation
    from hellm.artifact.files import RUN_LAYOUT
    from hellm.artifact.run_directory import RunDirectory
    from hellm.config import PretrainConfig
    from hellm.evaluate.ab import write_exposures
    from hellm.serve.store import Entry, Store
    from hellm.training.checkpoint import save_checkpoint

    save_run(folder)
    (folder / ".hellm.json").unlink()
    mark_folder(folder, "run", layout=RUN_LAYOUT)
    run = RunDirectory(folder, resume=True)
    run.write_config(PretrainConfig())
    run.append_metrics({"epoch": 0, "loss": 0.5, "seconds": 1.5})
    run.append_metrics({"epoch": 1, "step": 3, "valid_recall@20": 0.5})
    test = {"protocol": "all", "metrics": {"recall@20": 0.5}}
    run.write_result({"stage": "pretrain", "test": test, "valid": {}, "best_epoch": 1, "num_epochs": 2})
    log_test_evaluation(folder, by="training", protocols=["all"], metrics=["recall@20"], fingerprint="0")
    save_file({"users": np.arange(3), "recall@20": np.ones(3)}, folder / "test_users.safetensors")
    save_checkpoint(folder / "last.safetensors", {"model.a": torch.ones(2)}, {"epoch": 1})
    store = Store(folder / "store.sqlite")
    store.append([
        Entry("event", "e", {"user": "u0", "item": "i1"}),
        Entry("item", "i", {"title": "x", "attributes": {}}, {"text": np.ones(2, np.float32)}),
    ])  # fmt: skip
    store.close()
    (folder / "users.jsonl").write_text('{"user": "u0", "history": ["i1", "i2"]}\n["i1"]\n')
    (folder / "users.txt").write_text("u0\nu1\n")
    pl.DataFrame({"user": ["u0"], "history": [["i1"]]}).write_parquet(folder / "users.parquet")
    write_exposures(folder / "exposures.parquet", [])


def reader_of(name: str, folder: Path) -> tuple[list[Path], Callable[[], object]]:
    """Make sound files in `folder`. Returns: those that inputs stand for, and what reads them."""
    kind, _, rest = name.partition(" ")
    if kind == "data":
        import fuzz_readers

        fuzz_readers.make_source(rest, folder)

        def read() -> object:
            end, words = fuzz_readers.read(folder)
            if end == "wrong":
                raise AssertionError(words)

        return sorted(one for one in folder.rglob("*") if one.is_file()), read
    folder.mkdir()
    make_files(folder / "run")
    module, function, of_file = _RUN[rest]
    found = __import__(module, fromlist=["_"])
    for part in function.split("."):
        found = getattr(found, part)
    path = folder / "run" / rest
    target = path if of_file else folder / "run"

    def read() -> object:
        try:
            return found(target)
        except (ValueError, OSError) as error:
            if str(folder / "run") not in str(error):
                raise AssertionError(f"{type(error).__name__} does not name the file: {error}") from error

    return [path], read


def fuzz(name: str, place: Path, count: int) -> None:
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    warnings.simplefilter("ignore")
    # With all that is imported on the way.
    with atheris.instrument_imports(include=["hellm"], enable_loader_override=False):
        files, read = reader_of(name, place / "files")
        read()
    sound = [one.read_bytes() for one in files]
    seeds = place / "seeds"
    seeds.mkdir()
    for number, content in enumerate(sound):
        (seeds / str(number)).write_bytes(bytes([number]) + content)

    slowest = 0.0

    def one(data: bytes) -> None:
        nonlocal slowest
        number = data[0] % len(files) if data else 0
        files[number].write_bytes(data[1:])
        started = time.process_time()
        try:
            read()
        finally:
            files[number].write_bytes(sound[number])
        seconds = time.process_time() - started
        if seconds > slowest:
            slowest = seconds
            (place / "slowest").write_text(str(seconds))
        if seconds > MOST_SECONDS:
            raise AssertionError(f"takes {seconds:.1f} s")

    longest = max(map(len, sound)) * 2 + 64
    options = [f"-runs={count}", f"-max_len={longest}", f"-timeout={_HANGS}", f"-rss_limit_mb={MOST_MIB}"]
    options += ["-print_final_stats=1", "-seed=1", f"-artifact_prefix={place}/", "-close_fd_mask=0", str(seeds)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def run_reader(name: str, folder: Path, count: int) -> dict[str, float]:
    """Figures of one reader, from a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, place, "--count", str(count), "--fuzz", name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        log = done.stdout + done.stderr
        slowest = Path(place, "slowest")
        seconds = float(slowest.read_text()) if slowest.is_file() else 0.0
        for one in Path(place).glob("*-*"):
            if one.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                one.rename(folder / f"{name.replace(' ', '-')}-{one.name}")
    stats = {key: int(value) for key, value in re.findall(r"stat::(\w+):\s+(\d+)", log)}
    edges = [int(value) for value in re.findall(r"cov: (\d+)", log)]
    figures = {
        "inputs": stats.get("number_of_executed_units", 0),
        "first_edges": edges[0] if edges else 0,
        "edges": edges[-1] if edges else 0,
        "failures": int(done.returncode != 0),
        "slowest": round(seconds, 3),
        "peak_mib": stats.get("peak_rss_mb", 0),
    }
    if done.returncode:
        told = [line for line in log.splitlines() if "Error" in line or "ERROR" in line or "Exception" in line]
        figures["failure"] = " / ".join(told[-3:])[-600:] or log[-600:]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for inputs that fail")
    parser.add_argument("--count", type=int, required=True, help="inputs for each reader")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=READERS, metavar="NAME")
    parser.add_argument("--fuzz", choices=READERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(json.dumps({"unavailable": "atheris is not installed (pip install atheris, Python 3.11 to 3.13)"}))
        return 0
    if args.fuzz:
        fuzz(args.fuzz, args.folder, args.count)
        return 0
    figures = {}
    for name in args.readers:
        figures[name] = run_reader(name, args.folder, args.count)
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
    print(json.dumps(figures))
    return 1 if any(one["failures"] for one in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
