"""`hellm recommend` through the command line."""

from __future__ import annotations

import re

import pytest
from support.command_line import last_json

pytestmark = pytest.mark.usefixtures("same_threads")


class TestRecommend:
    @pytest.fixture
    def bought(self, run) -> set[str]:
        """All items of user u00001."""
        from hellm.recommend import Recommender

        return {one.item for one in Recommender.load(run).history("u00001")}

    def test_known_user_gets_no_seen_item(self, call, run, bought):
        (answer,) = last_json(call("recommend", run, "--users", "u00001", "-k", "70", "--json")[1])
        items = [one["item"] for one in answer["items"]]
        assert answer["basis"] == "user" and len(bought) >= 5
        assert len(set(items)) == min(70, 80 - len(bought)) and not bought & set(items)

    def test_seen_items_on_request(self, call, run, bought):
        argv = ["--users", "u00001", "-k", "80", "--include-seen", "--json"]
        (answer,) = last_json(call("recommend", run, *argv)[1])
        assert bought <= {one["item"] for one in answer["items"]}

    def test_bare_history_gets_unseen_items_of_its_group(self, call, run):
        # Item P(1000 + i) is in group i % 4.
        history = ["P1001", "P1005", "P1009", "P1013"]
        (answer,) = last_json(call("recommend", run, "--history", *history, "-k", "5", "--json")[1])
        items = [one["item"] for one in answer["items"]]
        assert answer["basis"] == "history" and not set(history) & set(items)
        assert sum(int(item[1:]) % 4 == 1 for item in items) >= 4

    def test_empty_history_says_popular(self, call, run):
        code, out, _ = call("recommend", run, "--history", "-k", "3")
        assert code == 0 and out.startswith("this history: the most popular items, as there is no history to go by\n")
        assert len(out.splitlines()) == 4

    def test_candidates_from_a_file(self, call, run, tmp_path):
        file = tmp_path / "stock.txt"
        file.write_text("P1040\n\nP1041\n", encoding="utf-8")
        (answer,) = last_json(call("recommend", run, "--history", "P1000", "--candidates-file", file, "--json")[1])
        assert {one["item"] for one in answer["items"]} == {"P1040", "P1041"}

    def test_similar_items(self, call, run):
        items = [one["item"] for one in last_json(call("recommend", run, "--similar-to", "P1002", "--json")[1])]
        assert len(items) == 10 and "P1002" not in items
        code, out, _ = call("recommend", run, "--similar-to", "P1002", "-k", "2")
        assert code == 0 and items[0] in out and len(out.splitlines()) == 4

    def test_explained(self, call, run):
        argv = ["--history", "P1001", "P1005", "-k", "2", "--explain"]
        code, out, _ = call("recommend", run, *argv)
        assert code == 0 and re.search(r"near .*\(P100[15]\): \d+ users have both", out)
        (answer,) = last_json(call("recommend", run, *argv, "--json")[1])
        assert {one["item"] for one in answer["items"][0]["because"]} <= {"P1001", "P1005"}

    def test_errors(self, fails, run):
        fails("recommend", run, "--users", "u00001", "-k", "0", match=r"-k must be >= 1, got 0")
        fails("recommend", run, "--similar-to", "P9", match="unknown item 'P9' among the 80 items of the run")
        fails("recommend", run, match="give one of --users, --history and --similar-to, got 0 of them")
        fails("recommend", run, "--users", "a", "--history", "b", match="got 2 of them")
        fails("recommend", run, "--users", "u00001", "-k", "x", match="--k must be an integer, got 'x'")
        fails("recommend", "nowhere", "--users", "a", match="run directory nowhere does not exist")
        fails("recommend", run, "--users", "u00001", "--candidates-file", "no.txt", match=r"no\.txt: no such file")
        argv = ["--candidates", "P1000", "--candidates-file", "no.txt"]
        fails("recommend", run, "--users", "u00001", *argv, match="give either --candidates or --candidates-file")
