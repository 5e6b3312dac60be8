"""Fixtures for all tests."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

pytest.register_assert_rewrite("support")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Processes of tests share the cores.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
# Files of a minute or so go first: at the end, the others would wait for them.
_LONG = (
    *("test_processes.py", "test_triton.py", "test_gpu_benchmark.py", "test_killed.py", "test_run.py"),
    *("test_under_fire.py", "test_load.py", "test_emulated_knn.py", "test_cuda_build.py", "test_fault_programs.py"),
    "test_engines.py",
)


def pytest_configure() -> None:
    """Signals act as usual, in children too: whoever started the tests, as nohup does, may have them ignored."""
    for name, usual in (
        ("SIGINT", signal.default_int_handler),
        ("SIGHUP", signal.SIG_DFL),
        ("SIGTERM", signal.SIG_DFL),
    ):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first. Where torch sees no GPU, the first case of each test that needs one is skipped for all."""
    items.sort(key=lambda item: item.path.name not in _LONG)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    told, left_out = set(), []
    for item in items:
        if item.get_closest_marker("gpu"):
            test = item.nodeid.partition("[")[0]
            if test in told:
                left_out.append(item)
            told.add(test)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        left_out = set(left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public research data beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the public research data in ../shared/data, which is not there")
    return folder


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory) -> str:
    """Folder of a tiny random text encoder."""
    pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')
    from support.encoders import save_text_encoder

    return save_text_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory) -> str:
    """Folder of a tiny random encoder of pictures."""
    pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')
    from support.encoders import save_image_encoder

    return save_image_encoder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def same_threads():
    """Commands set the thread count of the process; this gives it back."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(capsys):
    """Run a command; gives (exit code, stdout, stderr)."""
    from hellm.cli import main

    def call(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(one) for one in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fails(call):
    """Run a command that must fail as the user's mistake: one line on stderr, `out` on stdout (None: anything)."""

    def fails(*argv, match: str, code: int = 2, out: str | None = "") -> None:
        found, printed, err = call(*argv)
        assert (found, printed) == (code, printed if out is None else out)
        assert err.startswith("hellm: error: ") and err.count("\n") == 1
        assert re.search(match, err), err

    return fails
