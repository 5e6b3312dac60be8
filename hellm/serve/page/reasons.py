"""Reasons in words."""

from __future__ import annotations

from typing import Any

__all__ = ["basis_in_words", "reason_in_words"]

_NAMES = {"image": "picture", "text": "words", "audio": "sound"}
_BASIS = {
    "user": "From what the model learnt of this customer in training.",
    "history": "From everything that was bought, in its order.",
    "popularity": "There is nothing to go by yet, so these are what most customers buy.",
}


def basis_in_words(basis: str) -> str:
    """What a list is made from; `basis` as in `hellm.recommend.Recommendations`."""
    return _BASIS[basis]


def reason_in_words(reason: dict[str, Any]) -> str:
    """What ties an item to one that was bought, as the end of "Bought X: ..."; `reason` as `Reason.to_dict` gives it.

    Items are alike in a modality where they are among the nearest of one item: where they share a hyperedge.
    """
    said, number = [], reason["shared_users"]
    if number:
        said.append("1 customer has both" if number == 1 else f"{number:,} customers have both")
    alike = [_NAMES.get(name) or name for name, link in (reason["content"] or {}).items() if link["shared_hyperedges"]]
    if alike:
        said.append(f"alike in {' and '.join([', '.join(alike[:-1]), alike[-1]] if len(alike) > 1 else alike)}")
    return ", ".join(said) or "near each other in what the model has learnt"
