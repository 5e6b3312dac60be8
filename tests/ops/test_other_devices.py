"""Devices that no kernel was written for get plain torch."""

from __future__ import annotations

import pytest
import torch

from hellm.ops import backends

OPERATORS = [
    "incidence_product",
    "hypergraph_conv",
    "bipartite_propagate",
    "info_nce",
    "info_nce_backward",
    "item_cross_entropy",
    "item_cross_entropy_backward",
    "knn",
]


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1", "Meta"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_kernel(operator, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hellm::{operator}", key)


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "mtia"])
def test_plain_torch_is_chosen(device):
    assert backends.select(torch.device(device)).name == "torch"


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_follows_autocast(operator, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hellm::{operator}", key)


def test_a_backend_that_was_asked_for_says_that_it_cannot():
    with (
        backends.backend("native"),
        pytest.raises(RuntimeError, match="'native' cannot run on mps: it serves the CPU"),
    ):
        backends.select(torch.device("mps"))
