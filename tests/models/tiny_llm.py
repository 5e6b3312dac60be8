"""Tiny random language models, made in memory, and recommenders around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hellm.models import RecommenderLLM

NUM_ITEMS = 12
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


class CharTokenizer:
    """One token per character."""

    bos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [2 + ord(letter) % 60 for letter in text]


class Bigram(nn.Module):
    """A sequence model that looks at the last item only."""

    max_length = 50

    def __init__(self, num_items: int = NUM_ITEMS, width: int = 5) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_items, width))

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        return self.table[items].roll(1, dims=2) * mask.unsqueeze(2)

    def item_keys(self) -> Tensor:
        return self.table


def tiny_model(kind: str = "llama", *, seed: int = 0, **options) -> nn.Module:
    """A causal language model: "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3" or "gpt2"."""
    import transformers

    torch.manual_seed(seed)
    sizes = SIZES | options
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_head=4, n_layer=2, vocab_size=64))
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}.get(kind, kind.capitalize())
    config_name = "Gemma3TextConfig" if kind == "gemma3" else f"{name}Config"
    if kind in ("qwen3", "gemma", "gemma3"):
        # Not hidden size / heads: the width of a head is free in these.
        sizes = {"head_dim": 8} | sizes
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config_name)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights of exactly one, or zero biases, would hide what is left out.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tables(*, seed: int = 0, num_items: int = NUM_ITEMS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_items, width, generator=generator) for name, width in (("graph", 4), ("sequence", 3))}


def tiny_titles(num_items: int = NUM_ITEMS) -> list[str | None]:
    """Titles of 0 to 5 letters, some missing."""
    return [None if i % 5 == 3 else "title"[: i % 6] for i in range(num_items)]


def recommender(kind: str = "llama", *, disturb: bool = True, seed: int = 0, **settings) -> RecommenderLLM:
    """A recommender in evaluation mode; `disturb` moves all that starts at zero, so that it counts."""
    given = {"item_titles": tiny_titles(), "sequence_model": Bigram() if settings.get("sequence_residual") else None}
    tables = settings.pop("tables", tiny_tables())
    model = RecommenderLLM(tiny_model(kind, seed=seed), CharTokenizer(), tables, **(given | settings))
    if disturb:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def flat(histories: list[list[int]]) -> tuple[Tensor, Tensor]:
    """indptr and items of histories."""
    indptr = torch.tensor([0, *(len(history) for history in histories)]).cumsum(0)
    return indptr, torch.tensor([item for history in histories for item in history], dtype=torch.int64)
