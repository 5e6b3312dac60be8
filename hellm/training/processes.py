"""Several processes that train one model, each on its share of every step.

`accelerate launch` or torchrun starts them, and accelerate connects them: gloo on the CPU, NCCL on CUDA.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LostProcessError", "Processes", "connected", "launched_processes"]

T = TypeVar("T")


class LostProcessError(ConnectionError):
    """Another process that trains the same model has died, so that this one cannot go on."""


class Processes:
    """The processes that train one model together; without arguments this one alone.

    Each has its share of the rows of a step's losses, and `hellm.training.objective` makes their gradients those of
    one process. Where one of them dies, what the others do together next raises `LostProcessError`.

    Args:
        accelerator: connects the processes; None is this process alone.
        seed: of the dropout of all processes but the first, which goes on with torch's generator. None: all draw alike,
            for a model that every process makes whole.

    Attributes:
        index: of this process. The first, 0, is the one that writes, prints and validates.
        count: of all processes.
        accelerator: None is this process alone.
    """

    def __init__(self, accelerator: Accelerator | None = None, *, seed: int | None = 0) -> None:
        # What it gathers and sums has the type of what it was given, which its annotations do not say.
        self.accelerator: Any = accelerator
        self._seed = seed
        self.index = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes

    def share(self, length: int) -> slice:
        """The rows of this process among `length`; some may have none."""
        return slice(length * self.index // self.count, length * (self.index + 1) // self.count)

    def on_first(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process alone; every process waits, and returns or raises what it did."""
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.index == 0:
            try:
                outcome = [work(), None]
            except Exception as error:
                outcome = [None, error]
        with connected():
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes."""
        if self.count == 1:
            return x
        with connected():
            return self.accelerator.reduce(x, "sum")

    def mesh(self) -> DeviceMesh:
        """All of them in one dimension, for `torch.distributed`."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.accelerator.device.type, (self.count,))

    def agree(self, caught: list[int]) -> bool:
        """Whether any process caught a signal; its number is then in `caught` everywhere."""
        if self.count == 1:
            return bool(caught)
        own = torch.tensor([caught[0] if caught else 0], device=self.accelerator.device)
        with connected():
            signum = int(self.accelerator.gather(own).max())
        if signum and not caught:
            caught.append(signum)
        # Not whether `caught` is empty: a signal may have come since, to this process alone.
        return signum > 0

    def seed_step(self, epoch: int, step: int) -> None:
        """Give every process dropout of its own, the same in a resumed run, unless all draw alike."""
        if self.index > 0 and self._seed is not None:
            state = np.random.SeedSequence((self._seed, self.index, epoch, step)).generate_state(1)
            torch.manual_seed(int(state[0]))


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A block that needs the other processes."""
    try:
        yield
    except RuntimeError as error:
        # Gloo and NCCL have no type for it.
        lost = re.search(
            r"connection \w+ by (remote )?peer|broken pipe|remote process exited", str(error), re.IGNORECASE
        )
        if lost is None:
            raise
        raise LostProcessError(
            f"another process of this training is gone ({lost[0].lower()}), and this one ends; resume=True goes on "
            "from the last checkpoint, with any number of processes"
        ) from error


def launched_processes(device: str, *, seed: int | None) -> Processes:
    """The processes that a launcher started, each on its own GPU with "cuda"; this one alone without a launcher.

    `seed`: see `Processes`.

    Raises: ValueError, a `device` with a number, which would be the same for all processes, or a launcher that is told
        to shard the model, which here is a setting.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda" in several processes, got {device!r}')
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate launch must be without --use_fsdp: `hellm finetune sharded=true` shards the model")
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # The others wait while the first validates; a process that died is the launcher's to notice.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # A share may have no use for some parameters; and buckets that stay as they are sum in one order, so that a resumed
    # run has the bits of one that went on.
    gradients = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patience, gradients])
    atexit.register(PartialState().destroy_process_group)
    return Processes(accelerator, seed=seed)
