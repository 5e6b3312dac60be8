"""What must have gone well before a request is answered."""

from __future__ import annotations

import logging

import numpy as np

from hellm.recommend import Recommender
from hellm.selftest import selftest

__all__ = ["NotReadyError", "check_operators", "is_row_exact"]

logger = logging.getLogger(__name__)

_LISTS = 17
_K = 10


class NotReadyError(RuntimeError):
    """This machine does not compute what it must."""


def check_operators() -> None:
    """Raises: NotReadyError, an operator is off by more than rounding, see `hellm.selftest`."""
    wrong = [one for one in selftest() if not one["ok"]]
    if wrong:
        first = wrong[0]
        raise NotReadyError(
            f"the self-test of the operators must pass, and {first['op']} of backend {first['backend']} does not "
            f"(error {first['worst_error']:.2g}, budget {first['budget']:.2g}); see hellm info --selftest"
        )


def is_row_exact(recommender: Recommender) -> bool:
    """Whether users and histories get the same bits alone and in calls of several sizes, tried on some of them.

    Where one of them has no answer, requests are better not mixed, and all others are answered nevertheless.
    """
    try:
        return _is_row_exact(recommender)
    except ValueError as error:
        logger.warning("requests do not share calls of the model: %s", error)
        return False


def _is_row_exact(recommender: Recommender) -> bool:
    k = min(_K, recommender.num_items)
    draw = np.random.default_rng(0)
    if not recommender.num_users:
        return False
    users = [recommender.user_ids.ids[row] for row in draw.integers(recommender.num_users, size=_LISTS)]
    histories = [
        [recommender.item_ids.ids[row] for row in draw.integers(recommender.num_items, size=1 + length % 12)]
        for length in range(_LISTS)
    ]
    alone_users = [recommender.recommend([user], k=k)[0] for user in users]
    alone = [recommender.recommend(histories=[one], k=k)[0] for one in histories]
    return all(
        recommender.recommend(users[:size], k=k) == alone_users[:size]
        and recommender.recommend(histories=histories[:size], k=k) == alone[:size]
        for size in range(2, _LISTS + 1)
    )
