"""Random integers from torch operators alone, the same on every device and for every seed, epoch and step.

A word is a hash of its place and a key, so there is no generator state, and a captured CUDA graph draws anew with each
key that is written into its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomWords", "distinct_below", "step_keys", "uniform_below"]

_WORD = 2**32 - 1
_PLACE_BITS = 31
# The multipliers of triple32 (Wellons, "Prospecting for hash functions") less 2^32 where that keeps products in int64.
_ROUNDS = ((17, 0xED5AD4BB - 2**32), (11, 0xAC4C1B51 - 2**32), (15, 0x31848BAB))


def step_keys(seed: int, epoch: int, step: int, num_streams: int) -> Tensor:
    """Keys of the streams of one step, [num_streams, 2] int64 on the CPU."""
    words = np.random.SeedSequence((seed, epoch, step)).generate_state(2 * num_streams)
    return torch.from_numpy(words.astype(np.int64)).view(num_streams, 2)


class RandomWords:
    """Streams of 32-bit words of fixed lengths, all hashed at once.

    Args:
        lengths: words of each stream, each below 2^31.
        device: where they are drawn.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self._lengths = list(lengths)
        self._place = torch.cat([torch.arange(length) for length in lengths]).to(device)
        self._stream = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(self._lengths)).to(device)

    def draw(self, keys: Tensor) -> tuple[Tensor, ...]:
        """[length] int64 in [0, 2^32) for each stream, no two of a stream alike; keys is [num_streams, 2]."""
        first, second = keys[self._stream].unbind(1)
        x = self._place ^ first
        for number, (shift, factor) in enumerate(_ROUNDS):
            x = ((x ^ (x >> shift)) * factor) & _WORD
            if number == 0:
                x = x ^ second
        return (x ^ (x >> 14)).split(self._lengths)


def uniform_below(high: Tensor, word: Tensor, next_word: Tensor) -> Tensor:
    """Integers in [0, high), uniform to 2^-32 relative to each; high [B] int64 below 2^31, two words [B] for each."""
    return (word * high + (next_word * high >> 32)) >> 32


def distinct_below(words: Tensor, size: int) -> Tensor:
    """`size` different places [size] int64 of words [N], every such choice equally likely."""
    # The place makes every key different and comes back with it.
    keys = (words << _PLACE_BITS) | torch.arange(words.numel(), device=words.device)
    return keys.topk(size).values & (2**_PLACE_BITS - 1)
