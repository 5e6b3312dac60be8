"""Started by torchrun from test_processes.py: fine-tunings one after the other in the same processes.

The only argument is JSON: a list of {"arguments": of the command line, "stop_at": step}. With `stop_at` the last
process sends itself SIGTERM in that step. Exit codes go to codes-<process>.json in the working directory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from hellm.cli import main
from hellm.training import finetune as module

LOSS = module.finetune_loss


def stopping(last_step: int):
    steps = iter(range(last_step + 1))

    def loss(model, batch, *args):
        if next(steps, None) == last_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return LOSS(model, batch, *args)

    return loss


if __name__ == "__main__":
    codes = []
    for job in json.loads(sys.argv[1]):
        stop_at = job.get("stop_at") if os.environ["RANK"] == "1" else None
        # Two steps of the plan come first.
        module.finetune_loss = LOSS if stop_at is None else stopping(2 + stop_at)
        codes.append(main(job["arguments"]))
    Path(f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))
