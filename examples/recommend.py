"""Serving from a finished run of any stage: known users, new histories, similar items, reasons, and new items."""

from __future__ import annotations

import argparse
from pathlib import Path

from hellm import Recommender


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("demo/run/fused"), help="run directory")
    args = parser.parse_args()

    # The run directory is all that is needed: the data set can be elsewhere.
    recommender = Recommender.load(args.run)
    users, items = recommender.user_ids.ids, recommender.item_ids.ids

    for answer in recommender.recommend(users=users[:2], k=3):
        print(f"user {answer.user} (by {answer.basis}):", [item.title or item.item for item in answer])

    # Somebody the model has never seen, and only what is in stock.
    (answer,) = recommender.recommend(histories=[items[:3]], k=3, candidates=items[::2])
    print(f"a new visitor (by {answer.basis}):", [item.item for item in answer])

    best = answer.items[0].item
    for reason in recommender.explain(best, history=items[:3]):
        likeness = {name: round(link.similarity, 2) for name, link in (reason.content or {}).items()}
        print(f"  {best} because of {reason.item}: {reason.shared_users} shared buyers, likeness {likeness}")

    print(f"like {items[0]}:", [item.item for item in recommender.similar_items(items[0], k=3)])


if __name__ == "__main__":
    main()
