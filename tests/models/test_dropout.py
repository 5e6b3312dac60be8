from __future__ import annotations

import pytest
import torch

from hellm.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_drops_the_share_asked_for_and_keeps_the_mean(p):
    x = torch.ones(400, 1001, requires_grad=True)
    y = Dropout(p)(x)
    kept = y != 0
    # Six standard deviations of a share of 400,400 draws.
    assert abs(kept.float().mean().item() - (1 - p)) < 6 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
    # Neighbours share a draw of 64 bits, but not their fate.
    pairs = kept.flatten()[:-1] & kept.flatten()[1:]
    assert abs(pairs.float().mean().item() - (1 - p) ** 2) < 0.01


def test_follows_the_seed():
    x = torch.ones(3, 5)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(torch.stack([Dropout(0.5)(x) for _ in range(8)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_shape_and_dtype(dtype):
    for shape in ((), (0, 3), (2, 1, 3)):
        y = Dropout(0.5)(torch.ones(shape, dtype=dtype))
        assert y.shape == shape
        assert y.dtype == dtype


def test_is_the_identity_out_of_training_or_at_zero():
    x = torch.randn(3, 5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
