"""Multi-modal hypergraph enhanced LLM learning for recommendation, and the fused operators behind it.

Everything is imported on first use, so that `import hellm` stays cheap and `hellm.ops` needs nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hellm.graphs import item_hypergraph, user_hypergraph
    from hellm.hypergraph import Hypergraph
    from hellm.pipeline import run
    from hellm.recommend import Recommender
    from hellm.recommend.compare import compare

__version__ = "0.1.0"

_EXPORTS = {
    "Hypergraph": "hellm.hypergraph",
    "Recommender": "hellm.recommend",
    "compare": "hellm.recommend.compare",
    "run": "hellm.pipeline",
    "item_hypergraph": "hellm.graphs",
    "user_hypergraph": "hellm.graphs",
}
_MODULES = (
    *("baselines", "config", "data", "evaluate", "export", "losses", "models", "nn", "ops", "recommend", "training"),
    *("sampled", "upkeep"),
)

__all__ = ["Hypergraph", "Recommender", "__version__", "compare", "item_hypergraph", "run", "user_hypergraph"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"hellm.{name}")
    raise AttributeError(f"module 'hellm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
