"""Reasons in words."""

from __future__ import annotations

from typing import Any

__all__ = ["basis_in_words", "reason_in_words"]

_ALIKE = {"image": "look alike", "text": "are described alike", "audio": "sound alike", "video": "look alike"}
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

    Items look alike where they are among the nearest of one item in that modality: where they share a hyperedge.
    """
    said = []
    if reason["shared_users"]:
        one = reason["shared_users"] == 1
        said.append("1 customer has both" if one else f"{reason['shared_users']:,} customers have both")
    alike = [name for name, link in (reason["content"] or {}).items() if link["shared_hyperedges"]]
    said += dict.fromkeys(_ALIKE[name] for name in alike if name in _ALIKE)
    same = [name for name in alike if name not in _ALIKE]
    if same:
        said.append(f"have the same {_and(same)}")
    if not said:
        return "near each other in what the model has learnt"
    first, rest = said[0], said[1:]
    if not reason["shared_users"]:
        return f"they {_and(said)}"
    return f"{first}; they {_and(rest)}" if rest else first


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
