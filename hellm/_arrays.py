"""What callers may give for a tensor or a whole number: arrays of other libraries as tensors over the same memory."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["as_count", "as_tensor", "check_flag"]


def as_tensor(name: str, value: Any) -> Tensor:
    """`value` itself if it is a tensor, else a tensor over the memory of an array: nothing is copied.

    Takes what has `__dlpack__` (NumPy, CuPy, JAX) or `__cuda_array_interface__` (Numba). A read-only array is taken as
    well; the operators never write into their inputs.

    Raises:
        ValueError: naming `name`, for anything else, a sparse or nested tensor, and an array that torch cannot share
            memory with.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            layout = "nested" if value.is_nested else value.layout
            raise ValueError(f"{name} must be a dense tensor, got {layout}")
        return value
    shared = hasattr(value, "__dlpack__")
    if not shared and not hasattr(value, "__cuda_array_interface__"):
        raise ValueError(f"{name} must be a tensor or an array with __dlpack__, got {type(value).__name__}")
    # torch ends the whole process on a negative stride.
    strides = getattr(value, "strides", None) or ()
    if isinstance(strides, tuple) and any(stride < 0 for stride in strides):
        raise ValueError(f"{name} must have no negative strides, got {strides} bytes; pass a copy")
    try:
        tensor = torch.from_dlpack(value) if shared else torch.as_tensor(value, device="cuda")
    except (AssertionError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array that torch can share memory with: {error}") from error
    if tensor.data_ptr() % tensor.element_size():
        raise ValueError(f"{name} must be aligned to its {tensor.dtype} elements, got address {tensor.data_ptr()}")
    return tensor


def as_count(name: str, value: Any, *, low: int | None = 0) -> int:
    """`value` as an int: one already, or a whole number of NumPy or of a 0-d integer tensor.

    Raises:
        ValueError: naming `name`, for anything else (booleans and 2.0 too) and for a number below `low`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, (bool, float)) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        try:
            value = operator.index(value)
        except (TypeError, RuntimeError):
            raise ValueError(f"{name} must be an integer, got {type(value).__name__}") from None
    if low is not None and value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    return cast(int, value)  # one of torch.compile passes for one


def check_flag(name: str, value: Any) -> None:
    """A yes or no, not what merely counts as one.

    Raises:
        ValueError: naming `name`, unless `value` is True or False.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
