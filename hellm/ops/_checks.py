"""Checks of what users give, that several operators share; each error names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from hellm._arrays import as_tensor
from hellm.ops._dtypes import FLOATING
from hellm.ops.incidence import Incidence

_REDUCTIONS = ("mean", "sum", "none")


def check_hypergraph(hypergraph: Incidence) -> None:
    if not isinstance(hypergraph, Incidence):
        raise ValueError(f"hypergraph must be a Hypergraph, got {type(hypergraph).__name__}")


def check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")


def checked_rows(name: str, x: Tensor, *, size: int | None = None, size_name: str = "") -> Tensor:
    x = as_tensor(name, x)
    if x.ndim != 2:
        raise ValueError(f"{name} must be [rows, columns], got shape {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if size is not None and x.shape[0] != size:
        raise ValueError(f"{name} must have {size_name} = {size} rows, got {x.shape[0]}")
    return x


def check_same(name: str, x: Tensor, like_name: str, like: Tensor, *, same_dtype: bool = True) -> None:
    if x.shape[1] != like.shape[1]:
        raise ValueError(f"{name} must have {like.shape[1]} columns like {like_name}, got {x.shape[1]}")
    if same_dtype and x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} like {like_name}, got {x.dtype}")
    check_device(name, x.device, like, like_name)


def check_device(name: str, device: torch.device, like: Tensor, like_name: str = "x") -> None:
    if device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {device}")


def check_in_range(name: str, index: Tensor, count: int) -> None:
    """Indices on the CPU; looking at those on a GPU would wait for it at every step, and its kernels take any value.

    Raises:
        ValueError: naming the first index that is not in [0, count).
    """
    if not index.is_cpu or index.numel() == 0:
        return
    least, largest = torch.aminmax(index)
    if least.item() < 0 or largest.item() >= count:
        place = int(((index < 0) | (index >= count)).nonzero()[0])
        raise ValueError(f"{name} must be in [0, {count}), got {int(index[place])} first at position {place}")
