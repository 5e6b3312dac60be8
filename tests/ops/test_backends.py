"""Choosing a backend, what is said when it cannot run, and the self-test."""

from __future__ import annotations

import importlib
import sys
import threading

import pytest
import torch
from op_cases import INSTRUCTION_SETS, needs_native, rows

from hellm import ops
from hellm.ops import _backends, _selftest


def test_backend_refuses_an_unknown_name():
    with (
        pytest.raises(ValueError, match=r"backend must be one of \('native', .*, 'triton', 'torch'\), got 'none'"),
        ops.backend("none"),
    ):
        pass


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), ops.backend("torch"):
        assert _backends.select("cpu") == "torch"
        raise KeyError
    with ops.backend("torch"), pytest.raises(KeyError), ops.backend("native"):
        raise KeyError
    assert _backends.select("cpu") == ("native" if INSTRUCTION_SETS else "torch")


@needs_native
def test_gradients_come_from_the_backend_of_the_forward_pass(monkeypatch):
    x = rows(9, 4).requires_grad_()
    with ops.backend("torch"):
        loss = ops.info_nce(x, x + 1, reduction="none").sum()
    used, select = [], _backends.select
    monkeypatch.setattr(_backends, "select", lambda device: used.append(select(device)) or used[-1])
    # As autograd does it for a GPU.
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert used == ["torch"] and x.grad is not None


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_backends, "native", lambda: ImportError("undefined symbol: nothing"))


def test_native_without_the_extension_raises_with_the_cause(no_extension):
    message = (
        "backend 'native' cannot run on cpu: .*hellm._C cannot be loaded: undefined symbol: nothing; see `hellm info`"
    )
    with ops.backend("native"), pytest.raises(RuntimeError, match=message):
        ops.knn(rows(4, 2), 2)


def test_operators_run_without_the_extension(no_extension):
    assert torch.equal(ops.knn(rows(4, 2), 1)[0].flatten(), torch.arange(4))


def test_extension_that_cannot_be_imported_is_reported(monkeypatch):
    import hellm

    monkeypatch.setitem(sys.modules, "hellm._C", None)
    monkeypatch.delattr(hellm, "_C", raising=False)
    _backends.native.cache_clear()
    try:
        assert isinstance(_backends.native(), ImportError)
        assert "hellm._C cannot be loaded" in _backends.unusable("native", "cpu")
    finally:
        monkeypatch.undo()
        _backends.native.cache_clear()


@needs_native
def test_native_has_no_kernels_for_other_devices():
    reason = 'it serves the CPU, not cuda; on NVIDIA GPUs the compiled kernels are "cuda" and "nvrtc"'
    assert _backends.unusable("native", "cuda") == reason
    assert _backends.unusable("torch", "cuda") is None
    assert _backends.select("cuda") == "torch"


@needs_native
def test_instruction_set_is_chosen_by_name():
    extension = importlib.import_module("hellm._C")
    before = extension.instruction_set()
    assert INSTRUCTION_SETS[-1] == "portable"
    try:
        for name in INSTRUCTION_SETS:
            extension.use_instruction_set(name)
            assert extension.instruction_set() == name
        with pytest.raises(ValueError, match=r"instruction set must be one of instruction_sets\(\), got sse"):
            extension.use_instruction_set("sse")
        assert extension.instruction_set() == "portable"
    finally:
        extension.use_instruction_set(before)


def test_selftest_passes_for_every_backend():
    before = _backends.native().instruction_set() if INSTRUCTION_SETS else None
    records = _selftest.selftest()
    kernels = {(r["backend"], r["instruction_set"]) for r in records}
    assert kernels == {*(("native", name) for name in INSTRUCTION_SETS), ("torch", None)}
    assert {r["op"] for r in records} == {
        "hypergraph_conv", "incidence_product", "bipartite_propagate", "info_nce", "item_cross_entropy", "knn"
    }  # fmt: skip
    assert [r for r in records if not r["ok"]] == []
    assert all(0 <= r["worst_error"] <= r["budget"] and r["seconds"] >= 0 for r in records)
    assert before is None or _backends.native().instruction_set() == before


def test_selftest_reports_a_wrong_result(monkeypatch):
    right = ops.incidence_product
    monkeypatch.setattr(ops, "incidence_product", lambda x, graph: right(x, graph) * 1.5)
    assert {r["op"] for r in _selftest.selftest() if not r["ok"]} == {"incidence_product"}


def test_selftest_reports_an_operator_that_raises(no_extension, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "knn", broken)
    records = [r for r in _selftest.selftest() if r["op"] == "knn"]
    assert records
    assert all(not r["ok"] and r["worst_error"] == float("inf") for r in records)
