"""Stage 2 on a GPU: the same losses as on the CPU, bfloat16, fused updates, no waiting, a run and its resumption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hellm.config import LLMConfig
from hellm.training.finetune import (
    build_history_sampler,
    build_optimizer,
    build_recommender_llm,
    finetune,
    finetune_loss,
    load_item_inputs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]
MODELS = {
    "causal": {},
    "learned-prefix": {"learned_prefix": True},
    "prefix": {"graph_context": "prefix", "learned_prefix": True},
    "one-softmax": {"graph_context": "prefix", "learned_prefix": True, "prefix_gate": False},
    "titles": {"titles": True},
    "residual": {"sequence_residual": True},
}
models = pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)


@pytest.fixture
def build(config, small_dataset, runs):
    """Settings of the model -> (config, model on the CPU with every gate open, first batch)."""

    def build(settings):
        own = replace(config, model=LLMConfig(**settings), device="cuda")
        torch.manual_seed(0)
        model = build_recommender_llm(own, small_dataset, load_item_inputs(own, small_dataset, **runs)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return own, model, build_history_sampler(own, small_dataset, model).sample(0, 0)

    return build


def loss_and_gradients(model, batch, dtype=None):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = finetune_loss(model, batch)
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@models
def test_losses_and_gradients_are_those_of_the_cpu(build, settings):
    _, model, batch = build(settings)
    expected, gradients = loss_and_gradients(model, batch)
    found, on_gpu = loss_and_gradients(model.to("cuda"), batch)
    assert found == pytest.approx(expected, rel=1e-4)
    assert on_gpu.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(on_gpu[name], gradient, rtol=1e-2, atol=1e-4, msg=name)


@models
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_steps_are_close_and_train_float32(build, settings, weights):
    _, model, batch = build(settings)
    model.to("cuda")
    expected, _ = loss_and_gradients(model, batch)
    for parameter in model.prompted.base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(weights)
    found, gradients = loss_and_gradients(model, batch, torch.bfloat16)
    assert found == pytest.approx(expected, rel=0.05)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


@models
def test_step_waits_only_to_check_its_targets(build, settings, monkeypatch):
    if "titles" in settings:
        pytest.skip("the longest titled history of a batch is asked of the device")
    config, model, batch = build(settings)
    model.to("cuda").train()
    optimizer = build_optimizer(config, model)
    assert optimizer.defaults["fused"]
    monkeypatch.setattr("hellm.ops._readable", lambda x: False)

    def step():
        finetune_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_run_and_its_resumption(config, small_dataset, runs, tmp_path):
    for device, epochs in (("cuda", 1), ("cuda", 2), ("cpu", 3)):
        own = replace(config, device=device, max_epochs=epochs)
        result = finetune(own, small_dataset, tmp_path / "run", resume=epochs > 1, **runs)
        assert result["num_epochs"] == epochs and result["test"]["recall@5"] > 0
