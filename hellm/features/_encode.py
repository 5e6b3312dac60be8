"""What text and image encoding share: order of work, cache, progress, errors of loading."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hellm._pretrained import safe_loading
from hellm.data import ItemFeatures
from hellm.features.cache import FeatureCache

__all__ = [
    "check_batch_size",
    "encode_rows",
    "load_pretrained",
    "load_transformers",
    "pooled",
    "require",
]

INSTALL = 'pip install "hellm[encoders]"'


def encode_rows(
    keys: Sequence[bytes | None],
    sizes: Sequence[int],
    encode: Callable[[list[int]], np.ndarray],
    *,
    dim: int,
    batch_size: int,
    cache: FeatureCache | None,
    name: str,
) -> ItemFeatures:
    """Encode each distinct content that the cache lacks, the largest first, and put the rows together.

    Equal sizes share a batch, so little is spent on padding. The order of work depends on the contents alone, and every
    finished batch goes into the cache: what a killed run leaves are exactly the batches still to do.

    Args:
        keys: [N] what stands for each row's content; None = the row is missing.
        sizes: [N] cost of a row, e.g. its tokens.
        encode: rows to encode -> [n, dim] float32; it may leave out rows it cannot read by NaN.
        dim: Columns.
        batch_size: Rows encoded at once.
        cache: None keeps nothing.
        name: Of the progress bar, which shows on a terminal only.

    Returns: values [N, dim] float32; rows that are missing or came out as NaN are zero and masked.
    """
    from tqdm import tqdm

    first = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    found = cache.get(list(first)) if cache is not None else {}
    pending = sorted((row for key, row in first.items() if key not in found), key=lambda row: (-sizes[row], row))
    for start in tqdm(range(0, len(pending), batch_size), desc=name, unit="batch", disable=None):
        rows = pending[start : start + batch_size]
        encoded = [
            (key, value)
            for row, value in zip(rows, encode(rows), strict=True)
            if (key := keys[row]) is not None and not np.isnan(value).any()
        ]
        if cache is not None:
            cache.put(encoded)
        found.update(encoded)
    values, mask = np.zeros((len(keys), dim), np.float32), np.zeros(len(keys), bool)
    for row, key in enumerate(keys):
        if key in found:
            values[row], mask[row] = found[key], True
    return ItemFeatures(values, mask)


def load_pretrained(kind: str, name: str, takes: str, load: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Call `load` -> (model, something), turning what transformers raises into one plain message.

    `load` must hand `NO_CODE` and for models `NO_PICKLES` to all that it loads, so that nothing of theirs is run.

    Args:
        kind: "text" or "image".
        name: Folder or hub id.
        takes: Argument that the model's forward must have.
    """
    folder = Path(name)
    if name.startswith((".", "/", "~")) and not folder.exists():
        raise FileNotFoundError(f"{kind} encoder {name}: no such folder")
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{kind} encoder {name}: the folder must hold a config.json, and has none")
    try:
        with safe_loading(f"{kind} encoder {name}"):
            model, other = load()
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise OSError(
            f"{kind} encoder {name!r} is no model folder here and cannot be had from the hub ({first}); "
            "give the path of a downloaded model, or one that comes in a package"
        ) from None
    if takes not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{kind} encoder {name!r} must take {takes}, but {type(model).__name__} does not")
    return model, other


def load_transformers() -> Any:
    import transformers

    return transformers


def pooled(output: Any) -> Any:
    """The embedding in what `get_text_features` or `get_image_features` returns, in any version of transformers."""
    return getattr(output, "pooler_output", output)


def require(kind: str, name: str, package: str, load: Callable[[], Any]) -> Any:
    """Import through `load`; a missing package becomes an error that names the extra."""
    try:
        return load()
    except ImportError:
        raise ImportError(f"{kind} encoder {name!r} needs the package {package}: {INSTALL}") from None


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
