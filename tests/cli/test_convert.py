"""`hellm data check` and `convert` on a made-up shop."""

from __future__ import annotations

import re

import pytest
from support.command_line import last_json

pytestmark = pytest.mark.usefixtures("same_threads")


class TestData:
    def test_check_for_people_and_as_json(self, call, shop):
        code, out, err = call("data", "check", shop)
        assert (code, err) == (0, "")
        assert re.search(r"^  users +120$", out, re.MULTILINE) and "items have no title" in out
        report = last_json(call("data", "check", shop, "--json")[1])
        assert (report["users"], report["items"], report["events"]["test"]) == (120, 80, 120)

    def test_convert_keeps_events_and_warns_of_a_lost_split(self, call, shop, tmp_path):
        code, out, err = call("data", "convert", shop, tmp_path / "mmrec", "--to", "mmrec", "--json")
        assert (code, err) == (0, "")
        again = last_json(call("data", "check", tmp_path / "mmrec", "--json")[1])
        assert again["form"] == "mmrec" and again["events"]["train"] == last_json(out)["num_events"]["train"]
        code, _, err = call("data", "convert", shop, tmp_path / "txt", "--to", "sasrec", "--split", "time")
        assert code == 0 and err.startswith("hellm: warning: form 'sasrec' stores no split")

    def test_errors(self, fails, shop, tmp_path):
        fails("data", "chek", shop, match=r"data action must be one of check, .* got 'chek'; did you mean 'check'\?")
        fails("data", "check", tmp_path, match="unknown form; found an empty folder. Known forms: hellm: ")
        fails("data", "check", match="missing: DATA")
        fails("data", "build", shop, shop, match="is not empty; --overwrite replaces it, or give another")
        fails("data", "convert", shop, tmp_path / "x", match="missing: --to")
        fails("data", "convert", shop, tmp_path / "x", "--to", "mmrek", match="form must be one of .*, got 'mmrek'")
        fails("data", "sample", tmp_path / "x", "--num-users", "0", match="num_users must be > 0, got 0")
