"""The operators in plain torch, on any device: where nothing faster can run."""

from __future__ import annotations

import torch

from hellm.ops.backends._backend import Backend


class Plain(Backend):
    """Has no kernels, so that every operator is computed as it is written in its file."""

    name = "torch"

    def unavailable(self, device: torch.device) -> str | None:
        return None
