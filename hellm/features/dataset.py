"""Encoded features put into a data set."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from hellm.data import DataError, Dataset
from hellm.data.simple_features import item_texts

__all__ = ["add_features", "choose_encoders"]

logger = logging.getLogger(__name__)

_DEFAULTS = {"text": "minilm", "image": "efficientnet"}
_WANTED = {"text": "titles, brands, categories or descriptions", "image": "picture files"}


def choose_encoders(dataset: Dataset, *, text: str | None = "auto", image: str | None = "auto") -> dict[str, str]:
    """Modality -> encoder, for what `add_features` would encode with these arguments.

    Raises: DataError, an encoder is named and the data have nothing for it, or "auto" finds neither kind.
    """
    content, chosen = _content(dataset), {}
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
    batch_size: int = 32,
    max_length: int = 256,
    device: str = "auto",
    cache: str | Path | None = None,
) -> Dataset:
    """The data set with the item features "text" and "image" encoded anew; its other features stay.

    The text of an item is its title, brand, category and description, whichever the data have.

    Args:
        dataset: Its `item_titles`, `item_fields` and `item_fields["image"]` (paths) are read.
        text: Encoder, see `encode_text`; "auto" is "minilm" where the data have texts; None leaves "text" as it is.
        image: Encoder, see `encode_images`; "auto" is "efficientnet" where the data have pictures; None as above.
        batch_size, max_length, device, cache: As in `encode_text` and `encode_images`.

    Returns: A new data set; its notes name the encoders, and the pictures that cannot be read and count as missing.

    Raises:
        DataError: As `choose_encoders`.
        ValueError, ImportError, OSError: As `encode_text` and `encode_images`.
    """
    from hellm.features.image import encode_images
    from hellm.features.text import encode_text

    chosen, content = choose_encoders(dataset, text=text, image=image), _content(dataset)
    features, unreadable = dict(dataset.item_features), []
    # An encoder names its earlier work anew.
    made = {modality: f"{modality} features are by encoder " for modality in chosen}
    notes = [note for note in dataset.notes if not note.startswith(tuple(made.values()))]
    for modality, encoder in chosen.items():
        options = {"encoder": encoder, "batch_size": batch_size, "device": device, "cache": cache}
        if modality == "text":
            features["text"] = encode_text(content["text"], max_length=max_length, **options)
        else:
            features["image"] = encode_images(
                content["image"],
                on_unreadable=lambda path, error: unreadable.append(f"{Path(path).name} ({error})"),
                **options,
            )
        notes.append(f"{made[modality]}{encoder!r}")
    if unreadable:
        notes.append(f"{len(unreadable)} pictures cannot be read and count as missing: {'; '.join(unreadable)}")
        logger.warning(notes[-1])
    return dataclasses.replace(dataset, item_features=features, notes=notes)


def _content(dataset: Dataset) -> dict[str, list[str]]:
    """What there is to encode: texts and picture paths of all items, "" where one has none."""
    content = {"text": item_texts(dataset.item_titles, dataset.item_fields), "image": dataset.item_fields.get("image")}
    return {
        modality: values for modality, values in content.items() if values and any(value.strip() for value in values)
    }
