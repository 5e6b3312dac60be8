"""Dropout whose mask is drawn four elements at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, on the CPU with one draw of 64 bits for four elements.

    torch draws a mask element by element on one thread, which is an eighth of a fine-tuning step. With 16 bits an
    element, p is met to 1/65,536; what is kept is scaled by the share really kept, so that the mean stays exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of `x`."""
        if not self.training or x.device.type != "cpu" or self.inplace or not 0 < self.p < 1:
            return super().forward(x)
        kept = round((1 - self.p) * 65536)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        mask = (bits[: x.numel()] < kept - 32768).view(x.shape)
        return x * mask * (65536 / kept)
