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
