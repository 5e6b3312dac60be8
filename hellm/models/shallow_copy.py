"""A module that is another one but for some of its parts."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

__all__ = ["shallow_copy"]

_Module = TypeVar("_Module", bound=nn.Module)


def shallow_copy(module: _Module) -> _Module:
    """Another module with the same parts, so that a part of the one can be replaced without touching the other."""
    other = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        other.__dict__[kind] = module.__dict__[kind].copy()
    return other
