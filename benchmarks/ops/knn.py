"""Nearest neighbours by cosine beside chunks of products and faiss.

N = rows, D = columns.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inputs
from benchmarks.ceilings import PRODUCT
from benchmarks.entries import at_precision, candidates
from benchmarks.ops.info_nce import most_rows_with_truth
from benchmarks.registry import CPU, TARGETS, Entry, Outputs, Setup, Target, Workload, register
from hellm import ops


def knn_chunked(x: Tensor, k: int, chunk: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Matrix product and topk by chunks of rows: indices [N, k] and cosines [N, k], found in that precision."""
    unit = F.normalize(x).to(dtype)
    found = [torch.topk(part @ unit.T, k) for part in unit.split(chunk)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def knn_faiss(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """faiss IndexFlatIP over the normalised rows.

    Raises:
        ImportError: faiss is not installed.
    """
    import faiss

    unit = F.normalize(x).numpy()
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    values, indices = index.search(unit, k)
    return torch.from_numpy(indices), torch.from_numpy(values)


# -------------------------------------------------------------------------------------------------------- cases


def _knn(setup: Setup, *, num_rows: int, dim: int, k: int = 10, clusters: int = 0, nvrtc: bool = False) -> Workload:
    """With `clusters`, rows lie so near to one of these that float16 cannot tell which of its rows are nearest."""
    num_rows, dim = setup.small(num_rows), setup.small(dim)
    x = inputs.rows(num_rows, dim)
    if clusters:
        x = inputs.rows(clusters, dim, 1)[inputs.indices(num_rows, clusters)] + 0.02 * x
    x = x.to(setup.device)

    def verify(found: Outputs, expected: Outputs) -> float:
        """Worst error of the cosines, as returned and as recomputed from the indices; ties may fall either way."""
        unit, (indices, values) = F.normalize(x), found
        recomputed = torch.stack([(unit * unit[column]).sum(1) for column in indices.T], 1)
        return max(float((cosines.double() - expected[1]).abs().max()) for cosines in (values, recomputed))

    def truth() -> Outputs:
        return knn_chunked(x.double(), k, 1024, torch.float64)

    # What is left to plain torch there is measured as "torch".
    entries = candidates(
        setup,
        lambda precision: lambda: ops.knn(x, k),
        {"": 1e-5 if setup.gpu else 1e-4},
        nvrtc=nvrtc,
        takes=lambda backend, precision: backend != "triton",
    )
    chunk = 4096 if setup.gpu else 1024
    label, chunked = f"torch mm + topk, chunks of {chunk}", partial(knn_chunked, x, k, chunk)
    if setup.gpu:
        entries += [
            Entry(label, at_precision("highest", chunked), tolerance=1e-5),
            Entry(f"{label}, TF32", at_precision("high", chunked), tolerance=5e-3),
            Entry(f"{label}, float16, not exact", partial(chunked, dtype=torch.float16), tolerance=5e-3),
        ]
    else:
        entries.append(Entry(label, chunked))
        entries.append(Entry("faiss IndexFlatIP", partial(knn_faiss, x, k)))
    return Workload(
        entries,
        2.0 * num_rows**2 * dim,
        parameters={"N": num_rows, "D": dim, "k": k, "dtype": "float32"} | ({"clusters": clusters} if clusters else {}),
        truth=truth if num_rows <= most_rows_with_truth(setup.device) else None,
        limit=PRODUCT,
        verify=verify,
    )


_add = partial(register, "Nearest neighbours", _knn)
_add("knn-128", "knn, k = 10, items and width of TikTok features", devices=(CPU,), num_rows=6_710, dim=128)
_add("knn-512", "knn, k = 10, 12,101 items with 512 columns", devices=(CPU,), num_rows=12_101, dim=512)
_add("knn-18357x4096", rank=0, num_rows=18_357, dim=4_096, nvrtc=True)
_add("knn-100000x128", rank=0, num_rows=100_000, dim=128)
for _rows, _dim, _k in ((6_710, 128, 5), (18_357, 1_024, 32), (50_000, 768, 10), (100_000, 4_096, 10)):
    _add(f"knn-{_rows}x{_dim}", num_rows=_rows, dim=_dim, k=_k)
_add("knn-clustered", num_rows=50_000, dim=128, clusters=500)

TARGETS += [
    *(Target(f"knn-{dim}", "hellm", "faiss", 1.8, device=CPU) for dim in (128, 512)),
    Target("knn-18357x4096", milliseconds=7.0),
    Target("knn-100000x128", milliseconds=8.0),
]
