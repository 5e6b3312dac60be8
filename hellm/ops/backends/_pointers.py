"""What compiled kernels are told of a tensor: an address and a code of its dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from hellm.ops._dtypes import accumulation_dtype

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def like(values: Tensor | None, x: Tensor) -> Tensor | None:
    """Scales and values, which are contiguous, in the accumulation dtype of x."""
    dtype = accumulation_dtype(x)
    return values if values is None or values.dtype is dtype else values.to(dtype)
