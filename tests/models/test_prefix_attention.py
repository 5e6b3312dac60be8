from __future__ import annotations

import pytest
import torch
from tiny_llm import tiny_model

from hellm.models.llm.language_model import check_projections, prefix_key_values, run_decoder
from hellm.models.llm.prefix_attention import can_share_context, use_prefix_attention

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3")


def run(model, x, past, gate, start=4):
    return run_decoder(model, x, past, start=start, prefix_gate=gate, prefix_length=4)[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_gate_of_zero_leaves_the_model_as_it_was(kind):
    model = tiny_model(kind)
    x = torch.randn(2, 6, 16)
    # Rotary embeddings only know distances: the start does not matter.
    before, _ = run_decoder(model, x, None, start=4)
    key, value = torch.randn(2, 2, 2, 4, 16)
    use_prefix_attention(model)
    past = prefix_key_values(check_projections(model), key, value)
    torch.testing.assert_close(run_decoder(model, x, None, start=4)[0], before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(model, x, past, torch.zeros(2, 4, 1, 1)), before, rtol=1e-4, atol=1e-5)
    assert (run(model, x, past, torch.ones(2, 4, 1, 1)) - before).abs().max() > 0.01


def test_the_gated_part_is_a_softmax_of_its_own():
    model = tiny_model(num_hidden_layers=1)
    x, key, value = torch.randn(1, 3, 16), torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16)
    use_prefix_attention(model)
    attention = check_projections(model)[0]
    ((past_key, past_value),) = past = prefix_key_values([attention], key, value)
    gate = torch.randn(1, 4, 1, 1)
    seen = {}
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("output", args[0]))
    attention.q_proj.register_forward_hook(lambda _, args, output: seen.__setitem__("query", output))
    run(model, x, past, torch.zeros_like(gate), start=0)
    text = seen["output"]
    run(model, x, past, gate, start=0)
    # At position 0 the rotation is the identity, so the first query is known.
    query = seen["query"][0, 0].view(4, 4)
    for head in range(4):
        weight = (past_key[0, head // 2] @ query[head] / 2).softmax(0)
        expected = text[0, 0].view(4, 4)[head] + gate[0, head] * (weight @ past_value[0, head // 2])
        torch.testing.assert_close(seen["output"][0, 0].view(4, 4)[head], expected.flatten(), rtol=1e-4, atol=1e-5)


def test_gates_get_a_gradient_at_zero():
    model = tiny_model()
    use_prefix_attention(model)
    use_prefix_attention(model)
    gate = torch.zeros(2, 4, 1, 1, requires_grad=True)
    key, value = torch.randn(2, 1, 2, 4, 16)
    output = run(model, torch.randn(1, 6, 16), prefix_key_values(check_projections(model), key, value), gate)
    (output * torch.randn_like(output)).sum().backward()
    assert gate.grad.abs().min() > 0


def test_other_attention_is_refused():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(
        ValueError, match=r"prefix_gate needs a model with attn_implementation .*got 'eager' in LlamaForCausalLM"
    ):
        use_prefix_attention(model)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_shared_context_counts_as_a_copy_in_every_row(kind, gated):
    model = tiny_model(kind)
    use_prefix_attention(model)
    gate = {"prefix_gate": torch.randn(2, 4, 1, 1), "prefix_length": 4} if gated else {}
    key, value = torch.randn(2, 1, 2, 4, 16)
    with torch.no_grad():
        prefix = prefix_key_values(check_projections(model), key, value)
        _, context = run_decoder(model, torch.randn(1, 3, 16), prefix, start=4, **gate)
    inputs, grads = torch.randn(5, 6, 16), []
    for shared in (True, False):
        x = inputs.clone().requires_grad_()
        leaves = [tuple(part.clone().requires_grad_() for part in pair) for pair in context]
        if shared:
            hidden, kept = run_decoder(model, x, None, start=7, shared_context=leaves, **gate)
            assert kept == []
        else:
            copies = [tuple(part.expand(5, -1, -1, -1) for part in pair) for pair in leaves]
            hidden, _ = run_decoder(model, x, copies, start=7, **gate)
        flat = [part for pair in leaves for part in pair]
        grads.append([hidden.detach(), *torch.autograd.grad(hidden.square().sum(), [x, *flat])])
    for ours, copied in zip(*grads, strict=True):
        torch.testing.assert_close(ours, copied, rtol=1e-4, atol=1e-5)


def test_long_rows_and_sliding_windows_get_copies():
    model = tiny_model()
    assert not can_share_context(model, 27, 5)
    use_prefix_attention(model)
    assert can_share_context(model, 27, 5)
    assert not can_share_context(model, 27, 1000)
    model.config.sliding_window = 30
    assert not can_share_context(model, 27, 5)


def test_a_model_without_plain_attention_is_left_as_it_is_unless_needed():
    model = tiny_model()
    model.set_attn_implementation("eager")
    use_prefix_attention(model, needed=False)
    assert model.config._attn_implementation == "eager"
