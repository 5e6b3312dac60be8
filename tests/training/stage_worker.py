"""Trainings one after the other in the same processes, which are forks of one that has imported what they need.

Arguments: the number of processes, and JSON: a list of {"arguments": of the command line, "stop_at": step}. With
`stop_at` the last process sends itself SIGTERM in that step. Exit codes go to codes-<process>.json in the working
directory.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What the trainings import when they need it.
import accelerate  # noqa: F401
import peft  # noqa: F401

from hellm.cli import main
from hellm.training import finetune as module
from hellm.training import pretrain, sasrec  # noqa: F401

LOSS = module.finetune_loss


def stopping(last_step: int):
    steps = iter(range(last_step + 1))

    def loss(model, batch, *args):
        if next(steps, None) == last_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return LOSS(model, batch, *args)

    return loss


def run(jobs: Sequence[Mapping[str, Any]]) -> None:
    codes, last = [], int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for job in jobs:
        stop_at = job.get("stop_at") if last else None
        # Two steps of the plan come first.
        module.finetune_loss = LOSS if stop_at is None else stopping(2 + stop_at)
        codes.append(main(job["arguments"]))
    Path(f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))


def fork(count: int, jobs: Sequence[Mapping[str, Any]]) -> int:
    """Processes as a launcher sets them up. Returns: the worst exit code."""
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
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(fork(int(sys.argv[1]), json.loads(sys.argv[2])))
