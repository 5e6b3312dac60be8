"""What compiled kernels are told of a tensor: an address and a code of its dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from hellm.ops._dtypes import accumulation_dtype

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def addresses(*tensors: Tensor | None) -> list[int]:
    """None has address 0."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def like(x: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    """Scales and values, which are contiguous, in the accumulation dtype of x."""
    dtype = accumulation_dtype(x)
    return [value if value is None or value.dtype is dtype else value.to(dtype) for value in values]
