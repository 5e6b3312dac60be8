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
from hellm.ops import backends
from hellm.ops.backends import GpuBackend, loaders, verified

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda:0")
CACHED = (verified.of_this_machine, GpuBackend.source_digest, GpuBackend.key)


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
    monkeypatch.setattr(loaders, "architecture", lambda device: "sm_90" if device.type == "cuda" else None)
    monkeypatch.setattr(loaders, "triton", lambda: pretended)
    monkeypatch.setattr(loaders, "native", lambda: extension)
    monkeypatch.setattr(loaders, "device_code", lambda: copies["cuda"])
    monkeypatch.setattr(type(backends.BACKENDS["triton"]), "compiler", "torch")
    forget()
    yield copies
    forget()


def result(backend: str, ok: bool = True) -> dict[str, Any]:
    return {"backend": backend, "instruction_set": "sm_90", "op": "info_nce", "ok": ok}


def record(*rows: dict[str, Any]) -> None:
    verified.record(rows, backends.GPU_BACKENDS)


def test_a_backend_is_chosen_automatically_only_after_the_selftest_passed(hopper):
    assert backends.select(DEVICE).name == "torch"
    assert re.match("untested on sm_90: .*hellm info --selftest", backends.BACKENDS["triton"].unverified(DEVICE))
    with ops.backend("triton"):
        assert backends.select(DEVICE).name == "triton"
    record(result("native"))
    assert not verified.path().exists()
    record(result("triton"), result("triton", False), result("triton"))
    assert backends.select(DEVICE).name == "torch"
    record(result("triton"))
    assert backends.BACKENDS["triton"].unverified(DEVICE) is None
    assert backends.select(DEVICE).name == "triton"
    record(result("cuda"))
    assert backends.select(DEVICE).name == "cuda"


@pytest.mark.parametrize(
    ("backend", "file"), [("triton", "kernels/info_nce.py"), ("cuda", "cuda/common.cuh"), ("cuda", "_C.so")]
)
def test_a_result_ends_with_the_code_it_is_about(hopper, backend, file):
    record(result(backend))
    assert backends.BACKENDS[backend].verified(DEVICE)
    name, _, rest = file.partition("/")
    changed = hopper[name] / rest
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert backends.BACKENDS[backend].verified(DEVICE), "digests are taken once a process"
    forget()
    assert not backends.BACKENDS[backend].verified(DEVICE)
    changed.write_bytes(content)
    forget()
    assert backends.BACKENDS[backend].verified(DEVICE)


def test_a_result_ends_with_the_versions_it_is_about(hopper, monkeypatch):
    record(result("triton"))
    monkeypatch.setattr(torch, "__version__", "0.0")
    forget()
    assert not backends.BACKENDS["triton"].verified(DEVICE)


@pytest.mark.parametrize("text", ["not json", "[]", '{"results": {"triton sm_90": true}}', '{"passed": {}}'])
def test_a_file_of_another_form_is_no_result(hopper, text):
    record(result("triton"))
    verified.path().write_text(text)
    forget()
    assert not backends.BACKENDS["triton"].verified(DEVICE)


def test_results_of_this_machine_go_before_the_release(hopper, monkeypatch):
    monkeypatch.setitem(verified.RELEASE, "triton", {"sm_90": backends.BACKENDS["triton"].source_digest()})
    assert backends.BACKENDS["triton"].verified(DEVICE)
    record(result("triton", False))
    assert not backends.BACKENDS["triton"].verified(DEVICE)
    verified.path().unlink()
    (hopper["kernels"] / "info_nce.py").write_text("")
    forget()
    assert not backends.BACKENDS["triton"].verified(DEVICE), "the release passed with other kernels"


def test_what_cannot_run_has_not_passed(hopper, monkeypatch):
    record(result("cuda"))
    monkeypatch.setattr(loaders, "native", lambda: ImportError("another Python"))
    assert not backends.BACKENDS["cuda"].verified(DEVICE)


def test_what_cannot_be_loaded_is_not_asked_for_its_code(hopper, monkeypatch):
    record(result("triton"))
    monkeypatch.setattr(loaders, "triton", lambda: ImportError("no Triton"))
    monkeypatch.setattr(GpuBackend, "key", lambda self: pytest.fail("digested"))
    assert not backends.BACKENDS["triton"].verified(DEVICE)
    assert backends.select(DEVICE).name == "torch"


def test_nothing_is_digested_where_there_is_no_result(hopper, monkeypatch):
    def never(backend):
        raise AssertionError("digested")

    monkeypatch.setattr(GpuBackend, "source_digest", never)
    monkeypatch.setattr(GpuBackend, "key", never)
    backends.select(torch.device("cpu"))
    assert backends.select(DEVICE).name == "torch"


def test_the_release_is_about_the_code_that_comes_with_it():
    for backend, results in verified.RELEASE.items():
        assert set(results.values()) == {backends.BACKENDS[backend].source_digest()}, (
            f"{backend} changed since its self-test"
        )
