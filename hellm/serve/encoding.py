"""Titles and pictures of new items as the features that a run was trained on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hellm.features.noted import NotedEncoder
from hellm.models.graph.content import ItemContent
from hellm.serve.errors import RequestError
from hellm.serve.schema import ItemRequest

__all__ = ["Encoders"]

logger = logging.getLogger(__name__)


class Encoders:
    """Encodes one item at a time; encoders are loaded when they are first needed, and kept.

    Args:
        chosen: Modality -> encoder, in place of what the run names: a folder or hub id as `hellm.features` takes it.
    """

    def __init__(self, chosen: Mapping[str, str] | None = None) -> None:
        self._chosen = dict(chosen or {})
        # Modality -> of which run, and the encoder.
        self._loaded: dict[str, tuple[NotedEncoder, Any]] = {}

    def __call__(self, content: ItemContent | None, item: ItemRequest, picture: bytes | None) -> dict[str, np.ndarray]:
        """Modality -> features [dim] float32, of what the item has and the run knows.

        Raises: RequestError, a run that cannot take items; features that do not fit; something that there is no encoder
            for; a picture that cannot be read.
        """
        if content is None:
            raise RequestError(422, "the run cannot take new items: its data had no features of items")
        features = self._given(content, item)
        text, about = self._text(content, item)
        if about is not None and about not in features:
            features[about] = self._encoded_text(content, about, text)
        if picture is not None and "image" in content.modalities and "image" not in features:
            features["image"] = self._encoded_picture(content, picture)
        elif picture is not None and "image" not in features:
            raise RequestError(422, "the run does not know pictures of items", field="picture")
        known = {name: values for name, values in item.attributes.items() if name in content.attributes}
        placed = any(one.any() for one in features.values()) or any(
            value in content.attributes[name] for name, values in known.items() for value in values
        )
        if not placed:
            raise RequestError(
                422,
                f"an item must have something that the run knows items by ({', '.join(content.modalities)}); give a "
                "title, a picture, attributes or features",
            )
        return features

    def _given(self, content: ItemContent, item: ItemRequest) -> dict[str, np.ndarray]:
        plain = [name for name in content.modalities if name not in content.attributes]
        found = {}
        for name, values in item.features.items():
            if name not in plain:
                known = ", ".join(plain) or "none"
                raise RequestError(422, f"must be among the features of the run ({known})", field=f"features.{name}")
            width = content.features[name].shape[1]
            with np.errstate(over="ignore"):
                found[name] = np.array(values, np.float32)
            if len(values) != width or not np.isfinite(found[name]).all():
                message = f"must be {width} finite numbers, got {len(values)} values"
                raise RequestError(422, message, field=f"features.{name}")
        return found

    def _text(self, content: ItemContent, item: ItemRequest) -> tuple[str, str | None]:
        """The text of an item and the modality that it is of; None where there is none."""
        texts = [name for name in content.encoders if name != "image"]
        texts += ["text"] if "text" in content.modalities and "text" not in texts else []
        if not texts:
            return "", None
        fields = {name: [" ".join(values)] for name, values in item.attributes.items()}
        fields["description"] = [item.description or ""]
        (text,) = NotedEncoder.of(content.encoders, texts[0]).texts([item.title or ""], fields) or [""]
        return text, texts[0] if text.strip() else None

    def _encoded_text(self, content: ItemContent, name: str, text: str) -> np.ndarray:
        return self._checked(content, name, self._encoder(content, name, "title").features([text]).values[0])

    def _encoded_picture(self, content: ItemContent, picture: bytes) -> np.ndarray:
        encoder, errors = self._encoder(content, "image", "picture"), []
        with tempfile.TemporaryDirectory(prefix="hellm-picture-") as folder:
            file = Path(folder, "picture")
            file.write_bytes(picture)
            found = encoder.features([file], on_unreadable=lambda path, error: errors.append(type(error).__name__))
        if errors:
            raise RequestError(422, f"must be a picture that can be read ({errors[0]})", field="picture")
        return self._checked(content, "image", found.values[0])

    def _encoder(self, content: ItemContent, modality: str, field: str) -> Any:
        """What encodes a modality. Raises: RequestError, nothing that may be used here, or that can be loaded."""
        of_run = noted = NotedEncoder.of(content.encoders, modality)
        chosen = self._chosen.get(modality)
        if chosen is not None:
            noted = replace(noted, name=chosen)
        elif not noted.is_at_hand:
            why = (
                "does not say which encoder its features are by"
                if noted.name is None
                else "has features by hashed words, which are weighed by all texts of its data"
                if noted.name == "hashed"
                else f"has features by encoder {noted.name!r}, which comes in no package"
            )
            hint = "" if noted.name == "hashed" else f", or start the server with --encoder {modality}=NAME"
            raise RequestError(422, f"the run {why}; give features.{modality} in the request{hint}", field=field)
        before, encoder = self._loaded.get(modality, (None, None))
        # A run that has taken over may name another.
        if before != of_run:
            try:
                encoder = noted.load("cpu")
            except (ImportError, OSError, ValueError, TypeError) as error:
                logger.error("the encoder of %s cannot be loaded: %s", modality, error)
                raise RequestError(
                    422, f"the encoder of {modality} cannot be loaded here; give features.{modality} in the request"
                ) from None
            if chosen is not None and of_run.is_other(chosen, encoder):
                raise RequestError(
                    422,
                    f"--encoder {modality}={chosen} of the server is another encoder than {of_run.name!r}, by which "
                    f"the run has its features; give features.{modality} in the request",
                    field=field,
                )
            self._loaded[modality] = of_run, encoder
        return encoder

    @staticmethod
    def _checked(content: ItemContent, name: str, values: np.ndarray) -> np.ndarray:
        width = content.features[name].shape[1]
        if len(values) != width:
            raise RequestError(422, f"the encoder of {name} gives {len(values)} numbers, and the run has {width}")
        return values
