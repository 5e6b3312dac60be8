"""The contrastive loss beside its published form, plain torch and, on a GPU, torch's own attentions.

N = rows, D = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import inputs
from benchmarks.ceilings import PRODUCT
from benchmarks.entries import ON_CPU, candidates, compiled, gradients, stock
from benchmarks.ops import attention
from benchmarks.registry import (
    CPU,
    DIM,
    LIMIT,
    MEMORY_CASES,
    TARGETS,
    Entry,
    MemoryCase,
    Run,
    Setup,
    Target,
    Workload,
    register,
)
from hellm import ops
from hellm.ops import reference
from hellm.ops.backends import GPU_BACKENDS
from hellm.ops.backends.gpu import MOST_COLUMNS


def info_nce_published(anchor: Tensor, positive: Tensor, temperature: float, chunk: int = 4096) -> Tensor:
    """The published loss in eager torch: exponentials of whole [chunk, N] blocks, their sums minus the diagonal.

    MMHCL: -log(e^(s12_ii / t) / (sum_j e^(s11_ij / t) + sum_j e^(s12_ij / t) - e^(s11_ii / t))), mean over rows.
    Autograd keeps every block.
    """
    first, second = F.normalize(anchor), F.normalize(positive)
    starts = range(0, len(first), chunk)
    return torch.cat([_published_block(first, second, start, chunk, temperature) for start in starts]).mean()


def info_nce_checkpointed(anchor: Tensor, positive: Tensor, temperature: float, chunk: int = 4096) -> Tensor:
    """The same with every block recomputed in backward: the low-memory form without new kernels."""
    first, second = F.normalize(anchor), F.normalize(positive)
    block = partial(checkpoint, _published_block, first, second, use_reentrant=False)
    return torch.cat([block(start, chunk, temperature) for start in range(0, len(first), chunk)]).mean()


def info_nce_unbatched(anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """The published loss over all rows at once, for torch.compile."""
    return _published_block(F.normalize(anchor), F.normalize(positive), 0, len(anchor), temperature).mean()


def _published_block(first: Tensor, second: Tensor, start: int, chunk: int, temperature: float) -> Tensor:
    within = torch.exp(first[start : start + chunk] @ first.T / temperature)
    across = torch.exp(first[start : start + chunk] @ second.T / temperature)
    own = across.diagonal(start)
    return -torch.log(own / (within.sum(1) + across.sum(1) - within.diagonal(start)))


class StripInfoNCE(torch.autograd.Function):
    """The loss with both gradients in one sweep over strips of rows, in plain torch and in place.

    With p_ij the share of key j in the denominator of row i, d loss / d s_ij = (p_ij - [j positive]) / (N t).
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, positive: Tensor, temperature: float, strip: int) -> Tensor:
        norms = [z.norm(dim=1, keepdim=True) for z in (anchor, positive)]
        first, second = anchor / norms[0], positive / norms[1]
        num_rows = len(first)
        grad_first, grad_second, loss = torch.zeros_like(first), torch.zeros_like(second), 0.0
        for start in range(0, num_rows, strip):
            stop = min(start + strip, num_rows)
            query, mine = first[start:stop], torch.arange(stop - start)
            within = (query @ first.T).div_(temperature).exp_()
            across = (query @ second.T).div_(temperature).exp_()
            within[mine, mine + start] = 0
            own = across[mine, mine + start]
            total = within.sum(1).add_(across.sum(1))
            loss -= (own / total).log().sum().item()
            within.div_(total.unsqueeze(1))
            across.div_(total.unsqueeze(1))
            across[mine, mine + start] -= 1
            grad_first[start:stop].addmm_(within, first).addmm_(across, second)
            grad_first.addmm_(within.T, query)
            grad_second.addmm_(across.T, query)
        grads = []
        for grad, unit, norm in ((grad_first, first, norms[0]), (grad_second, second, norms[1])):
            tangent = grad.sub_((grad * unit).sum(1, keepdim=True) * unit)
            grads.append(tangent.div_(norm * (temperature * num_rows)))
        ctx.save_for_backward(*grads)
        return anchor.new_tensor(loss / num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(saved * grad for saved in ctx.saved_tensors), None, None


def info_nce_strip(anchor: Tensor, positive: Tensor, temperature: float, strip: int = 512) -> Tensor:
    """`StripInfoNCE` as a function."""
    return StripInfoNCE.apply(anchor, positive, temperature, strip)


# -------------------------------------------------------------------------------------------------------- cases


def most_rows_with_truth(device: torch.device) -> int:
    """Beyond this, all pairs in float64 take longer than the measuring."""
    return 200_000 if device.type == "cuda" else 40_000


def _truth(views: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """Mean loss and both gradients in float64."""
    count, doubles = len(views[0]), {"dtype": torch.float64, "device": views[0].device}
    row_grad, t = torch.full((count,), 1.0 / count, **doubles), torch.tensor(temperature, **doubles)
    views = [v.detach().double() for v in views]
    loss, *grads, _ = reference.info_nce_with_gradients(*views, t, None, row_grad, True, "highest")
    return [loss.mean(), *grads]


def _info_nce(
    setup: Setup,
    *,
    num_rows: int = 18_357,
    dim: int = DIM,
    temperature: float = 0.2,
    kind: str = "related",
    forward_only: bool = False,
    every_peer: bool = True,
    autotuned: bool = False,
    nvrtc: bool = False,
) -> Workload:
    """Loss and both gradients. Without `every_peer` beside two attentions and the checkpointed form alone."""
    num_rows, device = setup.small(num_rows), setup.device
    views = [t.detach().to(device).requires_grad_(not forward_only) for t in inputs.views(num_rows, dim, kind=kind)]

    def run(function: Callable[..., Tensor], **settings) -> Run:
        return gradients(partial(function, temperature=temperature, **settings), views)

    def takes(backend: str, precision: str) -> bool:
        """Wider rows go to plain torch, which has one precision."""
        if backend == "torch":
            return precision == "highest"
        return backend not in GPU_BACKENDS or dim <= MOST_COLUMNS[precision == "highest"]

    # Gradients in the differences of nearly equal rows: float32 itself keeps a digit less of them.
    condition = 5 if kind in ("aligned", "collapsed") else 1
    on_gpu = {"high": condition * 2e-3, "highest": condition * 2e-5}
    ours = lambda precision: run(ops.info_nce, precision=precision)  # noqa: E731
    entries, skipped = candidates(setup, ours, on_gpu if setup.gpu else ON_CPU, nvrtc=nvrtc, takes=takes), {}
    if setup.gpu and dim + 8 <= attention.WIDEST:
        for label, attend in (("flash", attention.flash_attention), ("cuDNN", attention.cudnn_attention)):
            both = partial(attention.composite, *views, temperature, attend)
            entries.append(Entry(f"two {label} attentions (float16)", both, tolerance=2e-3))
    if setup.gpu and every_peer:
        both = partial(compiled(partial(attention.flex_composite, temperature=temperature)), *views)
        entries.append(Entry("two FlexAttentions (float16)", both, "compile", 2e-3))
    peers = []
    if every_peer:
        peers.append(("published eager, chunks of 4096", info_nce_published, "autograd keeps 2 N^2 exponentials"))
    if setup.gpu:
        peers.append(("chunks checkpointed", info_nce_checkpointed, ""))
    elif not forward_only:
        peers.append(("plain torch, strips of 512", info_nce_strip, "hand-written gradient, in place"))
    for label, function, note in peers:
        entries += stock(setup, label, partial(run, function), (2e-3, 2e-3), note="" if forward_only else note)
    label = "torch.compile, unbatched" + (", autotuned" if autotuned else "")
    mode = "max-autotune-no-cudagraphs" if autotuned else None
    at_once = every_peer and num_rows <= 40_000 and (dim, temperature) == (DIM, 0.2)
    if (at_once or autotuned) if setup.gpu else (setup.with_compile and not forward_only):
        entries += stock(setup, label, lambda: run(compiled(info_nce_unbatched, mode)), (2e-3, 2e-3), "compile")
    elif not (setup.gpu or forward_only):
        skipped[label] = "compiling takes a minute; --compile runs it"
    return Workload(
        entries,
        (4.0 if forward_only else 12.0) * num_rows**2 * dim,
        parameters={"N": num_rows, "D": dim, "temperature": temperature, "rows": kind, "dtype": "float32"},
        truth=partial(_truth, views, temperature) if num_rows <= most_rows_with_truth(device) else None,
        limit=PRODUCT,
        skipped=skipped,
    )


_on_cpu = partial(register, "Contrastive loss", _info_nce, devices=(CPU,), temperature=0.5)
_on_cpu("info_nce-users", "info_nce over the TikTok users, forward + backward", num_rows=9_308)
_on_cpu("info_nce-items", "info_nce over the TikTok items, forward + backward", num_rows=6_710)
_on_cpu("info_nce-forward", "info_nce over the TikTok users, loss only", num_rows=9_308, forward_only=True)

_add = partial(register, "Contrastive loss", _info_nce)
_add("info_nce-35598", rank=0, num_rows=35_598, nvrtc=True)
for _count in (10_000, 100_000, 50_000):
    _add(f"info_nce-{_count}", rank=0, num_rows=_count)
for _dim in (128, 256, 32):
    _add(f"info_nce-d{_dim}", dim=_dim)
for _temperature in (0.05, 1.0):
    _add(f"info_nce-t{_temperature}", temperature=_temperature)
for _kind in inputs.VIEWS[1:]:
    _add(f"info_nce-{_kind}", kind=_kind, every_peer=False)
_add("info_nce-200000", num_rows=200_000, every_peer=False)
_add("info_nce-2000", num_rows=2_000)
# Minutes of compiling.
_add("info_nce-autotuned", rank=2, every_peer=False, autotuned=True)

TARGETS += [
    Target("info_nce-users", "hellm", "published", 6.0, device=CPU),
    Target("info_nce-users", "hellm", LIMIT, 0.8, device=CPU),
    Target("info_nce-users", "hellm, medium", "published", 10.0, device=CPU),
    Target("info_nce-10000", milliseconds=0.30),
    Target("info_nce-35598", milliseconds=3.0),
    Target("info_nce-100000", milliseconds=23.0),
    Target("info_nce-35598", peer="published", factor=20),
    Target("info_nce-35598", peer="torch.compile", factor=8),
    *(Target(f"info_nce-{n}", peer="attentions", factor=1) for n in (10_000, 35_598, 50_000)),
    Target("info_nce-35598", "triton", "hellm cuda", 1 / 1.5),
    *(Target(f"info_nce-{n}", "cuda", megabytes=6 * n * DIM * 4 / 1e6) for n in (10_000, 35_598, 100_000)),
]

for _form, _entry, _count, _most in (
    ("hellm", "hellm", 36_000, 64.0),
    ("strip", "plain torch, strips of 512", 36_000, None),
    ("hellm", "hellm", 9_308, None),
    ("published", "published eager, chunks of 4096", 9_308, None),
):
    _title = "hellm info_nce, forward + backward" if _form == "hellm" else _entry
    MEMORY_CASES[f"memory-{_form}-{_count}"] = MemoryCase(_title, "info_nce-users", _entry, _count, _most)
