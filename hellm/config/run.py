"""Settings of the whole way from raw data to recommendations."""

from __future__ import annotations

from dataclasses import dataclass, field

from hellm.config._checks import require
from hellm.config.finetune import FinetuneConfig
from hellm.config.fuse import FuseConfig
from hellm.config.pretrain import PretrainConfig
from hellm.config.sasrec import CONTENT_TOWER, SASRecConfig
from hellm.config.transitions import TransitionsConfig

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """The whole way from raw data to recommendations.

    Args:
        text: encoder of item texts: "minilm", "mpnet", "llm", a folder or hub id of a transformers encoder, "none", or
            "auto" (minilm where the data have texts and no text features); see `hellm features`.
        image: encoder of pictures: "efficientnet", a folder or hub id, "none", or "auto" as above.
        language_model: fine-tune a language model as well, which takes most of the time.
        baselines: what to compare with: "popularity", "random", "itemknn", "bpr", "als" and "lightgcn".
        pretrain: stage 1; the LightGCN baseline has the same settings without hypergraphs.
        transitions: what follows what.
        sasrec: the sequence model.
        content: a sequence model that reads the content of items alone, where the data have any.
        finetune: stage 2.
        fuse: the sum of them, which recommends.
        protocol: evaluation protocol of the comparison, and of every stage.
        ks: list lengths of the comparison.
    """

    text: str = "auto"
    image: str = "auto"
    language_model: bool = True
    baselines: tuple[str, ...] = ("popularity", "itemknn", "bpr", "lightgcn")
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    transitions: TransitionsConfig = field(default_factory=TransitionsConfig)
    sasrec: SASRecConfig = field(default_factory=SASRecConfig)
    content: SASRecConfig = CONTENT_TOWER
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
    protocol: str = "standard"
    ks: tuple[int, ...] = (5, 10, 20)

    def __post_init__(self) -> None:
        known = ("popularity", "random", "itemknn", "bpr", "als", "lightgcn")
        wrong = [name for name in self.baselines if name not in known]
        require(not wrong, "baselines", f"among {', '.join(known)}", wrong[0] if wrong else None)
        require(len(self.ks) > 0 and min(self.ks, default=0) >= 1, "ks", "list lengths >= 1", self.ks)
