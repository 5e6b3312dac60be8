"""Models of the order in which items were had, and what items are to them."""

from hellm.models.sequence.item_encoder import ItemEncoder, WhitenedContent
from hellm.models.sequence.sasrec import SASRec
from hellm.models.sequence.transitions import ItemPairs, TransitionModel

__all__ = ["ItemEncoder", "ItemPairs", "SASRec", "TransitionModel", "WhitenedContent"]
