"""Servers that several tests of a file ask."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason='needs the extra: pip install "hellm[serve]"')
pytest.importorskip("uvicorn", reason='needs the extra: pip install "hellm[serve]"')


@pytest.fixture(scope="session")
def one_thread():
    """Answers have the same bits in all calls on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def browser():
    """See `browsers.chromium`."""
    from browsers import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def research_runs(tmp_path_factory, one_thread):
    """(shop, runs): data as a shop has it, and two trainings on it, see `research_runs.train_runs`."""
    from research_runs import train_runs
    from served import save_shop

    shop = save_shop(tmp_path_factory.mktemp("shop") / "shop")
    return shop, train_runs(tmp_path_factory.mktemp("runs"), shop)
