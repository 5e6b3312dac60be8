"""Settings of stage 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from hellm.config._checks import require
from hellm.config.loop import LoopConfig

__all__ = ["ModelConfig", "PretrainConfig"]


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
        item_hypergraph: use the item hypergraph at all; it needs item features or attributes.
        modalities: feature names that build the item hypergraph; null means all there are.
        attributes: attributes of the data set (brand, category, ...) whose values are hyperedges of the items as well;
            null means all there are, and none with compat.
        knn_k: members of each kNN hyperedge, the item itself included.
        knn_search: of those neighbours, "exact", or "approximate" where all pairs of items take too long; it needs the
            extra "export", and the result says how many of the exact neighbours it found.
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
    attributes: tuple[str, ...] | None = None
    knn_k: int = 5
    knn_search: Literal["exact", "approximate"] = "exact"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_layers", "num_user_layers", "num_item_layers", "knn_k"):
            require(getattr(self, name) >= 1, f"model.{name}", ">= 1", getattr(self, name))
        require(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)
        require(self.modalities is None or len(self.modalities) > 0, "model.modalities", "null or not empty", ())


@dataclass(frozen=True)
class PretrainConfig(LoopConfig):
    """Stage 1: hypergraph pre-training.

    The defaults were chosen on the validation split of TikTok; the presets named after data sets are the published
    settings.

    Args:
        model: the graph encoder.
        learning_rate: Adam step size at epoch 0.
        learning_rate_decay: factor per `learning_rate_decay_epochs` epochs, applied smoothly every epoch.
        learning_rate_decay_epochs: epochs after which `learning_rate_decay` has been applied once.
        batch_size: users (or interactions) per step; fewer where the data has fewer.
        loss: "bpr" with one negative per interaction (the paper), or "softmax": cross-entropy of the cosines with all
            items that have training events, which learns more of each interaction where items are many.
        softmax_temperature: of "softmax"; smaller is sharper.
        sampled_items: items drawn anew for every step that stand for the whole catalogue in "softmax", without bias
            in what it divides by; null takes all items.
        l2_weight: weight of the L2 penalty on the fused embedding rows of a batch.
        user_contrastive_weight: weight of the contrast between fused and hypergraph user embeddings; 0 skips it.
        item_contrastive_weight: the same for items.
        temperature: of both contrastive losses; smaller is sharper.
        contrastive_rows: anchors per step drawn uniformly, against all keys (an unbiased estimate); null means all,
            and so does compat.
        contrastive_keys: nodes drawn uniformly for every step, the anchors among them, that stand for all as keys,
            without bias in the sum of negatives; null means all, and so does compat.
        sampled_neighbours: neighbours, hyperedges and members of hyperedges that a layer reads at most for each node
            that the losses of a step need, drawn anew for every step: for graphs that a step cannot propagate over as a
            whole. What is propagated is right in the mean, lengths and losses are not linear in it. With keys, and
            items of "softmax", that are drawn as well, a step costs by what it draws: only rows that were read are
            updated, and the moments of others stand still. Validation is over the whole graphs. null propagates them
            in every step.
        precision: of the contrastive similarities, "highest", "high" or "medium"; null follows torch.
        sampler: "user-uniform" (distinct users, then one of their items) or "interaction-uniform" (every interaction
            once per epoch). A GPU draws "user-uniform" triples with "uniform" negatives itself: the same distribution,
            other numbers than on the CPU.
        negatives: "uniform" over the items a user has not, or by their "popularity" to the power 0.75.
        seed: of initialisation and sampling.
        compat: "official" repeats the published code, quirks included; null fixes them.
        capture: replay the training step as a CUDA graph; null does so on a GPU.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    learning_rate: float = 1e-3
    learning_rate_decay: float = 0.96
    learning_rate_decay_epochs: float = 50.0
    batch_size: int = 1024
    loss: Literal["bpr", "softmax"] = "bpr"
    softmax_temperature: float = 0.2
    sampled_items: int | None = None
    l2_weight: float = 1e-3
    user_contrastive_weight: float = 0.03
    item_contrastive_weight: float = 0.07
    temperature: float = 0.6
    contrastive_rows: int | None = 512
    contrastive_keys: int | None = None
    sampled_neighbours: int | None = None
    precision: Literal["highest", "high", "medium"] | None = None
    sampler: Literal["user-uniform", "interaction-uniform"] = "user-uniform"
    negatives: Literal["uniform", "popularity"] = "uniform"
    max_epochs: int = 1000
    monitor: tuple[str, ...] = ("recall@20", "ndcg@20")
    ks: tuple[int, ...] = (10, 20)
    protocol: str = "standard"
    compat: Literal["official"] | None = None
    capture: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "learning_rate",
            "learning_rate_decay",
            "learning_rate_decay_epochs",
            "temperature",
            "softmax_temperature",
        ):
            require(isfinite(getattr(self, name)) and getattr(self, name) > 0, name, "> 0", getattr(self, name))
        for name in ("l2_weight", "user_contrastive_weight", "item_contrastive_weight"):
            require(isfinite(getattr(self, name)) and getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        require(self.batch_size >= 1, "batch_size", ">= 1", self.batch_size)
        require(self.compat is None or self.loss == "bpr", "loss", "bpr with compat", self.loss)
        rows, keys = self.contrastive_rows, self.contrastive_keys
        require(rows is None or rows >= 1, "contrastive_rows", "null or >= 1", rows)
        least = 2 if rows is None else max(2, rows)
        require(keys is None or keys >= least, "contrastive_keys", f"null or >= {least}, the anchors among them", keys)
        items = self.sampled_items
        require(items is None or items >= 1, "sampled_items", "null or >= 1", items)
        require(items is None or self.loss == "softmax", "sampled_items", "null with loss bpr", items)
        if self.sampled_neighbours is not None:
            self._check_sampled_neighbours(self.sampled_neighbours)

    def _check_sampled_neighbours(self, count: int) -> None:
        name, model = "sampled_neighbours", self.model
        require(count >= 1, name, "null or >= 1", count)
        require(self.compat is None, name, "null with compat", count)
        require(model.backbone != "ngcf", name, "null with backbone ngcf, which is not linear in what it reads", count)
        is_contrasted = (model.user_hypergraph and self.user_contrastive_weight > 0) or (
            model.item_hypergraph and self.item_contrastive_weight > 0
        )
        rule = f"set with {name}, as all nodes as keys read the whole graphs"
        require(not is_contrasted or self.contrastive_keys is not None, "contrastive_keys", rule, None)
