"""What kernels take for granted: dtype, sizes, device and layout of their arguments, checked before they are used.

A kernel reads memory as what it is told that it holds. The public functions check what users give; these checks stand
in front of the kernels, for whoever calls an operator or a backend itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

# Backend functions, by name -> arguments -> kind and sizes. All "rows" have the dtype of the first. Equal letters are
# equal sizes; "R=N" is N where the argument is None. A count is at least its first bound and at most its second.
_LAYOUTS: dict[str, dict[str, str]] = {
    "incidence_product": {
        "x": "rows C D",
        "indptr": "int64 R+1",
        "indices": "int32 E",
        "values": "floating E",
        "schedule": "schedule R",
    },
    "hypergraph_conv": {
        "x": "rows V D",
        "vertex_indptr": "int64 V+1",
        "vertex_edges": "int32 E",
        "vertex_values": "floating E",
        "edge_indptr": "int64 M+1",
        "edge_vertices": "int32 E",
        "edge_values": "floating E",
        "in_scale": "floating V",
        "edge_scale": "floating M",
        "out_scale": "floating V",
        "diagonal": "floating V",
        "num_layers": "count 0",
        "vertex_schedule": "schedule V",
        "edge_schedule": "schedule M",
    },
    "bipartite_propagate": {
        "user_x": "rows V D",
        "item_x": "rows M D",
        "vertex_indptr": "int64 V+1",
        "vertex_edges": "int32 E",
        "edge_indptr": "int64 M+1",
        "edge_vertices": "int32 E",
        "user_scale": "floating V",
        "item_scale": "floating M",
        "num_layers": "count 0",
        "vertex_schedule": "schedule V",
        "edge_schedule": "schedule M",
    },
    "info_nce": {
        "anchor": "rows N D",
        "positive": "rows N D",
        "temperature": "floating",
        "rows": "index R=N",
        "row_grad": "floating R",
    },
    "item_cross_entropy": {
        "hidden": "rows N D",
        "item_embedding": "rows I D",
        "target": "int64 N",
        "bias": "floating I",
        "row_grad": "floating N",
    },
    "knn": {"x": "rows N D", "k": "count 1 N"},
}
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "rows": _FLOATING,
    "floating": _FLOATING,
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "index": (torch.int32, torch.int64),
}


class _Tensor(NamedTuple):
    """One tensor of a layout: sizes are (letter, what is added to it)."""

    position: int
    name: str
    is_rows: bool
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[tuple[str, int], ...]
    default: str | None


def checked(function: Callable) -> Callable:
    """A function of a backend that gets its tensors contiguous and as the layout of its name says.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.
    """
    positions = {name: place for place, name in enumerate(inspect.signature(function).parameters)}
    tensors, schedules, counts = [], [], []
    for name, text in _LAYOUTS[function.__name__].items():
        kind, *sizes = text.split()
        if name not in positions:
            continue  # schedules, which only GPUs read
        if kind == "schedule":
            schedules.append((positions[name], name, sizes[0]))
        elif kind == "count":
            counts.append((positions[name], name, int(sizes[0]), sizes[1] if sizes[1:] else None))
        else:
            letters = [size.partition("=")[0].partition("+") for size in sizes]
            default = sizes[0].partition("=")[2] if sizes else ""
            tensors.append(
                _Tensor(
                    positions[name],
                    name,
                    kind == "rows",
                    _DTYPES[kind],
                    tuple((letter, int(more or 0)) for letter, _, more in letters),
                    default or None,
                )
            )
    first = tensors[0].position

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        given, sizes = list(args), {}
        device, dtype = args[first].device, args[first].dtype
        for position, name, is_rows, dtypes, letters, default in tensors:
            tensor = given[position]
            if tensor is None:
                if default is not None:
                    sizes[letters[0][0]] = sizes[default]
                continue
            shape = tensor.shape
            fits = tensor.dtype in dtypes and tensor.device == device and len(shape) == len(letters)
            if fits:
                for (letter, more), size in zip(letters, shape, strict=True):
                    if not sizes.setdefault(letter, size - more) == size - more >= 0:
                        fits = False
            if not fits or (is_rows and tensor.dtype != dtype):
                dtypes = (dtype,) if is_rows and dtype in dtypes else dtypes
                _refuse(name, tensor, dtypes, letters, sizes, device)
            given[position] = tensor.contiguous()
        for position, name, letter in schedules:
            row_order, hub_chunk_begin, *_ = given[position]
            parts = (("row_order", row_order, letter, 0), ("hub_chunk_begin", hub_chunk_begin, f"hubs of {name}", 1))
            for part, tensor, count, more in parts:
                fits = tensor.dtype == torch.int32 and tensor.ndim == 1 and tensor.device == device
                if not fits or sizes.setdefault(count, len(tensor) - more) != len(tensor) - more:
                    _refuse(f"{name}.{part}", tensor, (torch.int32,), ((count, more),), sizes, device)
        for position, name, least, letter in counts:
            if not least <= given[position] or (letter is not None and given[position] > sizes[letter]):
                limit = f">= {least}" if letter is None else f"between {least} and {sizes[letter]}"
                raise ValueError(f"{name} must be {limit}, got {given[position]}")
        return function(*given)

    return call


def _refuse(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    letters: tuple[tuple[str, int], ...],
    sizes: dict[str, int],
    device: torch.device,
) -> NoReturn:
    shape = [str(sizes[letter] + more) if letter in sizes else letter for letter, more in letters]
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise ValueError(
        f"{name} must be [{', '.join(shape)}] {wanted} on {device}, got {tuple(tensor.shape)} "
        f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
    )
