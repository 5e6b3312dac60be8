"""Time the operators of another commit beside those installed here: python -m benchmarks.against REV [--only NAME ...].

REV is built in a temporary folder. Each side runs in a process of its own, one call at a time in turns; the figure is
the least processor time of a call, which other work on the machine disturbs little. Only the public operators are
called, as every commit has them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_WORKER = "import sys; sys.path.insert(0, sys.argv[2]); from against import serve; serve(*sys.argv[1:])"


def operator_calls() -> dict[str, Callable[[], object]]:
    """Name -> one call of an operator, with its gradients unless the name says otherwise."""
    import torch

    from hellm import Hypergraph, ops

    generator = torch.Generator().manual_seed(0)

    def rows(count: int, dim: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(count, dim, generator=generator).requires_grad_(grad)

    def graph(vertices: int, hyperedges: int, count: int) -> Hypergraph:
        drawn = [torch.randint(size, (count,), generator=generator) for size in (vertices, hyperedges)]
        return Hypergraph(torch.stack(drawn), num_vertices=vertices, num_hyperedges=hyperedges)

    def backward(function: Callable[..., object], *arguments: object, **settings: object) -> Callable[[], object]:
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]

        def call() -> object:
            found = function(*arguments, **settings)
            found = found if isinstance(found, tuple) else (found,)
            return torch.autograd.grad(found, leaves, [torch.ones_like(out) for out in found])

        return call

    small, large = graph(60, 40, 300), graph(35_598, 18_357, 218_409)
    x, users, items = rows(35_598, 64), rows(35_598, 64), rows(18_357, 64)
    views, wide = (rows(4_096, 64), rows(4_096, 64)), (rows(512, 4_096), rows(512, 4_096))
    hidden, catalogue, target = rows(2_048, 64), rows(12_101, 64), torch.randint(12_101, (2_048,), generator=generator)
    few = rows(60, 16, grad=False)
    narrow, broad, long = (rows(*size, grad=False) for size in ((6_710, 128), (4_096, 512), (1_024, 4_096)))
    return {
        "conv": backward(ops.hypergraph_conv, x, large),
        "conv, no self loops": backward(ops.hypergraph_conv, x, large, self_loops=False, normalization="row"),
        "conv, small, forward": lambda: ops.hypergraph_conv(few, small),
        "incidence product": backward(ops.incidence_product, items, large),
        "propagate": backward(ops.bipartite_propagate, users, items, large),
        "info_nce, highest": backward(ops.info_nce, *views, precision="highest"),
        "info_nce, medium": backward(ops.info_nce, *views, precision="medium"),
        "info_nce, 4096 columns": backward(ops.info_nce, *wide, precision="highest"),
        "info_nce, small, forward": lambda: ops.info_nce(few, few),
        "cross-entropy": backward(ops.item_cross_entropy, hidden, catalogue, target),
        "cross-entropy, 4096 columns": backward(ops.item_cross_entropy, *wide, torch.arange(512)),
        "knn, 128 columns": lambda: ops.knn(narrow, 10),
        "knn, 512 columns": lambda: ops.knn(broad, 10),
        "knn, 4096 columns": lambda: ops.knn(long, 10),
        "knn, small": lambda: ops.knn(few, 5),
    }


def serve(site: str, *_: str) -> None:
    """For each name on stdin, one call (of short ones as many as take a millisecond): its processor seconds."""
    if site:
        # An editable install would give the package that it stands for.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
        sys.path.insert(0, site)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    calls = operator_calls()
    print(*calls, sep="\t", flush=True)
    repeats: dict[str, int] = {}
    for name in map(str.strip, sys.stdin):
        call, count = calls[name], repeats.get(name, 1)
        started = time.process_time()
        for _ in range(count):
            call()
        seconds = (time.process_time() - started) / count
        # The first call warms up, and says how long one takes.
        repeats.setdefault(name, max(1, min(500, int(0.02 / max(seconds, 1e-6)))))
        print(seconds, flush=True)


class Side:
    """A process that calls the operators of one installation; an empty `site` is the one here."""

    def __init__(self, site: str, threads: int) -> None:
        command = [sys.executable, "-c", _WORKER, site, str(Path(__file__).parent)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=site or ROOT
        )
        self.names = self._process.stdout.readline().rstrip("\n").split("\t")

    def seconds(self, name: str) -> float:
        print(name, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def build(revision: str, folder: Path) -> Path:
    """Install a commit without its dependencies into a folder below `folder`."""
    tree, site = folder / "tree", folder / "site"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, tree]
    subprocess.run(command, check=True)
    return site


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__.partition("\n")[0])
    parser.add_argument("revision", metavar="REV", help="commit, branch or tag to compare with")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="calls, by the beginning of their names")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="threads of a call")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        site = build(options.revision, Path(folder))
        before, here = Side(str(site), options.threads), Side("", options.threads)
        wanted = tuple(options.only or here.names)
        print(f"{'':30}{options.revision[:12]:>14}{'here':>14}   here / {options.revision[:12]}")
        for name in (name for name in here.names if name.startswith(wanted)):
            samples = [(before.seconds(name), here.seconds(name)) for _ in range(options.rounds + 1)][1:]
            least = [min(side) for side in zip(*samples, strict=True)]
            middle = statistics.median(new / old for old, new in samples)
            print(f"{name:30}{least[0] * 1e3:11.3f} ms{least[1] * 1e3:11.3f} ms   "
                  f"{least[1] / least[0]:.3f} (median of rounds {middle:.3f})", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
