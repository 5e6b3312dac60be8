"""Models of the order in which items were had, and what items are to them."""

from hellm.models.sequence.item_encoder import ItemEncoder, WhitenedContent
from hellm.models.sequence.sasrec import SASRec

__all__ = ["ItemEncoder", "SASRec", "WhitenedContent"]
