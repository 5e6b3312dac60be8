"""What the stages of a run will take on this machine: a timed sample, and a model of how costs grow from there."""

from __future__ import annotations

from hellm.plan.model import STAGES, Sizes
from hellm.plan.planning import Rates, plan

__all__ = ["STAGES", "Rates", "Sizes", "plan"]
