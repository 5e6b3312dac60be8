"""Cuts every file that commands write at random places and reads what is left; a program.

    python tests/torn.py FOLDER --cuts N [--seed S] [--only NAME ...]

Each file of each artefact is cut N times, the first time to nothing and the second time by its last byte, and each
command that takes the artefact is given it. The command must come to what it comes to with the whole file (which it
then does not read, or does not need to the end), or end as with any wrong input: exit code 2 and one line that names
the file. A log of a training that has lost records is warned of by name, and costs the curves alone. A traceback,
another line, or other numbers are failures. Prints a line for each failure and, last, a JSON object of counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from killed import FAST, UNFINISHED, call, digests, load, make_inputs, steady

Outcome = tuple[int, object, str]


@dataclass
class Artefact:
    """A folder that commands write.

    Attributes:
        folder: Where a whole one is.
        questions: Name -> (copy of the folder) -> exit code, what it came to, what it said to stderr.
    """

    folder: Path
    questions: dict[str, Callable[[Path], Outcome]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuts", type=int, required=True, help="of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="artefacts")
    args = parser.parse_args()
    load(args.only)
    counts, failures = Counter(), []
    for name, artefact in artefacts(args.folder, args.only).items():
        found = tear(name, artefact, args.folder / "torn", args.cuts, random.Random(f"{args.seed} {name}"), counts)
        for failure in found:
            print(failure, flush=True)
        failures += found
    print(json.dumps({**counts, "failures": len(failures)}))
    return 1 if failures else 0


def artefacts(folder: Path, only: Collection[str] | None) -> dict[str, Artefact]:
    """Make all, or `only` some by name."""
    inputs = folder / "inputs"
    shop, graph, sequence = (inputs / name for name in ("shop", "graph", "sequence"))

    def make_fused() -> None:
        if not (folder / "fused").is_dir():
            call("fuse", graph, sequence, "--data", shop, "--out", folder / "fused")

    def make_saved() -> None:
        from hellm.recommend import Recommender

        make_fused()
        Recommender.load(folder / "fused").save(folder / "saved")

    def make_unfinished(name: str, run: Path) -> None:
        shutil.copytree(run, folder / name)
        for one in (folder / name).glob("[!.]*"):
            if one.name not in ("checkpoint", "config.yaml", "metrics.jsonl"):
                one.unlink()

    tune = ["--graph", graph, "--sequence", sequence, f"llm={inputs / 'llm'}", "max_epochs=1", *FAST]
    makers = {
        "data": lambda: call("data", "build", shop, folder / "data"),
        "transitions": lambda: call("transitions", "--data", shop, "--out", folder / "transitions"),
        "llm": lambda: call("finetune", "--data", shop, "--out", folder / "llm", *tune),
        "fused": make_fused,
        "saved": make_saved,
        "unfinished pretrain": lambda: make_unfinished("unfinished pretrain", graph),
        "unfinished sasrec": lambda: make_unfinished("unfinished sasrec", sequence),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        make_inputs(inputs, only)
        for name, make in makers.items():
            if not only or name in only:
                make()

    def resumed(stage: str) -> Callable[[Path], Outcome]:
        argv = [stage, "--data", shop, "max_epochs=2", *FAST, "--resume", "--out"]
        return lambda run: asked(*argv, run, result=lambda said: digests(run))

    lists = {"recommend": lambda run: asked("recommend", run, "--history", *ITEMS[:2], "-k", "3")}
    table = ["--data", shop, "--json"]
    measured = {"evaluate": lambda run: asked("evaluate", run, *table, result=lambda said: steady(json.loads(said)))}
    users = {"users": lambda run: told(lambda: users_of(run))}
    found = {
        "data": Artefact(folder / "data", {"check": lambda data: asked("data", "check", data)}),
        "pretrain": Artefact(graph, {**lists, **measured, **users, "resume": resumed("pretrain")}),
        "sasrec": Artefact(sequence, {**lists, **measured, "resume": resumed("sasrec")}),
        "unfinished pretrain": Artefact(folder / "unfinished pretrain", {"resume": resumed("pretrain")}),
        "unfinished sasrec": Artefact(folder / "unfinished sasrec", {"resume": resumed("sasrec")}),
        "transitions": Artefact(folder / "transitions", lists),
        "llm": Artefact(folder / "llm", lists),
        "fused": Artefact(folder / "fused", {**lists, **measured}),
        "saved": Artefact(folder / "saved", lists),
    }
    return {name: one for name, one in found.items() if not only or name in only}


ITEMS = ["i00001", "i00002"]
CURVES = "curves.png"


def users_of(run: Path) -> object:
    """What the reports compare runs by."""
    from hellm.artifact.test_users import read_test_users

    users, metrics = read_test_users(run)
    return users.tolist(), {name: values.tolist() for name, values in metrics.items()}


def asked(*argv, result: Callable[[str], object] = str) -> Outcome:
    """Exit code, `result` of the output, and errors of a command in this process."""
    from hellm.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main([str(one) for one in argv])
    return code, None if code else result(out.getvalue()), err.getvalue()


def told(read: Callable[[], object]) -> Outcome:
    """The same of a function, whose mistakes are ValueError and OSError."""
    try:
        return 0, read(), ""
    except (ValueError, OSError) as error:
        return 2, None, f"hellm: error: {error}\n"
    except Exception:
        return 1, None, traceback.format_exc()


def tear(name: str, artefact: Artefact, place: Path, cuts: int, rng: random.Random, counts: Counter) -> list[str]:
    """Failures of one artefact."""
    failures = []
    files = sorted(one.relative_to(artefact.folder) for one in artefact.folder.rglob("*") if one.is_file())
    files = [one for one in files if not UNFINISHED.fullmatch(one.name)]
    for question, ask in artefact.questions.items():
        code, expected, err = ask(fresh(artefact.folder, place))
        if code:
            return [f"{name}, {question}: fails with whole files: {err.strip()}"]
        for file in files:
            size = (artefact.folder / file).stat().st_size
            for cut in range(cuts if size else 0):
                kept = (0, size - 1)[cut] if cut < 2 else rng.randrange(size)
                folder = fresh(artefact.folder, place)
                (folder / file).write_bytes((artefact.folder / file).read_bytes()[:kept])
                counts["cuts"] += 1
                how = judge(ask(folder), expected, file)
                if how in ("same", "named"):
                    counts[how] += 1
                else:
                    failures.append(f"{name}, {question}: {file} cut to {kept} of {size} bytes: {how}")
    counts["files"] += len(files)
    return failures


def judge(outcome: Outcome, expected: object, file: Path) -> str:
    code, found, err = outcome
    lines = err.strip().splitlines()
    if code == 0:
        warned = any(line.startswith("hellm: warning: ") and file.name in line for line in lines)
        if isinstance(found, dict) and isinstance(expected, dict):
            left_out = {str(file), CURVES} if warned else {str(file)}
            found, expected = ({k: v for k, v in one.items() if k not in left_out} for one in (found, expected))
        if found == expected:
            return "named" if warned else "same"
        return f"another outcome: {str(found)[-300:]!r}"
    told = code == 2 and bool(lines) and lines[-1].startswith("hellm: error: ") and file.name in lines[-1]
    return "named" if told else f"exit code {code}: {' / '.join(lines[-3:])}"


def fresh(source: Path, place: Path) -> Path:
    """A copy at a place that is always the same, as its name is in outputs."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(source, place))


if __name__ == "__main__":
    sys.exit(main())
