"""What a language model must be to rank items, tried on the loaded weights before anything is trained.

A decoder is served right where items do not see those after them, see the instruction before them, and get the hidden
states behind a context that is computed once which they get behind a copy of it in their own row. Few families promise
that in a form that can be read from their configuration, so a handful of random item tokens is sent through.

R = rows of the probe, N = tokens of the instruction, T = item tokens, W = width of the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hellm.models.llm.language_model import language_model_identity, run_without_cache, token_embedding, token_rms
from hellm.models.llm.prefix_attention import can_share_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hellm.models.llm.prompted_model import PromptedModel, SharedContext

__all__ = ["DecoderProbe", "choose_way", "probe_decoder"]

_ITEMS, _CHANGED = 4, 2
# A distance counts from this many times what the rounding of the inputs alone does to the hidden states.
_WRONG = 4.0
# A half-precision model of up to this many weights is tried as a float32 copy, where rounding hides nothing.
_MOST_COPIED = 200_000_000
_Module = TypeVar("_Module", bound=nn.Module)


class DecoderProbe(NamedTuple):
    """Inputs, and what the family itself makes of them in whole rows without a cache.

    Attributes:
        tokens: [2, T, W] random item tokens; the second row has others from the middle on.
        hidden: [2, T, W] their final hidden states behind the instruction.
        noise: relative distance that rounding of the inputs makes.
    """

    tokens: Tensor
    hidden: Tensor
    noise: float


@torch.no_grad()
def probe_decoder(language_model: PreTrainedModel, instruction: Tensor) -> DecoderProbe | None:
    """Try the language model as it came, behind the token ids `instruction` [N].

    Returns: what the ways of `PromptedModel` must agree with; None for a model without storage.
    Raises: ValueError naming the model and the reason, one that cannot rank items.
    """
    if any(parameter.is_meta for parameter in language_model.parameters()):
        return None
    draw = torch.Generator().manual_seed(0)
    with _trial(language_model) as model:
        embedding = token_embedding(model)
        text = embedding(instruction.to(embedding.weight.device))
        scale = token_rms(model)
        items = scale * torch.randn(2, _ITEMS, text.shape[1], generator=draw).to(text)
        items[1, :_CHANGED] = items[0, :_CHANGED]
        rows = torch.stack([torch.cat([text, row]) for row in (*items, items[0], items[0])])
        rows[2, : len(text)] = scale * torch.randn(text.shape, generator=draw).to(text)
        rounding = torch.finfo(text.dtype).eps
        rows[3] *= 1 + rounding * (2 * torch.rand(rows[3].shape, generator=draw).to(text) - 1)
        try:
            hidden = run_without_cache(model, rows)
        except Exception as error:
            raise _refusal(language_model, f"it cannot be run on item tokens ({_first_line(error)})") from error
    if hidden.shape != rows.shape:
        raise _refusal(
            language_model, f"it takes tokens of width {rows.shape[2]} and gives hidden states of {hidden.shape[2]}"
        )
    if not torch.isfinite(hidden).all():
        raise _refusal(language_model, f"it gives hidden states that are not finite in {text.dtype}")
    noise = max(_WRONG * rounding, _distance(hidden[3], hidden[0]))
    kept = len(text) + _CHANGED
    if _distance(hidden[1, :kept], hidden[0, :kept]) > _WRONG * noise:
        raise _refusal(language_model, "it is not causal: items see the items after them")
    if _distance(hidden[2, len(text) :], hidden[0, len(text) :]) <= rounding:
        raise _refusal(language_model, "its items do not see the instruction before them")
    return DecoderProbe(items, hidden[:2, len(text) :], noise)


@torch.no_grad()
def choose_way(prompted: PromptedModel, probe: DecoderProbe) -> str:
    """The fastest way of `prompted` through its language model that agrees with `probe`: see `PromptedModel`.

    Raises: ValueError naming the model and the reason, where the prefix of `prompted` cannot go that way.
    """
    with _trial(prompted) as trial:
        context = None
        try:
            trial.way = "cached"
            context = trial.shared_context(with_prefix=False)
        except Exception as error:  # whatever a family raises where it cannot do this
            why = _first_line(error)
        else:
            why = _disagreement(trial, "cached", context, probe)
        if context is not None and why is None:
            shares = can_share_context(trial.base, context.num_cached, _ITEMS)
            way = "shared" if shares and _disagreement(trial, "shared", context, probe) is None else "cached"
        elif prompted.prefix is None:
            return "whole"
        else:
            raise _refusal(prompted.base, f"a prefix needs keys and values that can be cached ({why})")
        if prompted.prefix is not None:
            trial.way = way
            _check_prefix(trial, probe)
    return way


def _disagreement(prompted: PromptedModel, way: str, context: SharedContext, probe: DecoderProbe) -> str | None:
    """How the hidden states of a way differ from those of whole rows; None where they do not."""
    prompted.way = way
    try:
        hidden = prompted.after_context(context, probe.tokens, with_prefix=False)
    except Exception as error:
        return _first_line(error)
    apart = _distance(hidden, probe.hidden)
    return None if apart <= _WRONG * probe.noise else f"they change hidden states by {apart:.2g} of their length"


def _check_prefix(prompted: PromptedModel, probe: DecoderProbe) -> None:
    """Try the prefix of `prompted`, whose way is set, with all its gates open.

    Raises: ValueError naming the model and the reason.
    """
    gate = prompted.prefix_gate
    tokens = probe.tokens
    rounding = torch.finfo(token_embedding(prompted.base).weight.dtype).eps
    draw = torch.Generator().manual_seed(0)
    rounded = tokens * (1 + rounding * (2 * torch.rand(tokens.shape, generator=draw).to(tokens) - 1))
    try:
        if gate is not None:
            gate.copy_(0.5 + torch.rand(gate.shape, generator=draw))
        together, alone = _together(prompted, tokens), _alone(prompted, tokens)
        noise = max(probe.noise, _distance(_together(prompted, rounded), together))
        if gate is not None:
            gate.zero_()
        shut = _together(prompted, tokens) if gate is not None else None
    except Exception as error:
        raise _refusal(prompted.base, f"its attention takes no prefix ({_first_line(error)})") from error
    if _distance(together, alone) > _WRONG * noise:
        raise _refusal(prompted.base, "items get other hidden states behind a prefix in a batch than alone")
    if not prompted.has_response and _distance(*together[:, :_CHANGED]) > _WRONG * noise:
        raise _refusal(prompted.base, "it is not causal behind a prefix: items see the items after them")
    if shut is not None and torch.equal(shut, together):
        raise _refusal(
            prompted.base,
            "the gate of a prefix has no effect on its attention; set prefix_gate to False, or graph_context to "
            '"causal" and learned_prefix to False',
        )


def _together(prompted: PromptedModel, tokens: Tensor) -> Tensor:
    """Final hidden states behind the prefix, of the second row's first items only where there is a response."""
    if not prompted.has_response:
        return prompted.after_context(prompted.shared_context(), tokens)
    used = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    used[1, _CHANGED:] = False
    return prompted.after_response(_gram(prompted).expand(2, -1, -1), tokens, used)


def _alone(prompted: PromptedModel, tokens: Tensor) -> Tensor:
    """The same, row by row, without padding and with copies of the context."""
    rows = [row.unsqueeze(0) for row in tokens]
    if prompted.has_response:
        rows[1] = rows[1][:, :_CHANGED]
        used = [torch.ones(row.shape[:2], dtype=torch.bool, device=row.device) for row in rows]
        return torch.cat([prompted.after_response(_gram(prompted), *one) for one in zip(rows, used, strict=True)])
    prompted.way, way = "cached", prompted.way
    context = prompted.shared_context()
    hidden = torch.cat([prompted.after_context(context, row) for row in rows])
    prompted.way = way
    return hidden


def _gram(prompted: PromptedModel) -> Tensor:
    assert prompted.prefix is not None and prompted.prefix.gram_input is not None  # there is a response
    width = prompted.prefix.gram_input.width
    return torch.randn(1, width, width, generator=torch.Generator().manual_seed(1)).to(prompted.instruction.device)


@contextlib.contextmanager
def _trial(module: _Module) -> Iterator[_Module]:
    """`module` in evaluation mode, or a float32 copy of it where it is small and of half precision."""
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters())
    if half and sum(parameter.numel() for parameter in module.parameters()) <= _MOST_COPIED:
        yield copy.deepcopy(module).float().eval()
        return
    training = [part for part in module.modules() if part.training]
    kept = {name: value.detach().clone() for name, value in module.named_parameters() if name == "prefix_gate"}
    way = getattr(module, "way", None)
    module.eval()
    try:
        yield module
    finally:
        for part in training:
            part.training = True
        for name, value in kept.items():
            getattr(module, name).data.copy_(value)
        if way is not None:
            module.way = way


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest distance of two hidden states of the same place, in lengths of the second."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())


def _refusal(model: PreTrainedModel, reason: str) -> ValueError:
    identity = language_model_identity(model)
    return ValueError(f"language model {identity['name']} ({type(model).__name__}) cannot rank items: {reason}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
