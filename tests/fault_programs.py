"""Runs small programs on which hellm once failed and says which are right; a program, since each is a process.

    python tests/fault_programs.py FOLDER [NAME ...] [--long]

FOLDER holds `ops/*.py`, `data/*/cmd.sh` and `llm/*.py`; a NAME is a part of such a name. Every program runs in a copy
of its folder, with this interpreter. Prints a line for each, right or WRONG with the reason; exit code 0 if all are
right. `--long` includes those that take many minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELPERS = {"llm/common", "llm/helper"}
# What the programs know by earlier names, or give where nothing is to be given any more.
MOVED = {
    "from hellm.models import prompted_model": "from hellm.models.llm import prompted_model",
    "hellm.models.language_model": "hellm.models.llm.language_model",
    ", evaluate=evaluate_dataset": "",
    ", evaluate=evaluate_histories": "",
    # One family of many loops in Python takes a minute of a processor, and other work on the machine is not counted.
    "signal.signal(signal.SIGALRM, alarm)": "signal.signal(signal.SIGPROF, alarm)",
    "signal.alarm(25)": "signal.setitimer(signal.ITIMER_PROF, 150)",
    "signal.alarm(0)": "signal.setitimer(signal.ITIMER_PROF, 0)",
}
SECONDS = 1200
INTERNAL = r"Traceback \(most recent|error: internal|Segmentation|Killed|core dumped"


@dataclass(frozen=True)
class Right:
    """What a program does where all is well.

    Attributes:
        out: patterns that stdout holds, in this order.
        err: the same of stderr.
        never: pattern that neither holds.
        code: exit code.
        arguments: {run} is a fine-tuned run directory, {scan} a file to write.
        check: what the file at {scan} must hold; returns what is wrong, or "".
        long: it takes many minutes.
    """

    out: tuple[str, ...] = ()
    err: tuple[str, ...] = ()
    never: str = INTERNAL
    code: int = 0
    arguments: tuple[str, ...] = ()
    check: Callable[[Path], str] | None = None
    long: bool = False


# Their `get_decoder` is the whole model, which the scan cannot compare; tests/models/test_decoder_check.py does.
COMPARED_ELSEWHERE = {"llama4", "llama4_text"}


def wrong_families(scan: Path) -> str:
    """Families that are served without agreeing with the plain decoder; a refusal names the model."""
    rows = [json.loads(line) for line in scan.read_text().splitlines()]
    for row in rows:
        if row["kind"] in COMPARED_ELSEWHERE and "last_hidden_state" in row.get("oracle_err", ""):
            row["oracle"] = 0.0
    wrong = [
        f"{row['kind']} ({'; '.join(f'{key} {value}' for key, value in row.items() if key != 'kind')})"
        for row in rows
        if "build" not in row  # transformers has no such small model
        and not row.get("construct", "").startswith("ValueError")
        and not (row.get("oracle", 1) < 1e-3 and row["leak"] < 1e-3 and row["batch_alone"] < 1e-3)
    ]
    served = sum("oracle" in row for row in rows)
    return "; ".join(wrong) if wrong else "" if served else f"none of {len(rows)} families is served"


RIGHT = {
    # Operators: each program compares by itself and says so by its exit code.
    "ops/01_conv_reads_past_buffer": Right(("a thread.* code 0 .*fine", "main thread.* code 0 ")),
    "ops/02_export_poisons_hypergraph": Right(("model.x. is Tensor and another .* gives Tensor",)),
    "ops/03_forward_mode_is_zero": Right(
        ("^hypergraph_conv", "^incidence_product", "^bipartite_propagate", "^info_nce", "^item_cross_entropy")
    ),
    "ops/04_cross_entropy_float64_items_under_autocast": Right(3 * ("^(raises: .*float64|got .*)",)),
    "ops/05_stale_scales": Right(5 * (r" 5\.000\n",)),
    "ops/06_half_weight_gradient": Right(4 * ("output finite True",)),
    "ops/07_compile_temperature": Right(("dynamic=True: fine", "a schedule: fine", "two losses: fine")),
    "ops/09_bad_alloc_aborts": Right(3 * (r"exit code 0 [^\n]* (MemoryError|finished) ",)),
    "ops/10_plain_torch_strides_under_compile": Right(5 * ("fine",)),
    "ops/11_plain_torch_half_sums": Right((r"'native': 70\.0, 'torch': 70\.0",)),
    "ops/12_incidence_weight_without_gradient": Right((r"requires grad: True .*: (0\.0|\S+e-1[2-9])\n",)),
    "ops/13_negative_degree": Right(("largest of the result",)),
    "ops/15_compile_checkpoint": Right(("before: False fine", "before: True fine")),
    "ops/16_func_transforms": Right(6 * ("fine",)),
    "ops/17_meta_and_fake": Right((r"knn in FakeTensorMode torch.Size\(\[1000, 5\]\)",)),
    "ops/19_pyg_call": Right(5 * ("fine",)),
    "ops/21_small_ones": Right(
        (
            r"tensor\(-1\.\) +ValueError: temperature",
            r"tensor\(0\.\) +ValueError: temperature",
            "'0.2' +ValueError: temperature",
            r"k=2\.0 +ValueError: k ",
            r"num_vertices=6\.0 +ValueError: num_vertices",
            r"tensor\(6\) +<class 'int'>",
            r"id 10\*\*12 +ValueError: [^\n]*1000000000000",
            "bipartite with hyperedge_weight +ValueError: [^\n]*weight",
            "is itself +True",
            r"largest self-similarity +(1\.0|0\.\d+)\n",
            r"MPS, XPU +\[True, True\]",
        )
    ),
    "ops/22_interrupt": Right((r"KeyboardInterrupt (0\.\d|1\.0) s",), never="finished"),
    "ops/23_many_columns": Right(("D 100000, knn", "D 100000, info_nce", "D 100000, item_cross_entropy")),
    # Data and the command line.
    "data/01_overwrite_deletes_source": Right(
        ("rc 2", "rc 2", r"(?s)after(?=.*SKU1\.png)(?=.*events\.csv)(?=.*thesis\.txt)"),
        ("error: shop .*not replaced", "error: thesis .*nothing in it is replaced"),
    ),
    "data/02_time_column_ignored": Right(
        ("by time in column 'event_timestamp'", '"known": true', "right test item: 20 of 20")
    ),
    "data/03_paths_are_globs": Right((r"read: \['me'\]", r"built\[1\].*3 items", "items +3", "rc 0")),
    "data/04_integer_ids_take_all_memory": Right(
        ("rc 2", "rc 0", r"\['2', '3', '2', '3'\].*user item rating"), (r"x\.inter:2: item id 4000000000",)
    ),
    "data/05_meaning_of_columns_lost": Right(
        (
            "2 events of label 0 .* left out",
            "item_id_list:token_seq are no events",
            "1 events of quantity 0 or less .* left out",
            "however low its rating",
        )
    ),
    "data/06_no_lock_on_out": Right(
        ("^second rc 2", r"^lines (\d+), distinct epochs \1$", *3 * ("error: q is being written by .*", "^first rc 0"))
    ),
    "data/07_16bit_pictures_turn_white": Right(
        2 * (r"8 bit (0\.9[5-9]\d|1\.000), .* white -?0\.[0-8]\d+; .* upright (0\.9[5-9]\d|1\.000)\n",)
    ),
    "data/08_empty_ids_become_one_user": Right(
        ("3 events without user id", r"^\['u1'\]", "1 events without user id", r"^\['u1'\]"),
        (r"words/events\.csv: no row is left .*'NULL', 'nan'",),
    ),
    "data/09_stock_list": Right(
        (*3 * (r"user c1: [^\n]*\n +1\. ",), "user c2: ", "user newcustomer: [^\n]*popular", "rc 0"),
        ("1 of 3 candidates .*'NEW1'",),
        never=f"{INTERNAL}|rc [12]",
    ),
    "data/10_internal_errors_on_user_data": Right(
        (
            *("== latin1", r"error: latin1/events\.csv:2: byte 0xe9 is not UTF-8", "^rc 2"),
            *("== ragged", "events +2 .*", "2 lines end with a separator too many", "^rc 0"),
            *("== inch_in_events", "items +2", "events +2 ", "^rc 0"),
            *("== inch_in_items", "items +2", "^rc 0"),
            *("== list", "events +3", r"events\.parquet: column 'item' holds lists", "^rc 0"),
            *("== categories", "items +3", "^rc 0"),
            *("== latin1_json", r"error: latin1_json/N\.item\.json", "^rc 2"),
        ),
        never=f"{INTERNAL}|^rc 1",
    ),
    "data/11_iso_times_refused": Right(
        (
            *("== minutes", "from 2024-05-31 to 2024-05-31", "^rc 0"),
            *("== utc_minutes", "from 2024-01-01 to 2024-01-02", "^rc 0"),
            *("== mixed", "from 2024-01-01 to 2024-05-31", "^rc 0"),
            *("== blank", "from 2023-11-14 to 2023-11-14", "^rc 0"),
            *("== bigquery", "from 2019-10-01 to 2019-10-01", "^rc 0"),
        )
    ),
    "data/13_resume_keeps_old_ids": Right(("^hellm: error: r: a resumed run must keep its data, .*: item ids;",)),
    "data/14_run_resume_ignores_data": Right(
        ("^hellm: error: /no/such/folder: no such", "^--- data deleted", "^rc 2"),
        ("^hellm: error: r: a resumed run must keep its data, .*: events",),
    ),
    "data/15_pictures_not_found": Right(
        (
            *("^addresses", "image features .* 0 items without"),
            *("^windows", "image features .* 0 items without"),
            *("^image_url", "1 images are web addresses, .*1 of 1 items have no picture: A"),
        )
    ),
    "data/17_separator_and_encoding": Right(
        (
            *(
                line
                for name in ("semicolon", "pipe", "utf16", "cr", "sep_line")
                for line in (f"^{name} ", "events +2 ")
            ),
            *("^S ", "users +2$", "events +4 ", r"^T \(form amazon", "events +1 ", r"^x \(form recbole", "events +1 "),
        ),
        never=f"{INTERNAL}|error:",
    ),
    "data/19_full_disk": Right(
        ("^rc 2", "error: .*the disk is full; make room"), ("error: .*the disk is full; make room",)
    ),
    "data/20_read_only_home": Right(("^rc 0",), ("warning: the cache .* cannot be written .*--cache",)),
    "data/21_small_catalogue": Right(3 * (r"^.*\S.*$",), never=f"{INTERNAL}|error:|ks must be"),
    "data/24_written_but_not_readable": Right(("^rc 2",), (r"form 'recbole' cannot hold item id 'A\\tB'",)),
    "data/27_latin1_amazon_users_merge": Right(
        (), (r"a/reviews_T\.json:1: byte 0x.. is not UTF-8; .*--encoding",), code=2
    ),
    "data/28_config_yaml_is_no_proof": Right(
        (
            *(
                r"^hellm: error: \. is .*not replaced",
                r"^rc \d\n(\./(src/model\.py|data/events\.csv|config\.yaml)\n){3}",
            ),
            *(
                r"^hellm: error: .*b is .*not replaced",
                r"^rc \d\n(\./(src/model\.py|data/events\.csv|config\.yaml)\n){3}",
            ),
            "(config.yaml\ndata\nsrc\n){2}",
        )
    ),
    "data/29_image_paths_leave_the_folder": Right(
        ("3 images named in the item table lie outside the data folder and are not read",),
        never=f"{INTERNAL}|image features|are not there",
    ),
    "data/30_memory_of_large_pictures": Right((r"peak MiB (\d{1,3}|1\d{3})\.",)),
    # Language models and what serves them.
    "llm/add_items_threads": Right(
        (r"recommend beside add_items: \[\]", r"three threads: \[\] items (214) keys \1 content \1\n", "load: <hellm")
    ),
    "llm/base_changed": Right(
        tuple(
            f"{change}: ValueError .* was trained with the language model"
            for change in ("rms_norm_eps", "hidden_act", "rope_theta", "tokenizer", "weights off the sample")
        ),
        never=f"{INTERNAL}|loaded, lists",
    ),
    "llm/families": Right(
        (
            *(
                f"^{name}ForCausalLM (ValueError|queries .* differ by (0|\\S+e-0[6-9]))$"
                for name in ("Lfm2", "Qwen3_5", "DeepseekV3", "MiniCPM3", "OPT", "DiffLlama")
            ),
            *(f"^{name}Config (ValueError|built)" for name in ("Bloom", "Mpt", "Mamba")),
        )
    ),
    "llm/killed_save": Right(
        ("serving is there: True", r"after the next save: \['serving'\]"), never="load:", arguments=("{run}",)
    ),
    "llm/nan_checkpoint": Right(
        (
            r"run: \w+Error [^\n]*(finite|NaN)",
            r"last\.safetensors: False",
            r"resume with healthy gradients: (?!\w+(Error|Exception))",
            r"same before a validation: \w+Error [^\n]*(finite|NaN)",
        )
    ),
    "llm/resume_base_changed": Right(("resume: ValueError .*language model",), never=f"{INTERNAL}|went on"),
    "llm/stablelm_leak": Right(
        tuple(
            rf"{name} +{how} +change .* change: 0\.000; loss .* 2\.4[5-9]\d \(chance"
            for name in ("Llama", "StableLm", "Nemotron")
            for how in ("sdpa", "eager")
        )
    ),
    "llm/stderr_lost": Right(
        ("stderr replaced: False",),
        ("ERROR:root:this log line must be seen", "^Traceback ", "^RuntimeError: this traceback must be seen"),
        never="stderr replaced: True",
        code=1,
        arguments=("{run}",),
    ),
    "llm/titles_empty": Right(("\nload: <hellm", "no title missing: <hellm")),
    "llm/untrusted_code": Right(
        (
            *2 * (r"load_language_model, stdin [^\n]*: executed False, rc [1-9]\d*, asked False",),
            *2 * (r"Recommender\.load, stdin [^\n]*: executed False, rc [1-9]\d*, asked False",),
        )
    ),
    "llm/family_scan": Right(arguments=("{scan}",), check=wrong_families, long=True),
}


@dataclass
class Programs:
    """The programs of a folder.

    Attributes:
        folder: holds ops, data and llm.
        work: empty folder for copies.
    """

    folder: Path
    work: Path

    def names(self) -> list[str]:
        files = [*self.folder.glob("ops/*.py"), *self.folder.glob("data/*/cmd.sh"), *self.folder.glob("llm/*.py")]
        found = {
            str((one.parent if one.suffix == ".sh" else one.with_suffix("")).relative_to(self.folder)) for one in files
        }
        order = {name: place for place, name in enumerate(RIGHT)}
        return sorted((found | RIGHT.keys()) - HELPERS, key=lambda name: (order.get(name, len(order)), name))

    def wrong(self, name: str) -> str:
        """Run a program. Returns: what is wrong, or "" where it is right."""
        if name not in RIGHT:
            return "nothing is known of what is right"
        right, scan = RIGHT[name], self.work / "scan.jsonl"
        command = self.command(name)
        if not Path(command[1]).is_file():
            return f"{command[1]} is absent"
        named = {"run": self.run if "{run}" in right.arguments else "", "scan": scan}
        code, out, err = self.call(*command, *(one.format(**named) for one in right.arguments))
        reasons = [*missing(right.out, out, "stdout"), *missing(right.err, err, "stderr")]
        if found := re.search(right.never, f"{out}\n{err}"):
            reasons.append(f"{found[0]!r} in the output")
        if code != right.code:
            reasons.append(f"exit code {code}, right is {right.code}")
        if right.check is not None and not reasons:
            reasons += filter(None, [right.check(scan)])
        if not reasons:
            return ""
        last = " ".join(out.strip().splitlines()[-1:] + err.strip().splitlines()[-1:])
        return f"{'; '.join(reasons)}; it ends: {last[-200:]}"

    def command(self, name: str) -> list[str]:
        kind = name.partition("/")[0]
        copy = self.work / (name if kind == "data" else kind)
        if not copy.exists() and (self.folder / copy.relative_to(self.work)).exists():
            shutil.copytree(self.folder / copy.relative_to(self.work), copy)
            for file in copy.rglob("*.py"):
                text = file.read_text(encoding="utf-8")
                for before, now in MOVED.items():
                    text = text.replace(before, now)
                file.write_text(text, encoding="utf-8")
        if kind == "data":
            return ["bash", str(copy / "cmd.sh")]
        return [sys.executable, str(self.work / f"{name}.py")]

    @cached_property
    def run(self) -> Path:
        """A fine-tuned run directory, made by the helper of the language models' programs."""
        self.command("llm/helper")
        code = "from helper import *; atexit.unregister(shutil.rmtree); tune('run'); print('made', W / 'run')"
        status, out, err = self.call(sys.executable, "-c", code, PYTHONPATH=str(self.work / "llm"))
        if status:
            raise RuntimeError(f"no run directory could be made: {err[-500:]}")
        return Path(out.splitlines()[-1].removeprefix("made "))

    @cached_property
    def environment(self) -> dict[str, str]:
        """`hellm` is that of this interpreter; temporary files are under `work`."""
        hellm = self.work / "bin" / "hellm"
        hellm.parent.mkdir()
        hellm.write_text(f"#!{sys.executable}\nimport sys\n\nfrom hellm.cli import main\n\nsys.exit(main())\n")
        hellm.chmod(0o755)
        # A program asks for it by this name where no shell expands it.
        (hellm.parent / "${HELLM:-hellm}").symlink_to(hellm)
        (self.work / "tmp").mkdir()
        return os.environ | {
            "PATH": f"{hellm.parent}{os.pathsep}{os.environ['PATH']}",
            "HELLM": str(hellm),
            "PYTHON": sys.executable,
            "TMPDIR": str(self.work / "tmp"),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; everything it started is ended after `SECONDS`."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\nended after {SECONDS} seconds"
        return process.returncode, out, err


def missing(patterns: tuple[str, ...], text: str, where: str) -> list[str]:
    """The first pattern that does not follow the one before."""
    start = 0
    for pattern in patterns:
        found = re.compile(pattern, re.MULTILINE).search(text, start)
        if found is None:
            return [f"{where} lacks {pattern!r}"]
        start = found.end()
    return []


def main() -> int:
    # A shell ignores it for what it starts in the background, and a program inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="fault_programs_") as work:
        programs = Programs(args.folder.resolve(), Path(work))
        chosen = [one for one in programs.names() if not args.names or any(name in one for name in args.names)]
        if not chosen:
            parser.error(f"no program is named so: {', '.join(args.names)}")
        for name in chosen:
            if name in RIGHT and RIGHT[name].long and not args.long:
                print(f"{name:56} left out, as it takes many minutes (--long)", flush=True)
                continue
            started = time.monotonic()
            wrong = programs.wrong(name)
            failures += bool(wrong)
            print(
                f"{name:56} {f'WRONG: {wrong}' if wrong else 'right'} ({time.monotonic() - started:.0f} s)", flush=True
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
