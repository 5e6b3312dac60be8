"""Named settings, those of the published runs among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hellm.config.finetune import OFFICIAL_LLM, FinetuneConfig, LLMConfig
from hellm.config.pretrain import ModelConfig, PretrainConfig
from hellm.config.run import RunConfig
from hellm.config.sasrec import CONTENT_TOWER, SASRecConfig

__all__ = ["PRESETS", "presets_of"]


def _published(layers: tuple[int, int, int], user: float, item: float, k: int, temperature: float, l2: float):
    """One published run; `layers` is (user-item, user, item), the order of its logs."""
    return PretrainConfig(
        model=ModelConfig(
            num_layers=layers[0], num_user_layers=layers[1], num_item_layers=layers[2], attributes=(), knn_k=k
        ),
        user_contrastive_weight=user,
        item_contrastive_weight=item,
        temperature=temperature,
        l2_weight=l2,
        learning_rate=1e-4,
        contrastive_rows=None,
        validate_every=5,
        protocol="official",
    )


PRESETS: dict[type, dict[str, Any]] = {
    PretrainConfig: {
        "default": PretrainConfig(),
        "demo": PretrainConfig(
            model=ModelConfig(num_layers=2, num_user_layers=2),
            learning_rate=5e-3,
            batch_size=256,
            temperature=0.5,
            contrastive_rows=None,
            validate_every=5,
            max_epochs=30,
            patience=2,
        ),
        # Chosen on the validation split of Beauty, a shop with texts.
        "softmax": PretrainConfig(
            model=ModelConfig(embedding_dim=128, num_layers=2, num_user_layers=1),
            loss="softmax",
            softmax_temperature=0.15,
            learning_rate=2e-3,
            batch_size=4096,
            sampler="interaction-uniform",
        ),
        "hellm-beauty": _published((2, 2, 1), user=0.9, item=0.1, k=10, temperature=0.5, l2=1e-4),
        "hellm-sports": _published((2, 2, 2), user=0.7, item=0.1, k=5, temperature=0.5, l2=1e-3),
        "hellm-toys": _published((2, 3, 2), user=0.03, item=0.07, k=10, temperature=0.3, l2=1e-3),
        "mmhcl-tiktok": _published((2, 3, 2), user=0.03, item=0.07, k=5, temperature=0.6, l2=1e-3),
        "mmhcl-clothing": _published((2, 2, 2), user=0.1, item=0.7, k=10, temperature=0.4, l2=1e-3),
        "mmhcl-sports": _published((2, 2, 2), user=0.3, item=0.7, k=5, temperature=0.5, l2=1e-5),
    },
    SASRecConfig: {
        "default": SASRecConfig(),
        "demo": SASRecConfig(batch_size=256, max_epochs=30, patience=2),
        "bce": SASRecConfig(loss="bce"),
        "content": CONTENT_TOWER,
    },
    FinetuneConfig: {
        "default": FinetuneConfig(),
        "demo": FinetuneConfig(max_epochs=2),
        # The published schedule around the published model, without early stopping; the 7B model itself is to be had
        # from its owner, and ran in bfloat16 (dtype=bfloat16).
        "official": FinetuneConfig(
            model=LLMConfig(compat="official", **OFFICIAL_LLM),
            learning_rate=3e-4,
            min_learning_rate=5e-6,
            warmup_epochs=1.0,
            batch_size=7,
            max_grad_norm=None,
            max_epochs=25,
            patience=25,
            protocol="hellm-llm",
        ),
    },
}
PRESETS[RunConfig] = {
    "default": RunConfig(),
    "demo": RunConfig(
        pretrain=PRESETS[PretrainConfig]["demo"],
        sasrec=PRESETS[SASRecConfig]["demo"],
        content=replace(
            CONTENT_TOWER, learning_rate=1e-3, schedule="constant", batch_size=256, max_epochs=30, patience=2
        ),
        finetune=PRESETS[FinetuneConfig]["demo"],
    ),
}
"""Named settings per config class that has some besides "default". The six published runs score by the published
protocol; compat stays a choice."""


def presets_of(cls: type) -> dict[str, Any]:
    """The named settings of a config class; "default" is always one."""
    return PRESETS.get(cls) or {"default": cls()}
