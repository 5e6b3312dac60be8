"""Which GPU backend is chosen: only one whose very code passed the self-test on that architecture."""

from __future__ import annotations

import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from hellm import ops
from hellm.ops import _backends, _nvrtc, _verified

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda:0")
CACHED = (_verified._of_this_machine, _verified.source_digest, _verified.key)


def forget() -> None:
    """As in a new process."""
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine with an H100 and no results of its own, Triton on a copy of the kernels, an extension; the copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copies = {name: tmp_path / name for name in ("kernels", "cuda", "_C.so")}
    shutil.copytree(ROOT / "kernels", copies["kernels"])
    shutil.copytree(ROOT / "csrc" / "cuda", copies["cuda"])
    copies["_C.so"].write_bytes(b"machine code")
    pretended = types.SimpleNamespace(__file__=str(copies["kernels"] / "__init__.py"))
    extension = types.SimpleNamespace(__file__=str(copies["_C.so"]), cuda_architectures=lambda: "90")
    monkeypatch.setattr(_backends, "architecture", lambda device: "sm_90" if device.type == "cuda" else None)
    monkeypatch.setattr(_backends, "triton", lambda: pretended)
    monkeypatch.setattr(_backends, "native", lambda: extension)
    monkeypatch.setattr(_nvrtc, "folder", lambda: copies["cuda"])
    monkeypatch.setitem(_verified._COMPILERS, "triton", "torch")
    forget()
    yield copies
    forget()


def result(backend: str, ok: bool = True) -> dict[str, Any]:
    return {"backend": backend, "instruction_set": "sm_90", "op": "info_nce", "ok": ok}


def record(*rows: dict[str, Any]) -> None:
    _verified.record(rows, _backends.GPU_BACKENDS)


def test_a_backend_is_chosen_automatically_only_after_the_selftest_passed(hopper):
    assert _backends.select(DEVICE) == "torch"
    assert re.match("untested on sm_90: .*hellm info --selftest", _backends.untested("triton", DEVICE))
    with ops.backend("triton"):
        assert _backends.select(DEVICE) == "triton"
    record(result("native"))
    assert not _verified.path().exists()
    record(result("triton"), result("triton", False), result("triton"))
    assert _backends.select(DEVICE) == "torch"
    record(result("triton"))
    assert _backends.untested("triton", DEVICE) is None
    assert _backends.select(DEVICE) == "triton"
    record(result("cuda"))
    assert _backends.select(DEVICE) == "cuda"


@pytest.mark.parametrize(
    ("backend", "file"), [("triton", "kernels/info_nce.py"), ("cuda", "cuda/common.cuh"), ("cuda", "_C.so")]
)
def test_a_result_ends_with_the_code_it_is_about(hopper, backend, file):
    record(result(backend))
    assert _verified.passed(backend, DEVICE)
    name, _, rest = file.partition("/")
    changed = hopper[name] / rest
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert _verified.passed(backend, DEVICE), "digests are taken once a process"
    forget()
    assert not _verified.passed(backend, DEVICE)
    changed.write_bytes(content)
    forget()
    assert _verified.passed(backend, DEVICE)


def test_a_result_ends_with_the_versions_it_is_about(hopper, monkeypatch):
    record(result("triton"))
    monkeypatch.setattr(torch, "__version__", "0.0")
    forget()
    assert not _verified.passed("triton", DEVICE)


@pytest.mark.parametrize("text", ["not json", "[]", '{"results": {"triton sm_90": true}}', '{"passed": {}}'])
def test_a_file_of_another_form_is_no_result(hopper, text):
    record(result("triton"))
    _verified.path().write_text(text)
    forget()
    assert not _verified.passed("triton", DEVICE)


def test_results_of_this_machine_go_before_the_release(hopper, monkeypatch):
    monkeypatch.setitem(_verified.RELEASE, "triton", {"sm_90": _verified.source_digest("triton")})
    assert _verified.passed("triton", DEVICE)
    record(result("triton", False))
    assert not _verified.passed("triton", DEVICE)
    _verified.path().unlink()
    (hopper["kernels"] / "info_nce.py").write_text("")
    forget()
    assert not _verified.passed("triton", DEVICE), "the release passed with other kernels"


def test_what_cannot_run_has_not_passed(hopper, monkeypatch):
    record(result("cuda"))
    monkeypatch.setattr(_backends, "native", lambda: ImportError("another Python"))
    assert not _verified.passed("cuda", DEVICE)


def test_nothing_is_digested_where_there_is_no_result(hopper, monkeypatch):
    def never(backend):
        raise AssertionError("digested")

    monkeypatch.setattr(_verified, "source_digest", never)
    monkeypatch.setattr(_verified, "key", never)
    _backends.select("cpu")
    assert _backends.select(DEVICE) == "torch"


def test_the_release_is_about_the_code_that_comes_with_it():
    for backend, results in _verified.RELEASE.items():
        assert set(results.values()) == {_verified.source_digest(backend)}, f"{backend} changed since its self-test"
