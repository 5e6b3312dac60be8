"""Encoded features put into a data set."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hellm.data import DataError, Dataset, ItemFeatures
from hellm.data.simple_features import TEXT_FIELDS, item_texts
from hellm.engines import Engine
from hellm.features.noted import BUILT_IN, NotedEncoder

__all__ = ["add_features", "choose_encoders", "encode_like"]

logger = logging.getLogger(__name__)

_DEFAULTS = {"text": "minilm", "image": "efficientnet"}
_WANTED = {"text": "titles, brands, categories or descriptions", "image": "picture files"}


def choose_encoders(
    dataset: Dataset,
    *,
    text: str | None = "auto",
    image: str | None = "auto",
    text_fields: Sequence[str] = TEXT_FIELDS,
) -> dict[str, str]:
    """Modality -> encoder, for what `add_features` would encode with these arguments.

    Raises: DataError, an encoder is named and the data have nothing for it, or "auto" finds neither kind; ValueError,
        other text fields.
    """
    content, chosen = _content(dataset, text_fields), {}
    for modality, encoder in (("text", text), ("image", image)):
        if encoder is None or (encoder == "auto" and modality not in content):
            continue
        if modality not in content:
            addresses = modality == "image" and any(dataset.item_fields.get("image_url", ()))
            why = " (only web addresses, which are not fetched)" if addresses else ""
            raise DataError(
                f"data set {dataset.name!r} has no {_WANTED[modality]} of items{why}, so there is nothing for "
                f"{modality} encoder {encoder!r}"
            )
        chosen[modality] = _DEFAULTS[modality] if encoder == "auto" else encoder
    if not chosen:
        there = " and ".join(content) or "neither text nor image"
        raise DataError(
            f"data set {dataset.name!r} leaves nothing to encode: its items have {there}, and the encoders asked for "
            f"are text {text!r}, image {image!r}"
        )
    return chosen


def add_features(
    dataset: Dataset,
    *,
    text: str | None = "auto",
    image: str | None = "auto",
    text_name: str = "text",
    text_fields: Sequence[str] = TEXT_FIELDS,
    batch_size: int = 32,
    device: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    engine: Engine = map,
    **text_options: Any,
) -> Dataset:
    """The data set with the item features "text" and "image" encoded anew; its other features stay.

    Args:
        dataset: Its `item_titles`, `item_fields` and `item_fields["image"]` (paths) are read.
        text: Encoder, see `encode_text`; "auto" is "minilm" where the data have texts; None leaves "text" as it is.
        image: Encoder, see `encode_images`; "auto" is "efficientnet" where the data have pictures; None as above.
        text_name: What the features of texts are called, so that those of several encoders stand side by side.
        text_fields: What makes the text of an item: title, brand, category and description, whichever the data have.
        batch_size, device, cache, engine: As in `encode_text` and `encode_images`.
        text_options: For `encode_text`.

    Returns: A new data set; its notes name the encoders, and the pictures that cannot be read and count as missing.

    Raises:
        DataError: As `choose_encoders`.
        ValueError, ImportError, OSError: As `encode_text` and `encode_images`.
    """
    from hellm.features._encode import check_batch_size
    from hellm.features.image import load_image_encoder
    from hellm.features.text import load_text_encoder

    check_batch_size(batch_size)
    chosen = choose_encoders(dataset, text=text, image=image, text_fields=text_fields)
    content, names = _content(dataset, text_fields), {"text": text_name, "image": "image"}
    features, encoders, unreadable = dict(dataset.item_features), dict(dataset.encoders), []
    # An encoder names its earlier work anew.
    made = {modality: f"{names[modality]} features are by encoder " for modality in chosen}
    notes = [note for note in dataset.notes if not note.startswith(tuple(made.values()))]
    for modality, encoder in chosen.items():
        options = {"batch_size": batch_size, "cache": cache, "engine": engine}
        if modality == "text":
            model = load_text_encoder(encoder, device=device, **text_options)
            features[text_name] = model.features(content["text"], **options)
        else:
            model = load_image_encoder(encoder, device=device)
            features["image"] = model.features(content["image"], on_unreadable=_noting(unreadable), **options)
        notes.append(f"{made[modality]}{encoder!r}")
        about = {"text_fields": list(text_fields)} | text_options if modality == "text" else {}
        encoders[names[modality]] = {"encoder": encoder, "key": model.key} | about
    if unreadable:
        notes.append(_unreadable(unreadable))
        logger.warning(notes[-1])
    return dataclasses.replace(dataset, item_features=features, notes=notes, encoders=encoders)


def encode_like(dataset: Dataset, new: Dataset, *, cache: str | Path | None = None) -> dict[str, ItemFeatures]:
    """Features of other items by the encoders of a data set (`Dataset.encoders`), with the options they had there.

    Built-in features ("hashed", "colours") are left to who knows the items of the data set.

    Args:
        dataset: Whose encoders are used.
        new: The items that are to be encoded, without events.
        cache: As in `encode_text`.
    Returns: Modality -> features [items of `new`], of what the items have.
    Raises: ValueError, ImportError, OSError: As `encode_text` and `encode_images`.
    """
    from hellm.features.cache import default_cache

    found, unreadable, cache = {}, [], default_cache() if cache is None else cache
    for modality in dataset.encoders:
        noted = NotedEncoder.of(dataset.encoders, modality)
        content = _content(new, noted.text_fields).get("image" if noted.is_of_pictures else "text")
        if noted.name is None or noted.name in BUILT_IN or content is None:
            continue
        pictures = {"on_unreadable": _noting(unreadable)} if noted.is_of_pictures else {}
        found[modality] = noted.load().features(content, cache=cache, **pictures)
    if unreadable:
        logger.warning(_unreadable(unreadable))
    return found


def _noting(unreadable: list[str]) -> Callable[[str, Exception], None]:
    return lambda path, error: unreadable.append(f"{Path(path).name} ({error})")


def _unreadable(pictures: Sequence[str]) -> str:
    return f"{len(pictures)} pictures cannot be read and count as missing: {'; '.join(pictures)}"


def _content(dataset: Dataset, text_fields: Sequence[str]) -> dict[str, list[str]]:
    """What there is to encode: texts and picture paths of all items, "" where one has none."""
    texts = item_texts(dataset.item_titles, dataset.item_fields, text_fields)
    content = {"text": texts, "image": dataset.item_fields.get("image")}
    return {
        modality: values for modality, values in content.items() if values and any(value.strip() for value in values)
    }
