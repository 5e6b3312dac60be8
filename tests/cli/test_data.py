"""`hellm data` and the options of reading: strict JSON, one line for a user's mistake, columns by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hellm.cli import main

EVENTS = "who;what;sold_at\nann;x;31.05.2024\nann;y;30.05.2024\nbob;x;29.05.2024\n"
READING = ["--columns", "user=who", "item=what", "time=sold_at", "--separator", ";", "--encoding", "latin-1"]


def strict(text: str) -> Any:
    """The last line as JSON without NaN and infinities."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text.splitlines()[-1], parse_constant=refuse)


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "events.csv").write_bytes(EVENTS.replace("ann", "anné").encode("latin-1"))
    (folder / "items.csv").write_bytes(b"what;name;image;colour\nx;Caf\xe9;;red|blue\ny;B;;\n")
    return folder


def test_check_says_what_was_read_and_in_what_order(call, shop):
    code, out, err = call("data", "check", shop, "--columns", "attribute=colour", *READING[1:])
    assert (code, err) == (0, "")
    assert "order" in out and "by time in column 'sold_at', oldest first, from 2024-05-29 to 2024-05-31" in out
    assert "user 'who', item 'what', time 'sold_at'" in out
    code, out, _ = call("data", "check", shop, *READING, "--json")
    report = strict(out)
    assert report["columns"] == {"user": "who", "item": "what", "time": "sold_at"}
    assert report["time"]["last_day"] == "2024-05-31"


def test_roles_that_are_options_elsewhere_are_roles_here(call, shop, tmp_path):
    # `features` has options --text and --image.
    reading = [*READING[:4], "image=image", *READING[4:]]
    out = tmp_path / "out"
    code, printed, err = call("features", shop, "--out", out, *reading, "--text", "none", "--image", "none")
    assert code == 2 and "leaves nothing to encode" in err
    code, printed, err = call("data", "build", shop, out, *reading, "--json")
    assert code == 0, err
    assert strict(printed)["num_events"] == {"train": 3, "valid": 0, "test": 0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--columns", "sold_at"], "--columns must be given as role=column, e.g. time=sold_at, got 'sold_at'"),
        (["--columns", "when=sold_at"], "columns must name roles among user, item, time, .*, got 'when'"),
        ([], "byte 0xe9 is not UTF-8"),
        (["--encoding", "latin-1"], "no column for the user .*found who, what, sold_at; name it"),
        (["--encoding", "x"], "encoding must be one that Python knows"),
        (["--separator", "ab"], "separator must be one character"),
        (
            [*READING[:1], "user=who", "item=what", "time=nope", "--encoding", "latin-1"],
            "no column 'nope' for the time",
        ),
    ],
)
def test_mistakes_are_one_line(fails, shop, options, words):
    fails("data", "check", shop, *options, match=words)


@pytest.mark.parametrize(
    "verb", [["data", "check"], ["data", "build"], ["features"], ["run"], ["pretrain"], ["sasrec"], ["finetune"],
             ["evaluate"], ["ablate"], ["data", "convert"]],
)  # fmt: skip
def test_every_verb_that_reads_data_takes_the_options(call, verb):
    code, out, _ = call(*verb, "--help")
    assert code == 0
    assert all(option in out for option in ("--columns ROLE=COLUMN", "--separator", "--encoding", "--min-rating"))


@pytest.mark.parametrize("content", ["user,item\na,x\n", "user,item,time\na,x,5\na,y,7\na,z,9\nb,x,1\n"])
def test_json_is_strict_even_for_little_data(capsys, tmp_path, content):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "events.csv").write_text(content)
    for argv in (
        ["data", "check", str(folder)],
        ["data", "build", str(folder), str(tmp_path / "built")],
        ["data", "convert", str(folder), str(tmp_path / "json"), "--to", "json"],
    ):
        assert main([*argv, "--json"]) == 0
        assert isinstance(strict(capsys.readouterr().out), dict)


def test_a_remark_on_who_has_most_events(call, tmp_path):
    rows = "".join(f"guest,{item},{item}\n" for item in range(90)) + "".join(f"u{n},1,5\n" for n in range(30))
    (tmp_path / "events.csv").write_text("user,item,time\n" + rows)
    _, out, _ = call("data", "check", tmp_path)
    assert "user 'guest' has 75.0% of all events; is that one person?" in out
