"""Item features from pre-trained encoders: texts and pictures as rows of numbers, with masks for what is missing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hellm.features.dataset import add_features, choose_encoders, encode_like
    from hellm.features.image import encode_images, load_image_encoder
    from hellm.features.text import encode_text, load_text_encoder

_EXPORTS = {
    "add_features": "hellm.features.dataset",
    "choose_encoders": "hellm.features.dataset",
    "encode_images": "hellm.features.image",
    "encode_like": "hellm.features.dataset",
    "encode_text": "hellm.features.text",
    "load_image_encoder": "hellm.features.image",
    "load_text_encoder": "hellm.features.text",
}

__all__ = [
    "add_features",
    "choose_encoders",
    "encode_images",
    "encode_like",
    "encode_text",
    "load_image_encoder",
    "load_text_encoder",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hellm.features' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
