"""Kills commands at random moments and checks what they leave; a program, since it forks.

    python tests/killed.py FOLDER --moments N [--seed S] [--only NAME ...]

Every command is run once to its end. Then it is killed (SIGKILL) at a random moment and given again, with `--resume`
where it trains: that must succeed, come to the same files bit for bit, and leave nothing unfinished. Where a command
replaces a folder, the folder must be the old or the new one at the moment of the kill. Prints a line for each failure
and, last, a JSON object of counts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

UNFINISHED = re.compile(r"\..+\.(lock|tmp|new|old)")
# What depends on the clock and on which processes had a part in it. A test that a kill cut short is made, and counted,
# again.
VOLATILE = {"seconds", "seconds_per_epoch", "valid_seconds", "seconds_per_1000_users", "test_users_per_second"}
VOLATILE |= {"peak_memory_bytes", "plan", "users_per_second", "test_evaluations"}
CARDS = ("MODEL_CARD.md", "card.json")
# Databases of others, with times throughout.
IGNORED = ("events.out.tfevents.", "study.db")
FAST = ["num_threads=1", "tensorboard=false"]


@dataclass
class Command:
    """A command and what it makes.

    Attributes:
        run: (out, again) -> does the work; `again` after a kill.
        prepare: makes what stands at `out` before; None is nothing.
    """

    run: Callable[[Path, bool], None]
    prepare: Callable[[Path], None] | None = None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    commands = prepared(args.folder / "inputs", args.only, args.folder / "log")
    rng, counts, references = random.Random(args.seed), Counter(), {}
    for name, command in commands.items():
        references[name] = reference(command, args.folder / f"{name}-whole", args.folder / "log")
    for moment in range(args.moments):
        name = list(commands)[moment % len(commands)]
        out = args.folder / f"{name}-{moment}" / "out"
        failures = attempt(commands[name], out, references[name], rng, args.folder / "log", counts)
        counts["moments"] += 1
        counts["failures"] += bool(failures)
        for failure in failures:
            print(f"{name}, moment {moment}: {failure}", flush=True)
    print(json.dumps(counts | {"seconds": {name: round(one[2], 2) for name, one in references.items()}}))
    return 1 if counts["failures"] else 0


def prepared(inputs: Path, only: Collection[str] | None, log: Path) -> dict[str, Command]:
    """The commands, or `only` some by name, with all that they need imported and made."""
    load(only)
    in_child(lambda: make_inputs(inputs, only), log)
    return {name: one for name, one in all_commands(inputs).items() if not only or name in only}


def need_language(only: Collection[str] | None) -> bool:
    """Whether any needs the libraries of language models, which take seconds to import."""
    return not only or not {"features", "finetune", "llm"}.isdisjoint(only)


def load(only: Collection[str] | None) -> None:
    """Import what the commands import, so that a fork starts with its work."""
    import optuna  # noqa: F401
    import torch

    if need_language(only):
        import peft  # noqa: F401
        import transformers  # noqa: F401

    import hellm.baselines
    import hellm.cli.batch
    import hellm.cli.data
    import hellm.cli.features
    import hellm.cli.finetune
    import hellm.cli.fuse
    import hellm.cli.pretrain
    import hellm.cli.run
    import hellm.cli.sasrec
    import hellm.cli.search
    import hellm.cli.transitions
    import hellm.data.sample
    import hellm.features
    import hellm.recommend.batch
    import hellm.training.finetune
    import hellm.training.pretrain
    import hellm.training.sasrec
    import hellm.training.search  # noqa: F401

    torch.set_num_threads(1)


def make_inputs(folder: Path, only: Collection[str] | None) -> None:
    call("data", "sample", folder / "shop", "--num-users", "40", "--num-items", "24", "--num-groups", "1")
    if need_language(only):
        sys.path.insert(0, str(Path(__file__).parent))
        from saved_llm import save_tiny_llm

        save_tiny_llm(folder / "llm")
        save_tiny_encoder(folder / "encoder")
    call("pretrain", "--data", folder / "shop", "--out", folder / "graph", "max_epochs=2", *FAST)
    call("sasrec", "--data", folder / "shop", "--out", folder / "sequence", "max_epochs=2", *FAST)
    # `fuse` notes in its towers that they have met the test, which cards of the runs of the others would count.
    shutil.copytree(folder / "graph", folder / "towers" / "graph")
    shutil.copytree(folder / "sequence", folder / "towers" / "sequence")


def save_tiny_encoder(folder: Path) -> None:
    """Write a random BERT of width 8 with a tokenizer of a few words."""
    import torch
    import transformers

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "striped", "mug", "1"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=8, max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(folder)


def all_commands(inputs: Path) -> dict[str, Command]:
    shop, towers = inputs / "shop", [inputs / "towers" / name for name in ("graph", "sequence")]

    def resumed(*argv) -> Callable[[Path, bool], None]:
        return lambda out, again: call(*argv, "--out", out, *(["--resume"] if again else []))

    def overwriting(*argv) -> Callable[[Path, bool], None]:
        return lambda out, again: call(*argv, out, "--overwrite")

    def sample(out: Path) -> None:
        call("data", "sample", out, "--num-users", "20", "--num-items", "20", "--num-groups", "1")

    def save(out: Path, again: bool) -> None:
        from hellm.recommend import Recommender

        Recommender.load(inputs / "sequence").save(out, overwrite=True)

    def batch(out: Path, again: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        call("batch", inputs / "sequence", "--out", out / "lists.parquet", *(["--resume"] if again else []))

    def save_other(out: Path) -> None:
        from hellm.recommend import Recommender

        Recommender.load(inputs / "graph").save(out)

    encoders = ["--text", inputs / "encoder", "--image", "none"]
    stages = [one for name in ("pretrain", "sasrec") for one in (f"{name}.max_epochs=2", f"{name}.num_threads=1")]
    run = ["text=none", "image=none", "language_model=false", "baselines=[popularity]", *stages]
    tune = ["--graph", inputs / "graph", "--sequence", inputs / "sequence", f"llm={inputs / 'llm'}"]
    small = ["validate_every=1", "embedding_dim=8,16", "learning_rate=1e-4..1e-1:log"]
    return {
        "build": Command(overwriting("data", "build", shop), sample),
        "features": Command(
            overwriting("features", shop, *encoders, "--cache", inputs / "cache", "--batch-size", "2", "--out"), sample
        ),
        "pretrain": Command(resumed("pretrain", "--data", shop, "max_epochs=12", *FAST)),
        "sasrec": Command(resumed("sasrec", "--data", shop, "max_epochs=12", *FAST)),
        "search": Command(resumed("search", "sasrec", "--data", shop, "--trials", "7", "max_epochs=4", *small, *FAST)),
        "transitions": Command(resumed("transitions", "--data", shop)),
        "fuse": Command(resumed("fuse", *towers, "--data", shop)),
        "batch": Command(batch),
        "finetune": Command(resumed("finetune", "--data", shop, *tune, "max_epochs=3", *FAST)),
        "save": Command(save, save_other),
        "run": Command(resumed("run", "--data", shop, *run)),
    }


def call(*argv) -> None:
    from hellm.cli import main

    code = main([str(one) for one in argv])
    if code:
        raise SystemExit(code)


def in_child(work: Callable[[], None], log: Path, kill_after: float | None = None) -> float | None:
    """Run `work` in a fork. Returns: its seconds, or None if it was killed. Raises: RuntimeError, it failed."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 70
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    status = None
    while status is None:
        done, state = os.waitpid(child, os.WNOHANG)
        if done:
            status = state
        elif kill_after is not None and time.monotonic() - started >= kill_after:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        else:
            time.sleep(0.001)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and kill_after is not None:
        return None
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"exit code {os.waitstatus_to_exitcode(status)}: {log.read_text(errors='replace')[-600:]}")
    return time.monotonic() - started


def reference(command: Command, folder: Path, log: Path) -> tuple[dict | None, dict, float]:
    """Digests of what stands before and after, and seconds of the command."""
    out, before = folder / "out", None
    if command.prepare is not None:
        in_child(lambda: command.prepare(out), log)
        before = digests(out)
    seconds = in_child(lambda: command.run(out, False), log)
    return before, digests(out), seconds


def attempt(command: Command, out: Path, whole, rng: random.Random, log: Path, counts: Counter) -> list[str]:
    before, after, seconds = whole
    failures = []
    if command.prepare is not None:
        in_child(lambda: command.prepare(out), log)
    if in_child(lambda: command.run(out, False), log, kill_after=rng.uniform(0, 1.1 * seconds)) is None:
        counts["killed"] += 1
    if before is not None:
        state = digests(out) if out.is_dir() else None
        counts["old"] += state == before
        if state not in (before, after):
            failures.append(f"neither the old nor the new folder, {difference(state or {}, after)}")
    elif (out / "result.json").is_file() or (out / "comparison.json").is_file():
        counts["finished"] += 1
    try:
        in_child(lambda: command.run(out, True), log)
    except RuntimeError as error:
        return [*failures, f"the command does not go on, {error}"]
    if digests(out) != after:
        failures.append(f"another outcome, {difference(digests(out), after)}")
    left = [one.name for one in out.parent.rglob("*") if UNFINISHED.fullmatch(one.name)]
    if left:
        failures.append(f"left behind: {left}")
    return failures


def difference(found: dict, expected: dict) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[:4]


def digests(folder: Path) -> dict[str, str]:
    """Relative name -> digest of the content, for files that do not depend on the clock."""
    return {
        str(one.relative_to(folder)): hashlib.sha256(content(one, folder)).hexdigest()[:12]
        for one in sorted(folder.rglob("*"))
        if one.is_file() and not one.name.startswith(IGNORED) and not UNFINISHED.fullmatch(one.name)
    }


def content(file: Path, folder: Path) -> bytes:
    """The bytes of a file without what depends on the clock."""
    whole = file.read_bytes()
    # What is no JSON is damaged: it is compared as it is.
    with contextlib.suppress(ValueError):
        if file.name == "metrics.jsonl":
            whole = plain([json.loads(line) for line in whole.splitlines()])
        elif file.name == "test_evaluations.jsonl":
            whole = plain(distinct_evaluations(whole))
        elif file.name in ("result.json", "search.json", "comparison.json"):
            whole = plain(json.loads(whole))
        elif file.name == "dataset.json":
            about = json.loads(whole)
            # Which times lie ahead depends on the day.
            about["notes"] = [note for note in about.get("notes", []) if "have times in the future" not in note]
            whole = plain(about)
        elif file.name == ".hellm.json":
            # The size of what is compared but for such notes.
            mark = json.loads(whole)
            mark.get("files", {}).pop("dataset.json", None)
            whole = plain(mark)
        elif file.name in CARDS:
            whole = re.sub(rb"\d{4}-\d\d-\d\d", b"DATE", whole)
        elif file.suffix == ".safetensors":
            # The order of what is in a header is not that of the writer.
            start = 8 + int.from_bytes(whole[:8], "little")
            header = json.loads(whole[8:start])
            if "state" in header.get("__metadata__", {}):
                header["__metadata__"]["state"] = steady(json.loads(header["__metadata__"]["state"]))
            return json.dumps(header, sort_keys=True).encode() + whole[start:]
    return whole.replace(str(folder).encode(), b"OUT")


def plain(records) -> bytes:
    return json.dumps(steady(records), sort_keys=True).encode()


def distinct_evaluations(log: bytes) -> list[str]:
    """What was tested, without when and how often; a line that a full disk cut short says nothing."""
    found = set()
    for line in log.splitlines():
        with contextlib.suppress(ValueError):
            found.add(json.dumps({name: value for name, value in json.loads(line).items() if name != "time"}))
    return sorted(found)


def steady(value):
    if isinstance(value, dict):
        return {name: steady(one) for name, one in value.items() if name not in VOLATILE}
    return [steady(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
