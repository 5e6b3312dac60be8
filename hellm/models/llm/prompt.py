"""The text around the items of a history.

I = items, M = tokens kept of a title.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Prompt", "build_prompt", "ids_digest", "title_tokens"]

INSTRUCTION = "A customer bought these items, in this order. Predict the next item.\n"
RESPONSE = "\nNext item:"
# The published prompt: the Alpaca template, with the apostrophe U+2019 in the instruction.
OFFICIAL_INSTRUCTION = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGiven the user\u2019s purchase history, predict next possible item to be purchased.\n\n"
    "### Input:\n"
)
OFFICIAL_RESPONSE = "\n### Response:\n"


# A token stands for fewer characters than this, so what is further back cannot be in the tokens that are kept.
_MOST_CHARACTERS = 256


class Prompt(NamedTuple):
    """Token ids before and after the items of a history, each [n] int64."""

    instruction: Tensor
    response: Tensor


def build_prompt(tokenizer: Any, *, official: bool = False) -> Prompt:
    """The prompt in the tokens of `tokenizer`; it starts with the BOS token where the model has one.

    Args:
        tokenizer: of transformers, or anything with `encode(text, add_special_tokens=False)` and `bos_token_id`.
        official: the published text, which has a second BOS before the response.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = (OFFICIAL_INSTRUCTION, OFFICIAL_RESPONSE) if official else (INSTRUCTION, RESPONSE)
    instruction, response = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    response = [*bos, *response] if official else response
    return Prompt(torch.tensor([*bos, *instruction]), torch.tensor(response, dtype=torch.int64))


def title_tokens(tokenizer: Any, titles: Sequence[str | None], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids of every item's title, cut after `max_tokens`; the names of special tokens in a title are plain text.

    Returns: ids [I, M] int64 with 0 after the end of a title, and lengths [I] int64; a missing title has none.
    """
    # What users write is text, also where it looks like the end of a prompt.
    options = {"split_special_tokens": True} if hasattr(tokenizer, "split_special_tokens") else {}
    rows = []
    for title in titles:
        text = f" {title}"[: max_tokens * _MOST_CHARACTERS]
        rows.append(tokenizer.encode(text, add_special_tokens=False, **options)[:max_tokens] if title else [])
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = torch.zeros(len(rows), int(lengths.max()) if len(rows) else 0, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, lengths


def ids_digest(*ids: Tensor) -> str | None:
    """Hash of token ids; None for tensors without storage."""
    if any(one.is_meta for one in ids):
        return None
    return hashlib.sha256(str([one.tolist() for one in ids]).encode()).hexdigest()[:16]
