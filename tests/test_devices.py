from __future__ import annotations

import pytest
import torch

from hellm._devices import no_cuda_reason, resolve_device


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert no_cuda_reason() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert no_cuda_reason() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    reason = "torch sees no CUDA device: The NVIDIA driver on your system is too old (found version 11040)."
    assert no_cuda_reason() == reason
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert no_cuda_reason() == "torch sees no CUDA device"


def test_a_device_is_one_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match=r"device must be usable, got 'cuda:2' where torch sees 2 CUDA device"):
        resolve_device("cuda:2")
    for name in ("tpu", "meta", ""):
        with pytest.raises(ValueError, match=f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}'):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match=r"device must be usable, got 'cuda': torch .* is built without CUDA"):
        resolve_device("cuda")
