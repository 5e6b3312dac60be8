"""Data sets: readers and writers for the usual forms, id maps, splits, checks and a sample shop.

A form is one module in `hellm.data.forms`; that package's docstring says how to add one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hellm.data.dataset import DataError, Dataset, IdMap, ItemFeatures
from hellm.data.histories import Histories

if TYPE_CHECKING:
    from hellm.data.check import check_dataset
    from hellm.data.forms import form_names
    from hellm.data.load import convert, load_dataset, save_dataset
    from hellm.data.sample import write_sample_shop

_EXPORTS = {
    "check_dataset": "hellm.data.check",
    "convert": "hellm.data.load",
    "form_names": "hellm.data.forms",
    "load_dataset": "hellm.data.load",
    "save_dataset": "hellm.data.load",
    "write_sample_shop": "hellm.data.sample",
}

__all__ = [
    "DataError",
    "Dataset",
    "Histories",
    "IdMap",
    "ItemFeatures",
    "check_dataset",
    "convert",
    "form_names",
    "load_dataset",
    "save_dataset",
    "write_sample_shop",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hellm.data' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
