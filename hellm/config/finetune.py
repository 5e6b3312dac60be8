"""Settings of stage 2: the recommender around a language model, and its fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from hellm.config._checks import require
from hellm.config.loop import LoopConfig

__all__ = ["OFFICIAL_LLM", "FinetuneConfig", "LLMConfig"]


@dataclass(frozen=True)
class LLMConfig:
    """The recommender around a language model; the keywords of `hellm.models.RecommenderLLM`.

    Args:
        graph_context: how the graph enters; "prefix" (keys/values before every layer's own, one history per pass, as
            published), "causal" (added at every item: all positions in one pass) or "none".
        num_prefix_tokens: prefix keys/values per layer.
        learned_prefix: use a learned prefix, the same for all histories (the published model has one).
        prefix_gate: a gate per layer and head on the prefix values that starts at 0.
        prefix_dropout: dropout probability of the MLPs that make the graph prefix.
        gram_rank: width to which graph embeddings are compressed before their Gram matrix; null keeps them.
        head: "tied" (scores against projected items), "trained" or "frozen" (a random table).
        titles: put each item's title after its token.
        max_title_tokens: tokens kept of a title.
        max_length: latest items of a history that are read.
        sequence_residual: start from the scores of the sequence model and add to them.
        item_id_dim: width of a trained embedding per item, beside `item_inputs`; 0 is none.
        item_dropout: dropout probability of the `item_inputs`.
        lora_rank: rank of the LoRA updates; 0 trains none.
        lora_alpha: scale of the updates times `lora_rank`.
        lora_dropout: dropout probability of their input.
        lora_targets: names of the matrices that get one.
        compat: "official" repeats the published model, quirks included; null fixes them.
    """

    graph_context: Literal["prefix", "causal", "none"] = "causal"
    num_prefix_tokens: int = 10
    learned_prefix: bool = False
    prefix_gate: bool = True
    prefix_dropout: float = 0.3
    gram_rank: int | None = 32
    head: Literal["tied", "trained", "frozen"] = "tied"
    titles: bool = False
    max_title_tokens: int = 16
    max_length: int = 50
    sequence_residual: bool = False
    item_id_dim: int = 64
    item_dropout: float = 0.2
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        for name in ("num_prefix_tokens", "max_title_tokens", "max_length"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(self.item_id_dim >= 0, "item_id_dim", ">= 0", self.item_id_dim)
        for name in ("prefix_dropout", "item_dropout", "lora_dropout"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        require(self.gram_rank is None or self.gram_rank >= 1, "gram_rank", "null or >= 1", self.gram_rank)
        require(self.lora_rank >= 0, "lora_rank", ">= 0", self.lora_rank)
        require(isfinite(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", "> 0", self.lora_alpha)
        for name, value in OFFICIAL_LLM.items() if self.compat == "official" else ():
            require(getattr(self, name) == value, name, f'{value!r} with compat="official"', getattr(self, name))


OFFICIAL_LLM: dict[str, Any] = {
    "graph_context": "prefix",
    "learned_prefix": True,
    "prefix_gate": False,
    "gram_rank": None,
    "head": "frozen",
    "titles": False,
    "sequence_residual": False,
    "item_id_dim": 0,
    "item_dropout": 0.0,
}
"""What `compat="official"` asks of an `LLMConfig`."""


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """Stage 2: fine-tuning of a language model that ranks the catalogue.

    Args:
        model: the recommender around the language model.
        llm: "smollm2-135m" (comes with the extra `smollm2`), a local folder, a .gguf file or an id on the hub.
        llm_revision: of a model on the hub; null takes the newest.
        llm_layers: its first layers that are used; null takes all.
        llm_init: "random" draws all its weights anew by `seed`, a control of what pre-training gives.
        dtype: of the language model's weights; what is trained stays float32.
        mixed_precision: "bf16" computes training steps in bfloat16 where that is safe, whatever the dtype of weights.
        item_inputs: tables that make the item token: "graph" (stage 1), "sequence" (SASRec), names of item features,
            which are whitened. null takes the graph and all features, or the sequence model where there are none.
        content_components: whitened directions of each of the features that are kept; null keeps all.
        sampled_items: items drawn anew for every step that stand for the whole catalogue in the softmax, without bias
            in what it divides by; null takes all items.
        learning_rate: AdamW step size after the warm-up.
        min_learning_rate: where the cosine ends, at `max_epochs`.
        warmup_epochs: epochs of linear growth from 0.
        betas: AdamW's decay rates.
        weight_decay: of matrices; biases, norms, gates and prefixes have none (with compat they have).
        batch_tokens: padded tokens per step at most; several processes share them.
        batch_size: histories per step at most; null leaves it to `batch_tokens`.
        steps_per_epoch: at most, every epoch with other histories; null takes all of them.
        sharded: each of several processes has its part of every weight (FSDP2), for a language model that no single one
            can hold; not with a prefix.
        accumulate: steps per update.
        max_grad_norm: longer gradients are scaled down to it; null leaves them.
        max_epochs: upper limit of training, and the length of the learning rate schedule.
        validate_steps: steps between validations, in place of `validate_every`; null goes by epochs.
        seed: of initialisation, order and dropout.
    """

    model: LLMConfig = field(default_factory=LLMConfig)
    llm: str = "smollm2-135m"
    llm_revision: str | None = None
    llm_layers: int | None = 6
    llm_init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16"] = "float32"
    mixed_precision: Literal["no", "bf16"] = "no"
    item_inputs: tuple[str, ...] | None = None
    content_components: int | None = 256
    sampled_items: int | None = None
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    warmup_epochs: float = 0.5
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1
    batch_tokens: int = 512
    batch_size: int | None = None
    steps_per_epoch: int | None = None
    sharded: bool = False
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    max_epochs: int = 8
    validate_steps: int | None = None
    patience: int = 2
    checkpoint_every: int = 1

    @property
    def named_inputs(self) -> tuple[str, ...]:
        """`item_inputs` once they are named, as they are when a run begins."""
        assert self.item_inputs is not None
        return self.item_inputs

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs = self.item_inputs
        require(
            inputs is None or len(set(inputs)) == len(inputs) > 0,
            "item_inputs",
            "null, or one or more different names",
            inputs,
        )
        components = self.content_components
        require(components is None or components >= 1, "content_components", "null or >= 1", components)
        require(isfinite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "> 0", self.learning_rate)
        for name in ("min_learning_rate", "warmup_epochs", "weight_decay"):
            require(isfinite(getattr(self, name)) and getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)", self.betas
        )
        for name in ("batch_tokens", "accumulate"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("llm_layers", "sampled_items", "batch_size", "steps_per_epoch", "validate_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "null or >= 1", value)
        norm = self.max_grad_norm
        require(norm is None or norm > 0, "max_grad_norm", "null or > 0", norm)
        if self.model.compat == "official" and self.batch_size is None:
            raise ValueError(
                'batch_size must be given with model.compat="official" (the published loop has 7), got null'
            )
