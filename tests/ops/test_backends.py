"""Choosing a backend, what is said when it cannot run, and the self-test."""

from __future__ import annotations

import importlib
import itertools
import sys
import threading
import types

import pytest
import torch
from op_cases import INSTRUCTION_SETS, needs_native, rows

from hellm import Hypergraph, ops, selftest
from hellm.ops import backends, reference
from hellm.ops.backends import loaders, nvrtc


def test_backend_refuses_an_unknown_name():
    with (
        pytest.raises(ValueError, match=r"backend must be one of \('native', .*, 'triton', 'torch'\), got 'none'"),
        ops.backend("none"),
    ):
        pass


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), ops.backend("torch"):
        assert backends.select(torch.device("cpu")).name == "torch"
        raise KeyError
    with ops.backend("torch"), pytest.raises(KeyError), ops.backend("native"):
        raise KeyError
    assert backends.select(torch.device("cpu")).name == ("native" if INSTRUCTION_SETS else "torch")


@needs_native
def test_gradients_come_from_the_backend_of_the_forward_pass(monkeypatch):
    x = rows(9, 4).requires_grad_()
    with ops.backend("torch"):
        loss = ops.info_nce(x, x + 1, reduction="none").sum()
    used, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda device: used.append(select(device)) or used[-1])
    # As autograd does it for a GPU.
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert [one.name for one in used] == ["torch"] and x.grad is not None


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(loaders, "native", lambda: ImportError("undefined symbol: nothing"))


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
    loaders.native.cache_clear()
    try:
        assert isinstance(loaders.native(), ImportError)
        assert "hellm._C cannot be loaded" in backends.BACKENDS["native"].unavailable(torch.device("cpu"))
    finally:
        monkeypatch.undo()
        loaders.native.cache_clear()


@needs_native
def test_native_has_no_kernels_for_other_devices():
    reason = 'it serves the CPU, not cuda; on NVIDIA GPUs the compiled kernels are "cuda" and "nvrtc"'
    assert backends.BACKENDS["native"].unavailable(torch.device("cuda")) == reason
    assert backends.BACKENDS["torch"].unavailable(torch.device("cuda")) is None
    assert backends.select(torch.device("cuda")).name == "torch"


def test_an_operator_without_a_kernel_is_computed_in_plain_torch():
    plain, x = backends.BACKENDS["torch"], rows(9, 4)
    assert not hasattr(plain, "knn") and plain.verified(torch.device("cuda")) and plain.available(torch.device("mps"))
    with ops.backend("torch"):
        found = ops.knn(x, 3)
    assert torch.equal(found[0], reference.knn(x, 3)[0])


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
    before = loaders.native().instruction_set() if INSTRUCTION_SETS else None
    records = selftest.selftest()
    kernels = {(r["backend"], r["instruction_set"]) for r in records}
    assert kernels == {*(("native", name) for name in INSTRUCTION_SETS), ("torch", None)}
    assert {r["op"] for r in records} == {
        "hypergraph_conv", "incidence_product", "bipartite_propagate", "info_nce", "item_cross_entropy", "knn"
    }  # fmt: skip
    assert [r for r in records if not r["ok"]] == []
    assert all(0 <= r["worst_error"] <= r["budget"] and r["seconds"] >= 0 for r in records)
    assert before is None or loaders.native().instruction_set() == before


def test_selftest_of_a_backend_in_a_process_of_its_own(monkeypatch):
    script = 'import sys; print(chr(123) + \'"op": "knn", "ok": true\' + chr(125)); print(\'{"op"\')'
    for end, message in (
        ("; sys.stdout.flush(); __import__('os').abort()", "exit status -6: "),
        ("; sys.stdout.flush(); __import__('time').sleep(60)", "not done after 3 s"),
    ):
        monkeypatch.setattr(selftest, "_COMMAND", [sys.executable, "-c", script + end])
        done, failed = selftest._apart("knn", [], 3.0)
        assert done == {"op": "knn", "ok": True}
        assert failed["op"] == "knn" and not failed["ok"] and failed["failure"].startswith(message)
    monkeypatch.setattr(selftest, "_COMMAND", [sys.executable, "-c", ""])
    silent = selftest.isolated("cuda", "cuda", 60.0)
    assert [row["op"] for row in silent] == list(dict.fromkeys(case.op for case in selftest._cases("large")))
    assert {row["failure"] for row in silent} == {"it printed nothing"} and not any(row["ok"] for row in silent)
    assert selftest._apart("knn", [], -1.0)[0]["failure"] == "not done after 0 s"


def test_selftest_command_prints_the_records_of_a_backend():
    records = selftest.isolated("torch", "cpu", 120.0, "small")
    assert {r["op"] for r in records} == {case.op for case in selftest._cases("small")}
    assert all(r["ok"] for r in records)


def test_selftest_covers_hubs_wide_rows_and_both_precisions():
    cases = selftest._cases("large")
    losses = {case.name for case in cases if case.op == "info_nce"}
    for num_rows, dim, precision in itertools.product((97, 1500), (64, 67, 200), ("highest", "high")):
        assert {f"N {num_rows}, D {dim}, {precision}", f"N {num_rows}, D {dim}, {precision}, some rows"} <= losses
    assert any("hub of 5000" in case.name for case in cases if case.op == "hypergraph_conv")


def test_selftest_sees_a_loss_that_is_wrong_at_one_precision(monkeypatch):
    file = sys.modules["hellm.ops.info_nce"]
    right = file.info_nce

    def wrong(*args, precision, **settings):
        return right(*args, precision=precision, **settings) * (1.02 if precision == "high" else 1.0)

    monkeypatch.setattr(file, "info_nce", wrong)
    with ops.backend("torch"):
        failed = [r for r in selftest._check_all("cpu", "small") if not r["ok"]]
    assert {(r["op"], r["dtype"]) for r in failed} >= {("info_nce", "float32"), ("info_nce", "float64")}
    assert all("high" in r["case"] and "highest" not in r["case"] for r in failed)


def test_selftest_reports_a_wrong_result(monkeypatch):
    file = sys.modules["hellm.ops.incidence_product"]
    right = file.incidence_product
    monkeypatch.setattr(file, "incidence_product", lambda x, graph, **settings: right(x, graph, **settings) * 1.5)
    assert {r["op"] for r in selftest.selftest() if not r["ok"]} == {"incidence_product"}


def test_selftest_reports_an_operator_that_raises(no_extension, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(sys.modules["hellm.ops.knn"], "knn", broken)
    records = [r for r in selftest.selftest() if r["op"] == "knn"]
    assert {r["failure"] for r in records} == {"RuntimeError: no such kernel"}
    assert all(not r["ok"] and r["worst_error"] == float("inf") for r in records)


@pytest.fixture
def gpu_of(monkeypatch):
    """Makes every CUDA device one of the given architecture, with an extension that has GPU kernels."""

    def pretend(architecture: str):
        monkeypatch.setattr(loaders, "architecture", lambda device: architecture if device.type == "cuda" else None)
        monkeypatch.setattr(loaders, "native", lambda: types.SimpleNamespace(cuda_architectures=lambda: "80, 90"))

    return pretend


@pytest.mark.parametrize("name", ["cuda", "triton", "nvrtc"])
def test_gpu_that_is_too_old_says_what_is_needed_and_what_was_found(gpu_of, monkeypatch, name):
    gpu_of("sm_75")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(loaders, "triton", lambda: types.SimpleNamespace(INTERPRETED=False))
    reason = "the kernels need compute capability sm_80 or newer, cuda:1 has sm_75"
    assert backends.BACKENDS[name].unavailable(torch.device("cuda:1")) == reason
    assert backends.select(torch.device("cuda:1")).name == "torch"
    with ops.backend(name), pytest.raises(RuntimeError, match=f"backend {name!r} cannot run on cuda:1: {reason}"):
        backends.select(torch.device("cuda:1"))


def test_without_cupy_or_triton_the_next_backend_serves(gpu_of, monkeypatch):
    gpu_of("sm_90")
    monkeypatch.setattr(backends.GpuBackend, "unverified", lambda self, device: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(loaders, "triton", lambda: ImportError("No module named 'triton'"))
    assert backends.select(torch.device("cuda")).name == "cuda"
    monkeypatch.setattr(loaders, "native", lambda: types.SimpleNamespace(cuda_architectures=lambda: ""))
    assert "HELLM_CUDA=ON" in backends.BACKENDS["cuda"].unavailable(torch.device("cuda"))
    for cuda, extra in (("13.0", "cuda13"), ("12.8", "cuda12")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert (
            backends.BACKENDS["nvrtc"]
            .unavailable(torch.device("cuda"))
            .endswith(f'is not installed: pip install "hellm[{extra}]"')
        )
    assert (
        backends.BACKENDS["triton"].unavailable(torch.device("cuda"))
        == "Triton cannot be loaded: No module named 'triton'"
    )
    assert backends.select(torch.device("cuda")).name == "torch"


@pytest.mark.parametrize(
    ("built", "architecture", "usable"),
    [
        ("90", "sm_90", True),
        ("90a", "sm_90", True),
        ("80, 86", "sm_89", True),
        ("80, 90", "sm_100", False),
        ("90", "sm_86", False),
        ("80+PTX, 90", "sm_120", True),
        ("90+PTX", "sm_86", False),
    ],
)
def test_an_extension_built_for_other_gpus_is_refused(gpu_of, monkeypatch, built, architecture, usable):
    gpu_of(architecture)
    monkeypatch.setattr(loaders, "native", lambda: types.SimpleNamespace(cuda_architectures=lambda: built))
    reason = f"the extension was built for compute capability {built}, cuda:0 has {architecture}"
    assert backends.BACKENDS["cuda"].unavailable(torch.device("cuda:0")) == (None if usable else reason)


def test_cupy_that_cannot_be_imported_is_not_usable(gpu_of, monkeypatch):
    gpu_of("sm_90")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cupy", None)
    nvrtc.cupy_failure.cache_clear()
    try:
        assert (
            backends.BACKENDS["nvrtc"]
            .unavailable(torch.device("cuda"))
            .startswith("CuPy cannot be imported: ModuleNotFoundError")
        )
    finally:
        nvrtc.cupy_failure.cache_clear()


def test_devices_may_not_be_mixed():
    x, graph = rows(4, 2), Hypergraph(torch.tensor([[0, 3], [0, 0]]))
    elsewhere = x.to("meta")
    for call, message in (
        (lambda: ops.info_nce(x, elsewhere), "positive must be on cpu like anchor, got meta"),
        (lambda: ops.info_nce(x, x, rows=elsewhere[:, 0].long()), "rows must be on cpu like anchor, got meta"),
        (lambda: ops.info_nce(x, x, elsewhere[0, 0]), "temperature must be on cpu like anchor, got meta"),
        (lambda: ops.hypergraph_conv(elsewhere, graph), "hypergraph must be on meta like x, got cpu"),
        (lambda: ops.item_cross_entropy(x, x, elsewhere[:, 0].long()), "target must be on cpu like hidden, got meta"),
        (lambda: ops.bipartite_propagate(x, elsewhere[:1], graph), "item_x must be on cpu like user_x, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
