"""What the language model's scores are added to: nothing, or those of a sequence model that was trained before.

B = histories, T = items of the longest, I = items of the catalogue. Scores are dot products, so that their sum is one
of wider queries and keys.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from hellm.models.llm.item_tokens import last_hidden
from hellm.models.shallow_copy import shallow_copy

__all__ = ["NoResidual", "SequenceModel", "SequenceResidual"]


class SequenceModel(Protocol):
    """A module whose scores are <hidden state after a history, key of an item>, such as `hellm.models.SASRec`."""

    def __call__(self, items: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, T, D] after each of left-aligned `items` [B, T]; `mask` [B, T] is True at items."""
        ...

    def item_keys(self) -> Tensor:
        """[I, D]."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> SequenceModel: ...

    def eval(self) -> SequenceModel: ...


class NoResidual(nn.Module):
    """The scores of the language model alone.

    Attributes:
        sequence_model: None.
    """

    sequence_model: SequenceModel | None

    def __init__(self) -> None:
        super().__init__()
        self.sequence_model = None

    def keys(self, own: Tensor, rows: Tensor | None = None) -> Tensor:
        """[I, D'] keys of the sum, of the language model's keys [I, D]; or those of the items `rows` [n] int64."""
        return own

    def after_each(self, own: Tensor, items: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D'] queries of the sum after each of left-aligned `items`, of the language model's [B, T, D]."""
        return own

    def after_all(self, own: Tensor, items: Tensor, mask: Tensor) -> Tensor:
        """[B, D'] queries of the sum after the whole of each history, of the language model's [B, D]."""
        return own

    def extended(self, sequence_model: SequenceModel | None, num_items: int, max_length: int) -> NoResidual:
        """The same for a catalogue with more items."""
        return self


class SequenceResidual(NoResidual):
    """The scores of a sequence model, which is frozen; the language model's own start at 0.

    Args:
        sequence_model: A trained sequence model (`hellm.models.SASRec`).
        num_items: I.
        max_length: Items of a history that are read.

    Raises: ValueError, no sequence model, one of other items, or one that reads fewer items of a history.
    """

    sequence_model: SequenceModel

    def __init__(self, sequence_model: SequenceModel | None, num_items: int, max_length: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.sequence_model = _checked(sequence_model, num_items, max_length)

    def train(self, mode: bool = True) -> SequenceResidual:
        """Training mode for the gate; the sequence model stays as it is."""
        super().train(mode)
        self.sequence_model.eval()
        return self

    def keys(self, own: Tensor, rows: Tensor | None = None) -> Tensor:
        keys = self.sequence_model.item_keys()
        return torch.cat([own, (keys if rows is None else keys[rows]).to(own)], dim=1)

    def after_each(self, own: Tensor, items: Tensor, mask: Tensor) -> Tensor:
        return self._beside(own, self._sequence_hidden(items, mask))

    def after_all(self, own: Tensor, items: Tensor, mask: Tensor) -> Tensor:
        sequence = self._sequence_hidden(items, mask)
        return self._beside(own, last_hidden(sequence, mask, sequence.new_zeros(1, sequence.shape[2])))

    def extended(self, sequence_model: SequenceModel | None, num_items: int, max_length: int) -> SequenceResidual:
        other = shallow_copy(self)
        other.sequence_model = _checked(sequence_model, num_items, max_length)
        return other

    def _beside(self, own: Tensor, sequence: Tensor) -> Tensor:
        return torch.cat([self.gate * own, sequence.to(own)], dim=-1)

    @torch.no_grad()
    def _sequence_hidden(self, items: Tensor, mask: Tensor) -> Tensor:
        if items.shape[1] == 0:
            return self.gate.new_zeros(len(items), 0, self.sequence_model.item_keys().shape[1])
        return self.sequence_model(items, mask)


def _checked(model: SequenceModel | None, num_items: int, max_length: int) -> SequenceModel:
    if model is None:
        raise ValueError("sequence_residual needs a sequence_model, got None")
    if len(model.item_keys()) != num_items:
        raise ValueError(f"sequence_model must have {num_items} items, got {len(model.item_keys())}")
    longest = getattr(model, "max_length", max_length)
    if longest < max_length:
        raise ValueError(f"max_length must be at most {longest}, that of sequence_model, got {max_length}")
    return model.requires_grad_(False).eval()
