"""Texts to rows of numbers with any transformers encoder, or with the hidden states of a language model.

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
from hellm.engines import Engine
from hellm.features._encode import (
    check_batch_size,
    encode_rows,
    load_pretrained,
    load_transformers,
    pooled,
    require,
)
from hellm.features.cache import FeatureCache, content_key, encoder_key
from hellm.features.packaged import packaged_folder

__all__ = ["TextEncoder", "encode_text", "load_text_encoder"]

LANGUAGE_MODEL = "smollm2-135m"
# By validation on Scientific (benchmarks/results): as good as all 30 before any training, for an eighth of the work.
LANGUAGE_MODEL_LAYERS = 4


def encode_text(
    texts: Sequence[str],
    *,
    encoder: str = "minilm",
    revision: str | None = None,
    language_model: str = LANGUAGE_MODEL,
    num_layers: int = LANGUAGE_MODEL_LAYERS,
    batch_size: int = 32,
    max_length: int = 256,
    bfloat16: bool = False,
    device: str = "auto",
    cache: str | Path | None = None,
    engine: Engine = map,
) -> ItemFeatures:
    """Mean of an encoder's last hidden states over the tokens of each text.

    Models that put texts and pictures into one space (CLIP and the like) give their text embedding instead.

    Args:
        texts: [N]; blank = missing.
        encoder: One of `hellm.features.packaged` ("minilm", all-MiniLM-L6-v2, 384 columns; "mpnet", all-mpnet-base-v2,
            768 columns), which need no download; "llm", the states of `language_model`; or a model that transformers
            loads, by folder or hub id.
        revision: Of a hub id: branch, tag or commit.
        language_model: Of encoder "llm": as `hellm.models.load_language_model` takes it.
        num_layers: Of encoder "llm": the first layers that are run, >= 1; all where it has fewer.
        batch_size: Texts at once, >= 1; texts of like length go together.
        max_length: Tokens that count, >= 1; cut to what the encoder can take.
        bfloat16: Multiply matrices in bfloat16: several times as fast where the processor has units for it (AMX, GPUs),
            and about 0.7% off.
        device: "auto", "cpu", "cuda" or "cuda:N".
        cache: Folder of the cache, see `hellm.features.cache`; None keeps nothing.
        engine: Who encodes the batches, see `hellm.engines`; other processes get the encoder and the tokens from here.

    Returns: values [N, D] float32, not normalised; False in the mask where the text is blank.

    Raises:
        ValueError: batch_size, max_length or num_layers < 1.
        ImportError: The package that brings the encoder is not installed.
        OSError: No such folder, or the hub does not have the encoder or cannot be reached.
    """
    check_batch_size(batch_size)
    model = load_text_encoder(
        encoder,
        revision=revision,
        language_model=language_model,
        num_layers=num_layers,
        max_length=max_length,
        bfloat16=bfloat16,
        device=device,
    )
    return model.features(texts, batch_size=batch_size, cache=cache, engine=engine)


def load_text_encoder(
    encoder: str = "minilm",
    *,
    revision: str | None = None,
    language_model: str = LANGUAGE_MODEL,
    num_layers: int = LANGUAGE_MODEL_LAYERS,
    max_length: int = 256,
    bfloat16: bool = False,
    device: str = "auto",
) -> TextEncoder:
    """The encoder of `encode_text`, to be used more than once.

    Args: As `encode_text`.
    Raises: As `encode_text`.
    """
    for name, value in (("max_length", max_length), ("num_layers", num_layers)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    device = resolve_device(device)
    if encoder == "llm":
        return _LanguageModelStates(language_model, num_layers, max_length, device, bfloat16)
    return _TextModel(encoder, revision, max_length, device, bfloat16)


class TextEncoder:
    """What a tokenizer and a model make of texts. A subclass sets the attributes, and reads tokens in `_hidden`.

    Attributes:
        tokenizer: Of transformers.
        device: Of the model.
        max_length: Tokens of a text, special ones included.
        bfloat16: Multiply matrices in bfloat16.
        dim: D.
        key: See `encoder_key`; tokens stand for the text and its tokenizer, so it needs neither.
    """

    tokenizer: Any
    device: str
    max_length: int
    bfloat16: bool
    dim: int
    key: str

    def features(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        cache: str | Path | None = None,
        engine: Engine = map,
    ) -> ItemFeatures:
        """What `encode_text` returns."""
        tokens = self.tokens([" ".join(text.split()) for text in texts])
        features, _ = encode_rows(
            tokens,
            [content_key(np.asarray(row, np.int64).tobytes()) if row else None for row in tokens],
            [len(row) for row in tokens],
            self.rows,
            dim=self.dim,
            batch_size=batch_size,
            cache=None if cache is None else FeatureCache(cache, self.key),
            name="texts",
            engine=engine,
        )
        return features

    def rows(self, tokens: list[list[int]]) -> list[np.ndarray | Exception]:
        """Token ids of B texts -> for each [D] float32."""
        return list(self.encode(tokens))

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
        low = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16)
        with torch.inference_mode(), low:
            return self._embedding(ids.to(self.device), mask.to(self.device)).float().cpu().numpy()

    def _embedding(self, ids: Any, mask: Any) -> Any:
        """[B, T] int64 and [B, T] float32 -> [B, D]."""
        raise NotImplementedError


class _TextModel(TextEncoder):
    """An encoder: the mean of its last hidden states, or the text embedding of a model of texts and pictures."""

    def __init__(self, name: str, revision: str | None, max_length: int, device: str, bfloat16: bool = False) -> None:
        transformers = require("text", name, "transformers", load_transformers)

        with packaged_folder(name) as source:

            def load() -> tuple[Any, Any]:
                options = {"revision": revision, "dtype": "float32", **NO_CODE, **NO_PICKLES}
                model = transformers.AutoModel.from_pretrained(source, **options)
                return model, transformers.AutoTokenizer.from_pretrained(source, revision=revision, **NO_CODE)

            model, self.tokenizer = load_pretrained("text", source, "input_ids", load)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model, self.device, self.bfloat16 = model.to(device).eval(), device, bfloat16
        config = model.config.get_text_config()
        limits = [max_length, self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        if limits[2]:
            # RoBERTa's kind counts positions from behind that of padding.
            places = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
            padding = getattr(places, "padding_idx", None)
            limits[2] -= 0 if padding is None else 1 + padding
        self.max_length = min(limit for limit in limits if limit)
        self.dim = self.encode(self.tokens(["a"])).shape[1]
        self.key = encoder_key(model.state_dict(), {"kind": "text", "pooling": "mean"} | _precision(bfloat16))

    def _embedding(self, ids: Any, mask: Any) -> Any:
        if hasattr(self.model, "get_text_features"):
            return pooled(self.model.get_text_features(input_ids=ids, attention_mask=mask.long()))
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


class _LanguageModelStates(TextEncoder):
    """A causal language model: the mean over the tokens of a text of the hidden states after some of its layers.

    A token stands before each text and is left out of the mean: what a language model reads first takes up attention
    that has nowhere to go, and its state is the same huge vector whatever the text (Xiao et al. 2024, "Efficient
    Streaming Language Models with Attention Sinks").
    """

    def __init__(self, name: str, num_layers: int, max_length: int, device: str, bfloat16: bool = False) -> None:
        from hellm.models.llm.language_model import context_limit, decoder_of, load_language_model

        model, self.tokenizer = load_language_model(name, num_layers=num_layers)
        self.model, self.device, self.bfloat16 = decoder_of(model).to(device).eval(), device, bfloat16
        self.max_length = int(min(max_length + 1, context_limit(model)))
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0)
        self.first = next(token for token in special if token is not None)
        self.dim = self.encode(self.tokens(["a"])).shape[1]
        settings = {"kind": "text", "pooling": "mean without the first", "first": self.first} | _precision(bfloat16)
        self.key = encoder_key(self.model.state_dict(), settings)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        filled = [text for text in texts if text]
        if not filled:
            return [[] for _ in texts]
        options = {"truncation": True, "max_length": self.max_length - 1, "split_special_tokens": True}
        ids = iter(self.tokenizer(filled, add_special_tokens=False, **options)["input_ids"])
        return [[self.first, *next(ids)] if text else [] for text in texts]

    def _embedding(self, ids: Any, mask: Any) -> Any:
        # Padding stands on the right, where causal attention does not see it.
        hidden = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        mask[:, 0] = 0
        return (hidden.float() * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


def _precision(bfloat16: bool) -> dict[str, str]:
    # Nothing for float32, so that rows of earlier versions stay known.
    return {"precision": "bfloat16"} if bfloat16 else {}
