"""A data set small enough for every protocol to be worked out by hand, and what they give."""

from __future__ import annotations

import numpy as np

from support.table_scorer import csr


class FakeDataset:
    """Ranking 0 1 2 3 4 5 for everybody. User 0: train 0, valid 1, test 2. User 1: train 3, test 0.
    User 2: valid 0, test 1 and no train event. User 3: train 4 and nothing else.
    """

    name, num_users, num_items = "fake", 4, 6
    events = {  # noqa: RUF012
        "train": ([0, 1, 3], [0, 3, 4]),
        "valid": ([0, 2], [1, 0]),
        "test": ([0, 1, 2], [2, 0, 1]),
    }

    def pairs(self, split):
        return tuple(np.array(part, dtype=np.int64) for part in self.events[split])

    def histories(self, *splits):
        lists = [[] for _ in range(self.num_users)]
        for split in splits:
            for user, item in zip(*self.events[split], strict=True):
                lists[user].append(item)
        return csr(lists)


# mrr@3 per user, by hand. Test, unmasked: user 0 wants 2 (rank 3), user 1 wants 0 (rank 1), user 2 wants 1 (rank 2).
# Train masked: user 0 loses item 0, its target is second. Train and valid masked: user 0 loses 0 and 1, its target is
# first; user 2 loses 0, its target is first.
# Valid, train masked: user 0 wants 1, loses 0: first; user 2 wants 0: first.
PROTOCOL_TABLE = [
    ("standard", "test", {0: 1, 1: 1, 2: 1}),
    ("s3rec", "test", {0: 1, 1: 1, 2: 1}),
    ("recbole", "test", {0: 1, 1: 1, 2: 1}),
    ("official", "test", {0: 1 / 2, 1: 1, 2: 1 / 2}),
    ("mmrec", "test", {0: 1 / 2, 1: 1}),
    ("recbole-sequential", "test", {0: 1 / 3, 1: 1, 2: 1 / 2}),
    ("hellm-llm", "test", {0: 1 / 3, 1: 1, 2: 1 / 2}),
    ("standard", "valid", {0: 1, 2: 1}),
    ("official", "valid", {0: 1, 2: 1}),
    ("s3rec", "valid", {0: 1, 2: 1}),
    ("recbole", "valid", {0: 1, 2: 1}),
    ("mmrec", "valid", {0: 1}),
    ("recbole-sequential", "valid", {0: 1 / 2, 2: 1}),
    ("hellm-llm", "valid", {0: 1 / 2, 1: 0, 2: 1, 3: 0}),
    # 100 candidates are more than there are: all items that are neither known nor targets.
    ("sampled-uniform", "test", {0: 1, 1: 1, 2: 1}),
    ("sampled-popularity", "test", {0: 1, 1: 1, 2: 1}),
    ("sampled-uniform", "valid", {0: 1, 2: 1}),
]
