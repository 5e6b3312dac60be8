"""Every option of every training stage, as frozen dataclasses, with the presets of the published runs.

This is the only place where an option, its default and its meaning are written: the command line and the config files
are generated from these classes. Models, losses and operators take plain arguments and never see a config.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from hellm._files import atomic_path

__all__ = [
    "PRESETS",
    "FinetuneConfig",
    "LLMConfig",
    "ModelConfig",
    "PretrainConfig",
    "RunConfig",
    "SASRecConfig",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "override_config",
    "save_config",
]

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The stage-1 graph encoder.

    Args:
        backbone: collaborative part; "lightgcn", "ngcf" or "mf" (no propagation).
        embedding_dim: width of every embedding table.
        num_layers: propagation layers of the user-item graph (lightgcn, ngcf).
        num_user_layers: layers of the user hypergraph (items are hyperedges over users).
        num_item_layers: layers of the item hypergraph (kNN hyperedges per modality).
        user_hypergraph: use the user hypergraph at all.
        item_hypergraph: use the item hypergraph at all; it needs item features.
        modalities: feature names that build the item hypergraph; null means all there are.
        knn_k: members of each kNN hyperedge, the item itself included.
        dropout: NGCF message dropout probability.
    """

    backbone: Literal["lightgcn", "ngcf", "mf"] = "lightgcn"
    embedding_dim: int = 64
    num_layers: int = 3
    num_user_layers: int = 3
    num_item_layers: int = 2
    user_hypergraph: bool = True
    item_hypergraph: bool = True
    modalities: tuple[str, ...] | None = None
    knn_k: int = 5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_layers", "num_user_layers", "num_item_layers", "knn_k"):
            _require(getattr(self, name) >= 1, f"model.{name}", ">= 1", getattr(self, name))
        _require(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)
        _require(self.modalities is None or len(self.modalities) > 0, "model.modalities", "null or not empty", ())


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 1: hypergraph pre-training.

    The defaults were chosen on the validation split of TikTok; the presets named after data sets are the published
    settings.

    Args:
        model: the graph encoder.
        learning_rate: Adam step size at epoch 0.
        learning_rate_decay: factor per `learning_rate_decay_epochs` epochs, applied smoothly every epoch.
        learning_rate_decay_epochs: epochs after which `learning_rate_decay` has been applied once.
        batch_size: users (or interactions) per step; fewer where the data has fewer.
        l2_weight: weight of the L2 penalty on the fused embedding rows of a batch.
        user_contrastive_weight: weight of the contrast between fused and hypergraph user embeddings; 0 skips it.
        item_contrastive_weight: the same for items.
        temperature: of both contrastive losses; smaller is sharper.
        contrastive_rows: anchors per step drawn uniformly, against all keys (an unbiased estimate); null means all,
            and so does compat.
        precision: of the contrastive similarities, "highest", "high" or "medium"; null follows torch.
        sampler: "user-uniform" (distinct users, then one of their items) or "interaction-uniform" (every interaction
            once per epoch).
        negatives: "uniform" over the items a user has not, or by their "popularity" to the power 0.75.
        max_epochs: upper limit of training.
        validate_every: epochs between validations.
        patience: non-improving validations tolerated; training stops at the next one.
        monitor: validation metrics; a validation improves when any of them beats its own best.
        ks: list lengths of the metrics.
        protocol: evaluation protocol, see `hellm.evaluate`.
        eval_batch_size: users scored at once.
        checkpoint_every: epochs between checkpoints; every validation writes one as well.
        seed: of initialisation and sampling.
        compat: "official" repeats the published code, quirks included; null fixes them.
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_threads: CPU threads of torch; null leaves torch's choice.
        tensorboard: write TensorBoard events into the run directory.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    learning_rate: float = 1e-3
    learning_rate_decay: float = 0.96
    learning_rate_decay_epochs: float = 50.0
    batch_size: int = 1024
    l2_weight: float = 1e-3
    user_contrastive_weight: float = 0.03
    item_contrastive_weight: float = 0.07
    temperature: float = 0.6
    contrastive_rows: int | None = 512
    precision: Literal["highest", "high", "medium"] | None = None
    sampler: Literal["user-uniform", "interaction-uniform"] = "user-uniform"
    negatives: Literal["uniform", "popularity"] = "uniform"
    max_epochs: int = 1000
    validate_every: int = 1
    patience: int = 5
    monitor: tuple[str, ...] = ("recall@20", "ndcg@20")
    ks: tuple[int, ...] = (10, 20)
    protocol: str = "standard"
    eval_batch_size: int = 1024
    checkpoint_every: int = 5
    seed: int = 2024
    compat: Literal["official"] | None = None
    device: str = "auto"
    num_threads: int | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("learning_rate", "learning_rate_decay", "learning_rate_decay_epochs", "temperature"):
            _require(_finite(getattr(self, name)) and getattr(self, name) > 0, name, "> 0", getattr(self, name))
        for name in ("l2_weight", "user_contrastive_weight", "item_contrastive_weight"):
            _require(_finite(getattr(self, name)) and getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        _require(self.batch_size >= 1, "batch_size", ">= 1", self.batch_size)
        rows = self.contrastive_rows
        _require(rows is None or rows >= 1, "contrastive_rows", "null or >= 1", rows)
        _check_loop(self)


def _check_loop(config: Any) -> None:
    """The settings of the training loop, which every stage has."""
    for name in ("max_epochs", "validate_every", "eval_batch_size", "checkpoint_every"):
        _require(getattr(config, name) >= 1, name, ">= 1", getattr(config, name))
    _require(config.num_threads is None or config.num_threads >= 1, "num_threads", "null or >= 1", config.num_threads)
    for name in ("patience", "seed"):
        _require(getattr(config, name) >= 0, name, ">= 0", getattr(config, name))
    _require(len(config.monitor) > 0, "monitor", "at least one metric", config.monitor)
    _require(len(config.ks) > 0 and min(config.ks, default=0) >= 1, "ks", "list lengths >= 1", config.ks)
    for metric in config.monitor:
        name, _, k = metric.partition("@")
        _require(
            bool(name) and k.isdigit() and int(k) in config.ks, "monitor", f"metric@k with k in {config.ks}", metric
        )


@dataclass(frozen=True)
class SASRecConfig:
    """The sequence model SASRec.

    Args:
        embedding_dim: width of items and hidden states, a multiple of `num_heads`.
        num_layers: attention blocks.
        num_heads: attention heads.
        feedforward_dim: inner width of the feed-forward part of a block.
        max_length: latest items of a history that are read.
        dropout: probability at the input, in attention and after each part of a block.
        loss: "cross_entropy" over the whole catalogue, or "bce" with one uniform negative per position (the paper).
        learning_rate: Adam step size.
        batch_size: positions per step, at least `max_length`; fewer where the data has fewer.
        max_epochs: upper limit of training.
        validate_every: epochs between validations.
        patience: non-improving validations tolerated; training stops at the next one.
        monitor: validation metrics; a validation improves when any of them beats its own best.
        ks: list lengths of the metrics.
        protocol: evaluation protocol, see `hellm.evaluate`; sequence models are usually scored with nothing masked.
        eval_batch_size: users scored at once.
        checkpoint_every: epochs between checkpoints; every validation writes one as well.
        seed: of initialisation, order and sampling.
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_threads: CPU threads of torch; null leaves torch's choice.
        tensorboard: write TensorBoard events into the run directory.
    """

    embedding_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    feedforward_dim: int = 256
    max_length: int = 50
    dropout: float = 0.5
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    learning_rate: float = 1e-3
    batch_size: int = 2048
    max_epochs: int = 200
    validate_every: int = 2
    patience: int = 5
    monitor: tuple[str, ...] = ("ndcg@10",)
    ks: tuple[int, ...] = (5, 10, 20)
    protocol: str = "recbole-sequential"
    eval_batch_size: int = 1024
    checkpoint_every: int = 5
    seed: int = 2024
    device: str = "auto"
    num_threads: int | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_layers", "num_heads", "feedforward_dim", "max_length"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        _require(
            self.embedding_dim % self.num_heads == 0,
            "embedding_dim",
            f"a multiple of num_heads {self.num_heads}",
            self.embedding_dim,
        )
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _require(_finite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "> 0", self.learning_rate)
        _require(self.batch_size >= self.max_length, "batch_size", f">= max_length {self.max_length}", self.batch_size)
        _check_loop(self)


@dataclass(frozen=True)
class LLMConfig:
    """The recommender around a language model; the keywords of `hellm.models.RecommenderLLM`.

    Args:
        graph_context: how the graph enters; "prefix" (keys/values before every layer's own, one history per pass, as
            published), "causal" (added at every item: all positions in one pass) or "none".
        num_prefix_tokens: prefix keys/values per layer.
        learned_prefix: use the learned prefix, the same for all histories.
        prefix_gate: a gate per layer and head on the prefix values that starts at 0.
        prefix_dropout: dropout probability of the MLPs that make the graph prefix.
        gram_rank: width to which graph embeddings are compressed before their Gram matrix; null keeps them.
        head: "tied" (scores against projected items), "trained" or "frozen" (a random table).
        titles: put each item's title after its token.
        max_title_tokens: tokens kept of a title.
        max_length: latest items of a history that are read.
        sequence_residual: start from the scores of the sequence model and add to them.
        lora_rank: rank of the LoRA updates; 0 trains none.
        lora_alpha: scale of the updates times `lora_rank`.
        lora_dropout: dropout probability of their input.
        lora_targets: names of the matrices that get one.
        compat: "official" repeats the published model, quirks included; null fixes them.
    """

    graph_context: Literal["prefix", "causal", "none"] = "causal"
    num_prefix_tokens: int = 10
    learned_prefix: bool = True
    prefix_gate: bool = True
    prefix_dropout: float = 0.3
    gram_rank: int | None = 32
    head: Literal["tied", "trained", "frozen"] = "tied"
    titles: bool = False
    max_title_tokens: int = 16
    max_length: int = 50
    sequence_residual: bool = False
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        for name in ("num_prefix_tokens", "max_title_tokens", "max_length"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("prefix_dropout", "lora_dropout"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        _require(self.gram_rank is None or self.gram_rank >= 1, "gram_rank", "null or >= 1", self.gram_rank)
        _require(self.lora_rank >= 0, "lora_rank", ">= 0", self.lora_rank)
        _require(_finite(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", "> 0", self.lora_alpha)
        for name, value in OFFICIAL_LLM.items() if self.compat == "official" else ():
            _require(getattr(self, name) == value, name, f'{value!r} with compat="official"', getattr(self, name))


OFFICIAL_LLM: dict[str, Any] = {
    "graph_context": "prefix",
    "learned_prefix": True,
    "prefix_gate": False,
    "gram_rank": None,
    "head": "frozen",
    "titles": False,
    "sequence_residual": False,
}
"""What `compat="official"` asks of an `LLMConfig`."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Stage 2: fine-tuning of a language model that ranks the catalogue.

    Args:
        model: the recommender around the language model.
        llm: "smollm2-135m" (comes with the extra `smollm2`), a local folder, a .gguf file or an id on the hub.
        llm_revision: of a model on the hub; null takes the newest.
        dtype: of the language model's weights; what is trained stays float32.
        item_inputs: tables that make the item token: "graph" (stage 1), "sequence" (SASRec), names of item features.
        learning_rate: AdamW step size after the warm-up.
        min_learning_rate: where the cosine ends, at `max_epochs`.
        warmup_epochs: epochs of linear growth from 0.
        betas: AdamW's decay rates.
        weight_decay: of matrices; biases, norms, gates and prefixes have none (with compat they have).
        batch_tokens: padded tokens per step at most.
        batch_size: histories per step at most; null leaves it to `batch_tokens`.
        accumulate: steps per update.
        max_grad_norm: longer gradients are scaled down to it; null leaves them.
        max_epochs: upper limit of training, and the length of the learning rate schedule.
        validate_every: epochs between validations.
        patience: non-improving validations tolerated; training stops at the next one.
        monitor: validation metrics; a validation improves when any of them beats its own best.
        ks: list lengths of the metrics.
        protocol: evaluation protocol, see `hellm.evaluate`.
        eval_batch_size: users scored at once.
        checkpoint_every: epochs between checkpoints; every validation writes one as well.
        seed: of initialisation, order and dropout.
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_threads: CPU threads of torch; null leaves torch's choice.
        tensorboard: write TensorBoard events into the run directory.
    """

    model: LLMConfig = field(default_factory=LLMConfig)
    llm: str = "smollm2-135m"
    llm_revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    item_inputs: tuple[str, ...] = ("graph", "sequence")
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    warmup_epochs: float = 0.5
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1
    batch_tokens: int = 512
    batch_size: int | None = None
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    max_epochs: int = 8
    validate_every: int = 1
    patience: int = 2
    monitor: tuple[str, ...] = ("ndcg@10",)
    ks: tuple[int, ...] = (5, 10, 20)
    protocol: str = "recbole-sequential"
    eval_batch_size: int = 1024
    checkpoint_every: int = 1
    seed: int = 2024
    device: str = "auto"
    num_threads: int | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _require(
            len(set(self.item_inputs)) == len(self.item_inputs) > 0,
            "item_inputs",
            "one or more different names",
            self.item_inputs,
        )
        _require(_finite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "> 0", self.learning_rate)
        for name in ("min_learning_rate", "warmup_epochs", "weight_decay"):
            _require(_finite(getattr(self, name)) and getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)", self.betas
        )
        for name in ("batch_tokens", "accumulate"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        _require(self.batch_size is None or self.batch_size >= 1, "batch_size", "null or >= 1", self.batch_size)
        norm = self.max_grad_norm
        _require(norm is None or norm > 0, "max_grad_norm", "null or > 0", norm)
        if self.model.compat == "official" and self.batch_size is None:
            raise ValueError(
                'batch_size must be given with model.compat="official" (the published loop has 7), got null'
            )
        _check_loop(self)


@dataclass(frozen=True)
class RunConfig:
    """The whole way from raw data to recommendations.

    Args:
        text: encoder of item texts: "minilm", a folder or hub id of a transformers encoder, "none", or "auto" (minilm
            where the data have texts and no text features).
        image: encoder of pictures: "efficientnet", a folder or hub id, "none", or "auto" as above.
        language_model: go on to stage 2; false stops at stage 1 and SASRec, which cost a small part of it.
        baselines: what to compare with: "popularity", "itemknn", "bpr", "als" and "lightgcn".
        pretrain: stage 1; the LightGCN baseline has the same settings without hypergraphs.
        sasrec: the sequence model.
        finetune: stage 2.
        protocol: evaluation protocol of the comparison, and of every stage.
        ks: list lengths of the comparison.
    """

    text: str = "auto"
    image: str = "auto"
    language_model: bool = True
    baselines: tuple[str, ...] = ("popularity", "itemknn", "bpr", "lightgcn")
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sasrec: SASRecConfig = field(default_factory=SASRecConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    protocol: str = "standard"
    ks: tuple[int, ...] = (5, 10, 20)

    def __post_init__(self) -> None:
        known = ("popularity", "itemknn", "bpr", "als", "lightgcn")
        wrong = [name for name in self.baselines if name not in known]
        _require(not wrong, "baselines", f"among {', '.join(known)}", wrong[0] if wrong else None)
        _require(len(self.ks) > 0 and min(self.ks, default=0) >= 1, "ks", "list lengths >= 1", self.ks)


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _published(layers: tuple[int, int, int], user: float, item: float, k: int, temperature: float, l2: float):
    """One published run; `layers` is (user-item, user, item), the order of its logs."""
    return PretrainConfig(
        model=ModelConfig(num_layers=layers[0], num_user_layers=layers[1], num_item_layers=layers[2], knn_k=k),
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
    },
    FinetuneConfig: {
        "default": FinetuneConfig(),
        "demo": FinetuneConfig(max_epochs=2),
        # The published schedule around the published model; the 7B model itself is to be had from its owner.
        "official": FinetuneConfig(
            model=LLMConfig(compat="official", **OFFICIAL_LLM),
            learning_rate=3e-4,
            min_learning_rate=5e-6,
            warmup_epochs=1.0,
            batch_size=7,
            max_grad_norm=None,
            max_epochs=25,
            protocol="hellm-llm",
        ),
    },
}
PRESETS[RunConfig] = {
    "default": RunConfig(),
    "demo": RunConfig(
        pretrain=PRESETS[PretrainConfig]["demo"],
        sasrec=PRESETS[SASRecConfig]["demo"],
        finetune=PRESETS[FinetuneConfig]["demo"],
    ),
}
"""Named settings per config class. The six published runs score by the published protocol; compat stays a choice."""


def load_config(cls: type[ConfigT], source: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ConfigT:
    """A config from a preset name or a YAML file, with `key=value` overrides on top.

    Args:
        cls: config class, e.g. `PretrainConfig`.
        source: a preset of `cls`, or the path of a YAML file (ends in .yaml or .yml, or exists).
        overrides: dotted settings such as "model.num_layers=3"; values are read as YAML.
    Raises: ValueError for an unknown preset or key (naming the nearest one) and for values of a wrong type or range.
    """
    presets = PRESETS.get(cls, {})
    path = Path(source)
    if str(source) in presets:
        config = presets[str(source)]
    elif path.is_file():
        config = config_from_dict(cls, _read_yaml(path), where=str(path))
    elif path.suffix in (".yaml", ".yml"):
        raise FileNotFoundError(f"config file {path} does not exist")
    else:
        raise ValueError(_unknown("preset or config file", str(source), list(presets)))
    return override_config(config, overrides)


def override_config(config: ConfigT, overrides: Iterable[str]) -> ConfigT:
    """`config` with dotted `key=value` settings applied in order. Raises: ValueError as `load_config` does."""
    import yaml

    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f'an override must look like "key=value", got {text!r}')
        config = _replace_dotted(config, key.split("."), yaml.safe_load(value), key)
    return config


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
    """A config from nested plain values; missing keys keep their defaults. `where` names the source in errors."""
    prefix = f"{where}: " if where else ""
    try:
        return _build(cls, values, "")
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values (dict, list, str, int, float, bool, None) of a config."""
    return _plain(dataclasses.asdict(config))


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML, whole or not at all."""
    import yaml

    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: a config file must be a mapping of settings, got {type(values).__name__}")
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _unknown(kind: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type[ConfigT], values: Any, prefix: str) -> ConfigT:
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or cls.__name__} must be a mapping of settings, got {values!r}")
    hints = _field_types(cls)
    for key in values:
        if key not in hints:
            raise ValueError(_unknown("setting", f"{prefix}{key}", [f"{prefix}{name}" for name in hints]))
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _replace_dotted(config: Any, path: list[str], value: Any, name: str) -> Any:
    hints = _field_types(type(config))
    prefix = name[: len(name) - len(".".join(path))]
    if path[0] not in hints:
        raise ValueError(_unknown("setting", f"{prefix}{path[0]}", [f"{prefix}{key}" for key in hints]))
    if len(path) == 1:
        return replace(config, **{path[0]: _convert(hints[path[0]], value, name)})
    child = getattr(config, path[0])
    if not dataclasses.is_dataclass(child):
        raise ValueError(f"setting {prefix}{path[0]} has no parts, got {name!r}")
    return replace(config, **{path[0]: _replace_dotted(child, path[1:], value, name)})


def _convert(expected: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type `expected`, or a ValueError that says what was expected."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return _build(expected, value, f"{name}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner, value, name)
    if origin is Literal:
        _require(value in arguments, name, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(arguments[0], item, name) for item in items)
    if expected is float:
        # YAML 1.1 reads 1e-3 as text.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "a number", value)
        return float(value)
    kinds = {int: "an integer", bool: "true or false", str: "text"}
    _require(
        isinstance(value, expected) and (expected is bool or not isinstance(value, bool)), name, kinds[expected], value
    )
    return value
