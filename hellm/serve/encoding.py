"""Titles and pictures of new items as the features that a run was trained on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hellm.data.simple_features import TEXT_FIELDS, image_features, item_texts
from hellm.models.graph.content import ItemContent
from hellm.serve.errors import RequestError
from hellm.serve.schema import ItemRequest

__all__ = ["Encoders"]

logger = logging.getLogger(__name__)

# Encoders whose weights come in packages: a run may name them, and nothing is fetched or read from elsewhere.
_PACKAGED_TEXT, _PACKAGED_IMAGE = ("minilm", "mpnet"), ("efficientnet",)
# Built into the project. "hashed" weighs words by how rare they are among the texts of the data, which are not here.
_COLOURS, _HASHED = "colours", "hashed"
_TEXT_OPTIONS = ("revision", "max_length", "bfloat16")


class Encoders:
    """Encodes one item at a time; encoders are loaded when they are first needed, and kept.

    Args:
        chosen: Modality -> encoder, in place of what the run names: a folder or hub id as `hellm.features` takes it.
    """

    def __init__(self, chosen: Mapping[str, str] | None = None) -> None:
        self._chosen = dict(chosen or {})
        self._loaded: dict[str, Any] = {}

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
        texts = [name for name, one in content.encoders.items() if name != "image"]
        texts += ["text"] if "text" in content.modalities and "text" not in texts else []
        if not texts:
            return "", None
        name = texts[0]
        fields = {name: [" ".join(values)] for name, values in item.attributes.items()}
        fields["description"] = [item.description or ""]
        chosen = content.encoders.get(name, {}).get("text_fields", TEXT_FIELDS)
        text = (item_texts([item.title or ""], fields, chosen) or [""])[0]
        return text, name if text.strip() else None

    def _encoded_text(self, content: ItemContent, name: str, text: str) -> np.ndarray:
        about = content.encoders.get(name, {})
        encoder = self._name(name, about, _PACKAGED_TEXT, "title")
        options = {key: about[key] for key in _TEXT_OPTIONS if key in about}
        if name not in self._loaded:
            from hellm.features import load_text_encoder

            self._loaded[name] = self._load(name, lambda: load_text_encoder(encoder, device="cpu", **options))
        return self._checked(content, name, self._loaded[name].features([text]).values[0])

    def _encoded_picture(self, content: ItemContent, picture: bytes) -> np.ndarray:
        encoder = self._name("image", content.encoders.get("image", {}), (*_PACKAGED_IMAGE, _COLOURS), "picture")
        errors: list[str] = []
        with tempfile.TemporaryDirectory(prefix="hellm-picture-") as folder:
            file = Path(folder, "picture")
            file.write_bytes(picture)

            def unreadable(path: str, error: Exception) -> None:
                errors.append(type(error).__name__)

            if encoder == _COLOURS:
                values = image_features([file], on_unreadable=unreadable).values[0]
            else:
                if "image" not in self._loaded:
                    from hellm.features import load_image_encoder

                    self._loaded["image"] = self._load("image", lambda: load_image_encoder(encoder, device="cpu"))
                values = self._loaded["image"].features([file], on_unreadable=unreadable).values[0]
        if errors:
            raise RequestError(422, f"must be a picture that can be read ({errors[0]})", field="picture")
        return self._checked(content, "image", values)

    def _name(self, modality: str, about: Mapping[str, Any], known: tuple[str, ...], field: str) -> str:
        """What encodes a modality. Raises: RequestError, nothing that may be used here."""
        if modality in self._chosen:
            return self._chosen[modality]
        name = about.get("encoder")
        if name in known:
            return str(name)
        why = (
            "does not say which encoder its features are by"
            if name is None
            else "has features by hashed words, which are weighed by all texts of its data"
            if name == _HASHED
            else f"has features by encoder {name!r}, which comes in no package"
        )
        raise RequestError(
            422,
            f"the run {why}; give features.{modality} in the request, or start the server with "
            f"--encoder {modality}=NAME",
            field=field,
        )

    def _load(self, modality: str, load: Any) -> Any:
        try:
            return load()
        except (ImportError, OSError, ValueError) as error:
            logger.error("the encoder of %s cannot be loaded: %s", modality, error)
            raise RequestError(
                422, f"the encoder of {modality} cannot be loaded here; give features.{modality} in the request"
            ) from None

    @staticmethod
    def _checked(content: ItemContent, name: str, values: np.ndarray) -> np.ndarray:
        width = content.features[name].shape[1]
        if len(values) != width:
            raise RequestError(422, f"the encoder of {name} gives {len(values)} numbers, and the run has {width}")
        return values
