"""The kernels under ThreadSanitizer; a program for Linux with GCC, cmake and ninja.

    python tests/ops/races.py FOLDER --rounds N

Builds the extension with ThreadSanitizer in build/thread and runs the tests that call kernels with several threads, in
N rounds. openmp_order.cpp tells it how OpenMP orders threads; before that, openmp_race.cpp has to show that races are
still found and none are made up. Prints reports of races and, last, a JSON object of counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "thread"
THREADS = 4
# What runs kernels in many threads of Python, or in several threads each.
FILES = ("test_threads.py", "test_interruption.py", "test_hypergraph_conv.py", "test_bipartite_propagate.py",
         "test_info_nce.py", "test_item_cross_entropy.py", "test_knn.py")  # fmt: skip
CHOSEN = "native and not compile and not gradcheck and not opcheck and not process and not second"
# Way of openmp_race -> whether it has a race.
CONTROLS = {"ordered": False, "race": True, "locked": False, "unlocked": True, "pieces": True}
# 66 is what a program under ThreadSanitizer ends with after a report.
_REPORTED = 66


def build() -> str | None:
    """Build; why it cannot be done, if so."""
    missing = [name for name in ("g++", "cmake", "ninja") if shutil.which(name) is None]
    if missing:
        return f"there is no {missing[0]}"
    directory = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_CXX_COMPILER=g++"]
    configure += [
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DHELLM_SANITIZE=thread",
        "-DHELLM_CUDA=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    configure += [f"-Dpybind11_DIR={directory.stdout.strip()}"]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])}: {(done.stdout + done.stderr)[-2000:]}")
    return None


def environment(log: Path, **more: str) -> dict[str, str]:
    """With reports in files that begin as `log`."""
    options = f"log_path={log} exitcode={_REPORTED} halt_on_error=0 report_signal_unsafe=0"
    return os.environ | {"TSAN_OPTIONS": f"{options} ignore_noninstrumented_modules=1"} | more


def controls(log: Path) -> dict[str, bool]:
    """Way of openmp_race -> whether a race was reported."""
    found = {}
    for way in CONTROLS:
        command = _fixed_addresses([str(BUILD / "openmp_race"), way])
        done = subprocess.run(command, env=environment(log.with_name(f"control-{way}")), capture_output=True)
        if done.returncode not in (0, _REPORTED):
            raise RuntimeError(f"openmp_race {way} ended with {done.returncode}")
        found[way] = done.returncode == _REPORTED
    return found


def _fixed_addresses(command: list[str]) -> list[str]:
    """ThreadSanitizer needs its own range of addresses, which a kernel that draws them widely may have given away."""
    return ["setarch", os.uname().machine, "-R", *command]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for reports")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--files", nargs="+", default=FILES, help="of tests/ops")
    args = parser.parse_args()
    reason = build()
    if reason is not None:
        print(json.dumps({"unavailable": reason}))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder.resolve() / "kernels"
    told = controls(log)
    if told != CONTROLS:
        print(f"of the controls, races must be reported as in {CONTROLS}, got {told}")
        return 1
    library = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    counts, failed = Counter(tests=0, races=0, failures=0), []
    for _ in range(args.rounds):
        for file in args.files:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-k", CHOSEN]
            done = subprocess.run(
                _fixed_addresses([*command, f"tests/ops/{file}"]),
                cwd=ROOT,
                env=environment(
                    log,
                    LD_PRELOAD=f"{library} {BUILD / 'libopenmp_order.so'}",
                    HELLM_EXTENSION=str(next(BUILD.glob("_C*.so"))),
                    HELLM_KERNEL_THREADS=str(THREADS),
                    OMP_NUM_THREADS=str(THREADS),
                ),
                capture_output=True,
                text=True,
            )
            passed = re.search(r"(\d+) passed", done.stdout)
            counts["tests"] += int(passed[1]) if passed else 0
            if done.returncode not in (0, _REPORTED) or " failed" in done.stdout or not passed:
                failed.append(f"{file}: {done.stdout[-1500:]}{done.stderr[-500:]}")
    reports = [one.read_text(errors="replace") for one in sorted(args.folder.glob("kernels.*"))]
    counts["races"] = sum(one.count("WARNING: ThreadSanitizer: data race") for one in reports)
    counts["failures"] = len(failed) + counts["races"]
    for text in [*failed, *(one[:3000] for one in reports)]:
        print(text)
    print(json.dumps({**counts, "rounds": args.rounds, "threads": THREADS}))
    return 1 if counts["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
