"""Random graphs, rows and settings for one kernel, against the definition in float64; a program.

    python tests/ops/fuzzed_operators.py --count 10000 --kernel native-avx2

It runs the tests of test_properties.py with so many examples of each operator and prints, last, a JSON object: how many
were compared, and the largest error of each operator in units of what the test allows. A kernel is an instruction set
of the compiled ones, or plain torch; one that this processor has not is said to be unavailable, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest


class Found:
    """The module of the tests, as pytest has imported it."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.figures = session.items[0].module.figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True, help="examples of each operator")
    parser.add_argument("--kernel", required=True, metavar="NAME", help="torch, or native-SET")
    args = parser.parse_args()
    backend, _, instruction_set = args.kernel.partition("-")
    if instruction_set:
        from hellm.ops.backends import loaders

        extension = loaders.native()
        if isinstance(extension, ImportError):
            print(extension)
            return 1
        if instruction_set not in extension.instruction_sets():
            print(json.dumps({"unavailable": f"this processor has no {instruction_set}"}))
            return 0
        extension.use_instruction_set(instruction_set)
    os.environ |= {"HELLM_EXAMPLES": str(args.count), "HELLM_BACKEND": backend}
    file, found = Path(__file__).with_name("test_properties.py"), Found()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", "-k", "not wrong_argument", str(file)], [found])
    print(json.dumps({"kernel": args.kernel, "operators": found.figures(), "failures": int(code != 0)}))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
