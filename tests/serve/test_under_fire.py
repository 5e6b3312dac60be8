"""The server under kills and nonsense: short forms of `killed.py` and `bad_requests.py`."""

from __future__ import annotations

import bad_requests
import killed
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_kills_lose_nothing_and_double_nothing(tmp_path):
    counts = killed.killed(tmp_path, 3, seed=1, clients=3)
    assert (counts["moments"], counts["failures"]) == (3, 0)
    assert counts["events"] and counts["items"] and counts["sent_again"]


def test_nonsense_is_answered_with_what_is_wrong(tmp_path):
    found = bad_requests.sent(tmp_path, 400, seed=1)
    assert found["faults"] == []
    sent = {name.partition(":")[0] for name in found["answers"]}
    assert {kind.__name__ for kind in bad_requests.KINDS} <= sent
