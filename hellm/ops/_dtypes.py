"""Dtypes of rows, of sums, and under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Type of device -> dispatch key of its autocast.
AUTOCAST_KEYS = {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "mps": "AutocastMPS",
    "xpu": "AutocastXPU",
    "hpu": "AutocastHPU",
    "mtia": "AutocastMTIA",
}


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """In the dtype that sums are accumulated in."""
    return x.to(accumulation_dtype(x))


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device; False for one that it does not know."""
    return device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


def cast_rows(args: tuple, device_type: str, dtype: torch.dtype | None) -> tuple:
    """Matrices of rows follow autocast; scales, values and indices (all 1-d) keep their dtype, and so does float64."""
    dtype = dtype or torch.get_autocast_dtype(device_type)
    return tuple(
        a.to(dtype)
        if isinstance(a, Tensor) and a.ndim == 2 and a.is_floating_point() and a.dtype != torch.float64
        else a
        for a in args
    )
