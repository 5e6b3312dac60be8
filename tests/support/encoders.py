"""Tiny random encoders of texts and pictures."""

from __future__ import annotations

from pathlib import Path

import torch

TEXTS = ["red mug", "a blue mug with a long long name", "", "garden hose", "red mug", "  ", "lamp"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "blue",
    "mug",
    "with",
    "long",
    "name",
    "garden",
    "hose",
    "lamp",
]


def save_text_encoder(folder: Path) -> str:
    """Write a random BERT of width 8 for at most 16 tokens."""
    import transformers

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def save_image_encoder(folder: Path) -> str:
    """Write a random ViT of width 8 for pictures of 16 x 16, normalised by 0.5 and 0.5."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)
    settings = '{"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (folder / "preprocessor_config.json").write_text(settings)
    return str(folder)


def counted(monkeypatch, owner: type) -> list[int]:
    """Rows of each call of `owner.encode` from now on; the call that finds the width is in it."""
    calls, encode = [], owner.encode

    def spy(self, rows):
        calls.append(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(owner, "encode", spy)
    return calls
