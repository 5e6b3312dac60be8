"""Multi-modal hypergraph enhanced LLM learning for recommendation, and the fused operators behind it.

Everything is imported on first use, so that `import hellm` stays cheap and `hellm.ops` needs nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hellm.hypergraph import Hypergraph, item_hypergraph, user_hypergraph
    from hellm.recommend.compare import compare
    from hellm.recommend.recommender import Recommender

__version__ = "0.1.0"

_EXPORTS = {
    "Hypergraph": "hellm.hypergraph",
    "Recommender": "hellm.recommend.recommender",
    "compare": "hellm.recommend.compare",
    "item_hypergraph": "hellm.hypergraph",
    "user_hypergraph": "hellm.hypergraph",
}
_MODULES = ("baselines", "config", "data", "evaluate", "losses", "models", "nn", "ops", "recommend", "training")

__all__ = ["Hypergraph", "Recommender", "__version__", "compare", "item_hypergraph", "user_hypergraph"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"hellm.{name}")
    raise AttributeError(f"module 'hellm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
