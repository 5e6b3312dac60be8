"""Built-in item features that need no download and no training: hashed n-grams of text, colours and layout of images.

They are meant for a first run and for tests; encoders of `hellm.features` describe items far better. Each row depends
on its own item only, except for the inverse document frequencies of the text.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from hellm.data.dataset import ItemFeatures
from hellm.data.pictures import open_picture

_WORD = re.compile(r"\w+")
_LETTER = re.compile(r"[^\W\d_]")
MAX_CHARACTERS = 1000
_SIDE = 48
_CELLS = 4


TEXT_FIELDS = ("title", "brand", "category", "description")


def item_texts(
    titles: list[str] | None, fields: dict[str, list[str]], chosen: Sequence[str] = TEXT_FIELDS
) -> list[str] | None:
    """One text per item from the `chosen` of title, brand, category and description, in this order.

    Returns: [num_items]; None if the source has none of them.
    Raises: ValueError, another field, or none.
    """
    if not chosen or set(chosen) - set(TEXT_FIELDS):
        raise ValueError(f"text fields must be among {', '.join(TEXT_FIELDS)}, got {', '.join(chosen) or 'none'}")
    there = {"title": titles, **fields}
    category = there.get("category")
    if category is not None and any(category) and not any(map(_LETTER.search, category)):
        # Numbers of categories say nothing as text.
        there["category"] = None
    columns = [there.get(name) for name in TEXT_FIELDS if name in chosen]
    columns = [column for column in columns if column is not None]
    return [" ".join(filter(None, parts)) for parts in zip(*columns, strict=True)] if columns else None


def text_features(texts: Sequence[str], *, dim: int = 512) -> ItemFeatures:
    """Hashed TF-IDF of words, pairs of words and character 4-grams, L2-normalised.

    A term goes to a column with a sign, both by CRC-32 (feature hashing, Weinberger et al. 2009); its weight is
    (1 + log tf) * (log((1 + n) / (1 + df)) + 1).

    Args:
        texts: [num_items]; blank = missing. Only the first 1,000 characters of each count.
        dim: Columns, > 0.

    Returns: values [num_items, dim] float32.
    Raises: ValueError: dim <= 0.
    """
    if dim <= 0:
        raise ValueError(f"dim must be > 0, got {dim}")
    vocabulary: dict[str, int] = {}
    rows, terms, counts = array("q"), array("q"), array("d")
    for row, text in enumerate(texts):
        for term, count in Counter(_terms(text[:MAX_CHARACTERS])).items():
            rows.append(row)
            terms.append(vocabulary.setdefault(term, len(vocabulary)))
            counts.append(count)
    values = np.zeros((len(texts), dim), np.float32)
    row, term = np.array(rows), np.array(terms)
    mask = np.zeros(len(texts), bool)
    mask[row] = True
    hashed = np.array([zlib.crc32(one.encode()) for one in vocabulary], dtype=np.int64)
    inverse_frequency = np.log((1 + mask.sum()) / (1 + np.bincount(term, minlength=len(vocabulary)))) + 1
    weight = np.where(hashed & 1, 1.0, -1.0) * inverse_frequency
    np.add.at(values, (row, (hashed >> 1)[term] % dim), weight[term] * (1 + np.log(np.array(counts))))
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    return ItemFeatures(values / np.where(norm > 0, norm, 1), mask & (norm[:, 0] > 0))


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    grams = [f"#{padded[at : at + 4]}" for word in words for padded in [f"<{word}>"] for at in range(len(padded) - 3)]
    return words + pairs + grams


def image_features(
    paths: Sequence[str | Path], *, on_unreadable: Callable[[str, Exception], None] | None = None
) -> ItemFeatures:
    """Colour histogram, mean colours on a 4 x 4 grid and edge directions on the same grid, L2-normalised.

    Args:
        paths: [num_items] image files; "" = the item has none.
        on_unreadable: Called with path and error for each file that cannot be read; its item counts as missing.

    Returns: values [num_items, 240] float32.
    """
    rows: list[np.ndarray | None] = []
    for path in paths:
        row = None
        if str(path):
            # Pillow raises whatever its decoders meet in a broken file, so no narrower class will do.
            try:
                row = _describe(_pixels(path))
            except Exception as error:
                if on_unreadable is not None:
                    on_unreadable(str(path), error)
        rows.append(row)
    mask = np.array([row is not None for row in rows], dtype=bool)
    values = np.zeros((len(rows), 64 + _CELLS**2 * 3 + _CELLS**2 * 8), np.float32)
    if mask.any():
        values[mask] = np.stack([row for row in rows if row is not None])
    return ItemFeatures(values, mask)


def _pixels(path: str | Path) -> np.ndarray:
    """Picture as [48, 48, 3] float32 in 0..1."""
    from PIL import Image

    picture = open_picture(path, _SIDE).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255


def _describe(pixels: np.ndarray) -> np.ndarray:
    levels = np.minimum((pixels * 4).astype(np.int64), 3)
    histogram = np.bincount((levels @ [16, 4, 1]).ravel(), minlength=64)
    cell = _SIDE // _CELLS
    layout = 1 - pixels.reshape(_CELLS, cell, _CELLS, cell, 3).mean(axis=(1, 3))
    down, right = np.gradient(pixels.mean(axis=2))
    direction = ((np.arctan2(down, right) / (2 * np.pi) + 0.5) * 8).astype(np.int64) % 8
    place = np.arange(_SIDE) // cell
    bins = (place[:, None] * _CELLS + place[None, :]) * 8 + direction
    edges = np.bincount(bins.ravel(), np.hypot(down, right).ravel(), minlength=_CELLS**2 * 8)
    # Square roots make Euclidean geometry of histograms that of the Hellinger distance.
    blocks = [np.sqrt(histogram), layout.ravel(), np.sqrt(edges)]
    blocks = [block / max(float(np.linalg.norm(block)), 1e-12) for block in blocks]
    return (np.concatenate(blocks) / np.sqrt(len(blocks))).astype(np.float32)
