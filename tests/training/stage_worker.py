"""Trainings one after the other in the same processes, which are forks of one that has imported what they need.

Arguments: the number of processes, and JSON: a list of {"arguments": of the command line, "signal": [number, epoch,
step]}, which the last process sends itself there. Exit codes go to codes-<process>.json in the working directory.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What the trainings import when they need it.
import accelerate  # noqa: F401
import peft  # noqa: F401

from hellm.cli import main
from hellm.training import finetune, pretrain, sasrec  # noqa: F401
from hellm.training.step import EagerStep

RUN = EagerStep.run


def signalling(signum: int, *place: int):
    """`EagerStep.run` that sends this process a signal in (epoch, step)."""

    def run(self, *at):
        if at == place:
            os.kill(os.getpid(), signum)
        return RUN(self, *at)

    return run


def run(jobs: Sequence[Mapping[str, Any]]) -> None:
    codes, last = [], int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for job in jobs:
        EagerStep.run = signalling(*job["signal"]) if last and "signal" in job else RUN
        codes.append(main(job["arguments"]))
    Path(f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))


def fork(count: int, jobs: Sequence[Mapping[str, Any]]) -> int:
    """Processes as a launcher sets them up. Returns: 0, or 1 where one of them ended otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    children = []
    for index in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
            run(jobs)
            sys.exit(0)
        children.append(child)
    return int(any([os.waitpid(child, 0)[1] for child in children]))


if __name__ == "__main__":
    sys.exit(fork(int(sys.argv[1]), json.loads(sys.argv[2])))
