"""What text and image encoding share: order of work, cache, progress, errors of loading."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hellm._pretrained import safe_loading
from hellm.data import ItemFeatures
from hellm.engines import Engine
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
    contents: Sequence[Any],
    keys: Sequence[bytes | None],
    sizes: Sequence[int],
    encode: Callable[[list[Any]], list[np.ndarray | Exception]],
    *,
    dim: int,
    batch_size: int,
    cache: FeatureCache | None,
    name: str,
    engine: Engine,
) -> tuple[ItemFeatures, dict[bytes, Exception]]:
    """Encode each distinct content that the cache lacks, the largest first, and put the rows together.

    Equal sizes share a batch, so little is spent on padding. The batches depend on the contents alone, and every
    finished one goes into the cache: what a killed run leaves are exactly the rows still to do.

    Args:
        contents: [N] what the encoder reads.
        keys: [N] what stands for each row's content; None = the row is missing.
        sizes: [N] cost of a row, e.g. its tokens.
        encode: Contents of a batch -> for each [dim] float32, or why it cannot be read.
        dim: Columns.
        batch_size: Rows encoded at once.
        cache: None keeps nothing.
        name: Of the progress bar, which shows on a terminal only.
        engine: Who encodes the batches.

    Returns: values [N, dim] float32, where rows that are missing, unreadable or NaN are zero and masked; and what could
        not be read, by key.
    """
    from tqdm import tqdm

    first = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    found = cache.get(list(first)) if cache is not None else {}
    pending = sorted((row for key, row in first.items() if key not in found), key=lambda row: (-sizes[row], row))
    batches = [pending[start : start + batch_size] for start in range(0, len(pending), batch_size)]
    parts = ([(keys[row], contents[row]) for row in rows] for rows in batches)
    unreadable: dict[bytes, Exception] = {}
    for rows in tqdm(engine(_Keyed(encode), parts), total=len(batches), desc=name, unit="batch", disable=None):
        unreadable.update((key, row) for key, row in rows if isinstance(row, Exception))
        encoded = [(key, row) for key, row in rows if not (isinstance(row, Exception) or np.isnan(row).any())]
        if cache is not None:
            cache.put(encoded)
        found.update(encoded)
    values, mask = np.zeros((len(keys), dim), np.float32), np.zeros(len(keys), bool)
    for row, key in enumerate(keys):
        if key in found:
            values[row], mask[row] = found[key], True
    return ItemFeatures(values, mask), unreadable


class _Keyed(NamedTuple):
    """The worker of an engine: rows by the keys of what they are of."""

    encode: Callable[[list[Any]], list[np.ndarray | Exception]]

    def __call__(self, part: list[tuple[bytes, Any]]) -> list[tuple[bytes, np.ndarray | Exception]]:
        return list(zip((key for key, _ in part), self.encode([content for _, content in part]), strict=True))


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
