"""A made-up shop and a run on it, which the commands read."""

from __future__ import annotations

import pytest
from support.command_line import FAST

from hellm.cli import main


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> str:
    """A made-up shop of 120 users and 80 items in 4 groups, in hellm's own form."""
    folder = tmp_path_factory.mktemp("shop")
    sizes = ["--num-users", "120", "--num-items", "80", "--num-groups", "4"]
    assert main(["data", "sample", str(folder / "raw"), *sizes]) == 0
    assert main(["data", "build", str(folder / "raw"), str(folder / "built")]) == 0
    return str(folder / "built")


@pytest.fixture(scope="session")
def run(shop, tmp_path_factory) -> str:
    """A run of 10 epochs on `shop`."""
    out = str(tmp_path_factory.mktemp("runs") / "run")
    assert main(["pretrain", "--data", shop, "--out", out, *FAST, "--max-epochs", "10"]) == 0
    return out
