"""Calls of the CUDA kernels: allocate outputs and workspace, pass addresses, sizes, a dtype code.

The same launch plans drive the kernels that nvcc compiled into the extension ("cuda") and those that NVRTC compiles at
first use ("nvrtc"). Nothing waits for the device. What the kernels do not take is computed in plain torch by blocks.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hellm.ops._arguments import checked
from hellm.ops._dtypes import accumulation_dtype
from hellm.ops.backends import loaders
from hellm.ops.backends._backend import GpuBackend, no_nvidia_gpu, too_old
from hellm.ops.backends._pointers import DTYPE_CODE, addresses, like
from hellm.ops.bipartite_propagate import PropagateArguments
from hellm.ops.hypergraph_conv import ConvArguments
from hellm.ops.incidence import RowSchedule
from hellm.ops.incidence_product import ProductArguments
from hellm.ops.info_nce import InfoNCEGradientArguments
from hellm.ops.info_nce import by_blocks as info_nce_by_blocks
from hellm.ops.item_cross_entropy import CrossEntropyGradientArguments
from hellm.ops.item_cross_entropy import by_blocks as item_cross_entropy_by_blocks
from hellm.ops.knn import KnnArguments, by_panels

# As in csrc/cuda/knn.cuh.
MOST_NEIGHBOURS, MOST_SCANNED = 128, 32
# Columns the kernels of the losses take, by whether products have float32 accuracy.
MOST_COLUMNS = {True: 128, False: 256}
# Half of the 50 MB of cache of an H100, whose two halves are not equally near.
_CACHE_BYTES = 24 * 2**20

Launch = Callable[[str, tuple[Any, ...], torch.device], None]


def _address_schedule(schedule: RowSchedule) -> tuple[int, ...]:
    row_order, hub_chunk_begin, num_long, num_hub_chunks = schedule
    return *addresses(row_order, hub_chunk_begin), hub_chunk_begin.numel() - 1, num_long, num_hub_chunks


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors of a device: the work of the losses is dealt to the blocks that they hold."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory of each of them; where torch does not say, what every one since sm_80 has."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 100 * 1024)


class Gpu(GpuBackend):
    """The operators through one way to run a launch plan.

    Args:
        launch: (name of a plan, its arguments, device) -> None.
        processors: device -> streaming multiprocessors.
        shared_bytes: device -> shared memory of each.
        cache_bytes: larger tables of convolution and propagation are worked through by slabs of columns.
    """

    def __init__(
        self,
        launch: Launch,
        processors: Callable[[torch.device], int] = processors_of,
        shared_bytes: Callable[[torch.device], int] = shared_bytes_of,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._launch, self._processors = launch, processors
        self._shared_bytes, self._cache_bytes = shared_bytes, cache_bytes

    @checked(ProductArguments)
    def incidence_product(self, a: ProductArguments) -> Tensor:
        x, schedule = a.x, a.matrix.schedule
        out = x.new_empty(a.indptr.numel() - 1, x.shape[1])
        workspace = x.new_empty(a.num_hub_chunks, x.shape[1], dtype=accumulation_dtype(x))
        tensors = (x, a.indptr, a.indices, *like(x, a.values), out, workspace)
        arguments = (*addresses(*tensors), _address_schedule(schedule), *out.shape, DTYPE_CODE[x.dtype])
        self._launch("incidence_product", arguments, x.device)
        return out

    @checked(ConvArguments)
    def hypergraph_conv(self, a: ConvArguments) -> Tensor:
        """Layers in between are stored in the accumulation dtype."""
        x = a.x
        if a.num_layers == 0:
            return x.clone()
        factors = like(x, a.vertex_values, a.edge_values, a.in_scale, a.edge_scale, a.out_scale, a.diagonal)
        out = torch.empty_like(x)
        schedules = (_address_schedule(a.vertex_schedule), _address_schedule(a.edge_schedule))
        sizes = (x.shape[0], a.edge_indptr.numel() - 1, x.shape[1], a.num_layers, DTYPE_CODE[x.dtype])
        num_bytes = loaders.extension().hypergraph_conv_workspace(*schedules, self._cache_bytes, *sizes)
        workspace = x.new_empty(num_bytes, dtype=torch.uint8)
        tensors = (x, a.vertex_indptr, a.vertex_edges, a.edge_indptr, a.edge_vertices, *factors, out, workspace)
        arguments = (*addresses(*tensors), *schedules, self._cache_bytes, *sizes)
        self._launch("hypergraph_conv", arguments, x.device)
        return out

    @checked(PropagateArguments)
    def bipartite_propagate(self, a: PropagateArguments) -> tuple[Tensor, Tensor]:
        """Layers in between are stored in the accumulation dtype."""
        user_x, item_x = a.user_x, a.item_x
        if a.num_layers == 0:
            return user_x.clone(), item_x.clone()
        scales = like(user_x, a.user_scale, a.item_scale)
        user_out, item_out = torch.empty_like(user_x), torch.empty_like(item_x)
        schedules = (_address_schedule(a.vertex_schedule), _address_schedule(a.edge_schedule))
        sizes = (user_x.shape[0], item_x.shape[0], user_x.shape[1], a.num_layers, DTYPE_CODE[user_x.dtype])
        num_bytes = loaders.extension().bipartite_propagate_workspace(*schedules, self._cache_bytes, *sizes)
        workspace = user_x.new_empty(num_bytes, dtype=torch.uint8)
        csr = (a.vertex_indptr, a.vertex_edges, a.edge_indptr, a.edge_vertices)
        tensors = (user_x, item_x, *csr, *scales, user_out, item_out, workspace)
        arguments = (*addresses(*tensors), *schedules, self._cache_bytes, *sizes)
        self._launch("bipartite_propagate", arguments, user_x.device)
        return user_out, item_out

    @checked(InfoNCEGradientArguments)
    def info_nce(self, a: InfoNCEGradientArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ "high" and "medium" multiply float16 and accumulate float32; "highest" has float32 accuracy.

        float64 rows, and rows wider than 256 columns (128 for "highest"), go to plain torch by blocks.
        """
        anchor, positive, temperature = a.anchor, a.positive, a.temperature
        num_keys, dim = anchor.shape
        num_rows = num_keys if a.rows is None else a.rows.numel()
        highest = a.precision == "highest"
        if anchor.dtype == torch.float64 or dim > MOST_COLUMNS[highest] or dim == 0 or num_rows == 0:
            return info_nce_by_blocks(a)
        rows = None if a.rows is None else a.rows.to(torch.int64)
        (row_grad,), gradients = like(anchor, a.row_grad), a.row_grad is not None
        on_device = temperature.to(torch.float64)
        row_order = row_begin = None
        if rows is not None and gradients:
            row_order, row_begin = _rows_by(rows, num_keys)
        row_loss = anchor.new_empty(num_rows, dtype=torch.float32)
        # d loss / d (1 / temperature) of each row, already times row_grad.
        row_slope = anchor.new_empty(num_rows if gradients else 0, dtype=torch.float32)
        grad_anchor, grad_positive = (torch.empty_like(t) if gradients else t.new_empty(0) for t in (anchor, positive))
        held = self._processors(anchor.device), self._shared_bytes(anchor.device)
        settings = (a.intra_view_negatives, highest, *held, DTYPE_CODE[anchor.dtype])
        num_bytes = loaders.extension().info_nce_workspace(num_keys, num_rows, dim, gradients, *settings)
        workspace = anchor.new_empty(num_bytes, dtype=torch.uint8)
        written = (row_loss, grad_anchor, grad_positive, row_slope, workspace)
        tensors = (anchor, positive, rows, row_order, row_begin, row_grad, *written)
        arguments = (*addresses(*tensors), num_keys, num_rows, dim, *addresses(on_device), *settings)
        self._launch("info_nce", arguments, anchor.device)
        if not gradients:
            return row_loss, grad_anchor, grad_positive, temperature.new_empty(0)
        slope = -row_slope.sum(dtype=torch.float64) / on_device**2
        return row_loss, grad_anchor, grad_positive, slope.to(temperature.dtype)

    @checked(CrossEntropyGradientArguments)
    def item_cross_entropy(self, a: CrossEntropyGradientArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Products as in `info_nce`, of float32 rows by `torch.get_float32_matmul_precision()`; so are the limits."""
        hidden, items, target, bias = a.hidden, a.item_embedding, a.target, a.bias
        highest = hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        (num_rows, dim), num_items = hidden.shape, items.shape[0]
        if hidden.dtype == torch.float64 or dim > MOST_COLUMNS[highest] or dim == 0 or num_rows == 0:
            return item_cross_entropy_by_blocks(a)
        values, row_grad = like(hidden, bias, a.row_grad)
        hidden_grad, items_grad = a.hidden_grad and row_grad is not None, a.items_grad and row_grad is not None
        row_order = row_begin = None
        if items_grad:
            row_order, row_begin = _rows_by(target, num_items)
        row_loss = hidden.new_empty(num_rows, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if hidden_grad else None
        grad_items = torch.empty_like(items) if items_grad else None
        grad_bias = row_loss.new_empty(num_items) if items_grad and bias is not None else None
        held = self._processors(hidden.device), self._shared_bytes(hidden.device)
        settings = (highest, *held, DTYPE_CODE[hidden.dtype])
        sizes = (num_rows, num_items, dim)
        num_bytes = loaders.extension().item_cross_entropy_workspace(*sizes, hidden_grad, items_grad, *settings)
        workspace = hidden.new_empty(num_bytes, dtype=torch.uint8)
        grads = (grad_hidden, grad_items, grad_bias)
        tensors = (hidden, items, target, row_order, row_begin, values, row_grad, row_loss, *grads, workspace)
        self._launch("item_cross_entropy", (*addresses(*tensors), *sizes, *settings), hidden.device)
        alike = (hidden, items, row_loss if bias is None else bias)
        of_hidden, of_items, of_bias = (
            t.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(grads, alike, strict=True)
        )
        return row_loss, of_hidden, of_items, of_bias

    @checked(KnnArguments)
    def knn(self, a: KnnArguments) -> tuple[Tensor, Tensor]:
        """Products of float16 choose candidates; sums in float64 rank them.

        float64 rows and k > 128 go to panels of torch products, exact to what its float32 matmul precision says.
        """
        x, k = a
        if x.dtype == torch.float64 or k > MOST_NEIGHBOURS or x.shape[1] == 0:
            return by_panels(a)
        scanned = k <= MOST_SCANNED and x.shape[1] <= MOST_COLUMNS[False]
        return self._knn_by_scan(x, k) if scanned else self._knn_by_panels(x, k)

    def _knn_by_scan(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of narrow rows, whose panels would take longer to store and read than to make."""
        (num_rows, dim), device = x.shape, x.device
        index = x.new_empty(num_rows, k, dtype=torch.int64)
        similarity = x.new_empty(num_rows, k, dtype=torch.float32)
        settings = (num_rows, dim, k, self._processors(device), self._shared_bytes(device), DTYPE_CODE[x.dtype])
        workspace = x.new_empty(loaders.extension().knn_scan_workspace(*settings), dtype=torch.uint8)
        self._launch("knn_scan", (*addresses(x, index, similarity, workspace), *settings), device)
        return index, similarity

    def _knn_by_panels(
        self, x: Tensor, k: int, *, panel_bytes: int = 24 * 2**20, fewest_rows: int = 512
    ) -> tuple[Tensor, Tensor]:
        """A panel stays in cache where that leaves it enough rows for a fast product, and for few launches.

        4 N bytes for each of 512 rows are 195 MiB for N = 100,000.
        """
        (num_rows, dim), device = x.shape, x.device
        padded_rows, padded_dim = (-(-size // 8) * 8 for size in (num_rows, dim))
        unit = x.new_empty(padded_rows, padded_dim, dtype=torch.float16)
        inverse_norm = x.new_empty(num_rows, dtype=torch.float64)
        crowded = x.new_empty(num_rows, dtype=torch.int32)
        index = x.new_empty(num_rows, k, dtype=torch.int64)
        similarity = x.new_empty(num_rows, k, dtype=torch.float32)
        sizes, code = (num_rows, dim), DTYPE_CODE[x.dtype]
        self._launch("knn_unit", (*addresses(x, unit, inverse_norm), *sizes, code), device)
        panel_rows = max(fewest_rows, panel_bytes // (4 * padded_rows) // 64 * 64)
        product = _products_with(unit)
        with _float32_sums():
            for start in range(0, num_rows, panel_rows):
                panel = product(start, min(start + panel_rows, num_rows))
                tensors = (x, inverse_norm, panel, index, similarity, crowded)
                self._launch("knn_select", (*addresses(*tensors), *sizes, k, start, len(panel), code), device)
        tensors = (x, inverse_norm, crowded, index, similarity)
        self._launch("knn_crowded", (*addresses(*tensors), *sizes, k, code), device)
        return index, similarity


class Cuda(Gpu):
    """The kernels that nvcc compiled into the extension."""

    name = "cuda"

    def __init__(self) -> None:
        super().__init__(launch_compiled)

    def unavailable(self, device: torch.device) -> str | None:
        reason = no_nvidia_gpu(device)
        if reason is not None:
            return reason
        if isinstance(loaders.native(), ImportError):
            return f"the compiled extension hellm._C cannot be loaded: {loaders.native()}"
        built = loaders.extension().cuda_architectures()
        if not built:
            return (
                "the extension was built without GPU kernels; building it where nvcc is, with HELLM_CUDA=ON, adds them"
            )
        found = loaders.architecture(device)
        capability = None if found is None else int(found.removeprefix("sm_"))
        if capability is not None and not any(_runs_on(entry, capability) for entry in built.split(", ")):
            return too_old(device) or f"the extension was built for compute capability {built}, {device} has {found}"
        return too_old(device)


def launch_compiled(plan: str, arguments: tuple[Any, ...], device: torch.device) -> None:
    """Run a launch plan with the kernels in the extension, on the current stream of a device.

    The extension makes the device the current one of this thread; afterwards it is again what it was.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        getattr(loaders.extension(), f"cuda_{plan}")(*arguments, torch.cuda.current_device(), stream)


def _runs_on(entry: str, capability: int) -> bool:
    """Whether a GPU (90 for sm_90) runs what was compiled for an entry like "90", "90a" or "80+PTX"."""
    number = int(re.split(r"\D", entry, maxsplit=1)[0])
    # A later GPU of the same generation runs the machine code, any later one what it can compile from PTX.
    return number <= capability and (entry.endswith("+PTX") or number // 10 == capability // 10)


def _products_with(unit: Tensor) -> Callable[[int, int], Tensor]:
    """(start, stop) -> unit[start:stop] unit^T in float32, of float16 rows.

    Where torch has no such product the rows are widened, once, which changes none of them.
    """
    if unit.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return lambda start, stop: torch.mm(unit[start:stop], unit.T, out_dtype=torch.float32)
    wide = unit.float()
    return lambda start, stop: wide[start:stop] @ wide.T


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """No float16 accumulation in products, whatever the caller allows: what knn skips, it skips by an error bound."""
    settings = torch.backends.cuda.matmul
    allowed = getattr(settings, "allow_fp16_accumulation", False)  # from torch 2.7 on
    if not allowed:
        yield
        return
    settings.allow_fp16_accumulation = False
    try:
        yield
    finally:
        settings.allow_fp16_accumulation = allowed


def _rows_by(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of `index` in the order of its values, and where those of each value 0..count-1 begin [count + 1]."""
    order = torch.argsort(index, stable=True)
    return order, torch.searchsorted(index[order], torch.arange(count + 1, device=index.device))
