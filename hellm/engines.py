"""Who computes the parts of a work: this process, or workers on a Ray cluster.

An engine is called as `map` is: with a worker, which makes a result of a part, and the parts. `map` itself is that of
this process. Others give results in any order, so that a result must say what it is of, and send the worker to other
processes by value: what it can load there it should leave out, in `__getstate__`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import re
import signal
import socket
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ENGINES", "Engine", "RayEngine", "engine_of"]

Engine = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
ENGINES = ("local", "ray")

# How often a worker whose process or node died is started anew, and a part given out again.
_RESTARTS = 3


def engine_of(name: str, workers: int | None = None, device: str = "cpu") -> Engine:
    """The engine of that name, one of `ENGINES`.

    Args:
        name: "local" or "ray".
        workers, device: See `RayEngine`; "local" has no workers.
    Raises: ValueError, another name, workers < 1 or of "local". ImportError, Ray is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "ray":
        return RayEngine(workers, device)
    if workers is not None:
        raise ValueError(f"workers are of engine ray; engine local has none, got {workers}")
    return map


class RayEngine:
    """Workers as actors of Ray Data, on the cluster that RAY_ADDRESS names, or on one of this machine alone.

    A cluster that the process has joined before is used and left as it is. All nodes need the same versions of hellm
    and torch, and see files at the same paths. Workers have as many threads of torch as this process, since results of
    torch may depend on them.

    Args:
        workers: Actors, >= 1; None is as many as the cluster has room for: its CPUs by threads, or its GPUs.
        device: "cpu", or "cuda" for a GPU for each worker.
    Raises: ValueError, workers < 1, or a GPU by its number. ImportError, Ray is not installed.
    """

    def __init__(self, workers: int | None = None, device: str = "cpu") -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        if device.startswith("cuda:"):
            raise ValueError(f"device must be cpu or cuda, as engine ray chooses the GPUs, got {device!r}")
        try:
            importlib.import_module("ray.data")
        except ImportError:
            raise ImportError('engine "ray" needs the package ray: pip install "hellm[ray]"') from None
        self.workers, self.on_gpu = workers, device == "cuda"

    def __call__(self, worker: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[Any]:
        """The result of each part, as they come; parts are read to their end first, into Ray's store.

        Raises: What the worker raised, naming the node; the nearest kind, where that needs more than a message.
            ConnectionError, no cluster at RAY_ADDRESS. ChildProcessError, processes of workers die. ValueError, a
            cluster without CPUs, or without the GPUs that are wanted, or with other versions.
        """
        import pandas as pd
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

        parts = iter(parts)
        first = list(islice(parts, 1))
        if not first:
            return
        with _cluster():
            # In tuples, which pandas leaves as they are.
            tables = [ray.put(pd.DataFrame({"part": [(part,)]})) for part in chain(first, parts)]
            results = self._mapped(worker, tables)
            try:
                for table in results.iter_batches(batch_size=None, batch_format="pandas"):
                    for (result,) in table["result"]:
                        if isinstance(result, _Raised):
                            raise result.error from RuntimeError(result.traceback)
                        yield result
            except (OutOfMemoryError, RayActorError, WorkerCrashedError) as error:
                if missing := re.search(r"No module named '[\w.]+'", str(error)):
                    raise ValueError(f"all nodes must have the packages that are here: {missing[0]} there") from error
                told = textwrap.shorten(str(error), 600)
                raise ChildProcessError(
                    f"the Ray cluster lost a worker, and {_RESTARTS} in its place: {told}"
                ) from error

    def _mapped(self, worker: Callable[[Any], Any], tables: list[Any]) -> Any:
        """The data set of results."""
        import ray.data
        import torch

        num_threads = torch.get_num_threads()
        size, share = _room(num_threads, self.on_gpu)
        data = ray.data.from_pandas_refs(tables)
        data.context.enable_progress_bars = False
        with warnings.catch_warnings():
            # Ray means to drop `max_restarts`; without it, a part that kills its process is given out for ever.
            warnings.simplefilter("ignore")
            return data.map_batches(
                _Actor,
                fn_constructor_args=(ray.put(worker), num_threads, _versions()),
                compute=ray.data.ActorPoolStrategy(size=min(self.workers or size, len(tables))),
                batch_size=1,
                batch_format="pandas",
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
                **share,
            )


class _Actor:
    """The worker on its node. What it raises is a result, so that it can be raised here as it was there."""

    def __init__(self, worker: Any, num_threads: int, versions: dict[str, str]) -> None:
        import ray
        import torch

        torch.set_num_threads(num_threads)
        self.node = f"{ray.get_runtime_context().get_node_id()[:8]} ({socket.gethostname()})"
        self.worker: Any = ray.get(worker)
        self.versions = versions

    def __call__(self, table: pd.DataFrame) -> pd.DataFrame:
        import pandas as pd

        ((part,),) = table["part"]
        try:
            if _versions() != self.versions:
                raise ValueError(f"all nodes must have the versions {self.versions}, got {_versions()}")
            result = self.worker(part)
        except Exception as error:
            result = _Raised(error, self.node)
        return pd.DataFrame({"result": [(result,)]})


class _Raised:
    """An error and where it came from.

    Attributes:
        error: The error with the node in its message.
        traceback: Of the worker.
    """

    def __init__(self, error: Exception, node: str) -> None:
        text = f"{error or type(error).__name__} (worker on node {node})"
        if isinstance(error, FileNotFoundError):
            text += "; every node must see files at the same path, on storage that they share"
        self.traceback = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        plain = {name: value for name, value in vars(error).items() if isinstance(value, bool | int | str)}
        for kind in type(error).__mro__:
            with contextlib.suppress(Exception):
                self.error: BaseException = kind(text)
                vars(self.error).update(plain)
                copy.copy(self.error)  # as it is made anew where it arrives
                return


def _room(num_threads: int, on_gpu: bool) -> tuple[int, dict[str, Any]]:
    """How many workers the cluster has room for, and what each takes of it."""
    import ray

    kind = "GPU" if on_gpu else "CPU"
    counts = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    # What no node can give is never given; threads then share processors.
    share = 1 if on_gpu else min(num_threads, max(counts))
    if not share or not max(counts):
        raise ValueError(f"the Ray cluster must have a {kind}, and has none on its {len(counts)} nodes")
    return sum(count // share for count in counts), {f"num_{kind.lower()}s": share}


def _versions() -> dict[str, str]:
    import torch

    from hellm import __version__

    return {"hellm": __version__, "torch": torch.__version__}


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """Ray is there for the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    # What goes wrong comes as an error; what Ray tells besides is in its own files.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    for name, value in (("RAY_BACKEND_LOG_LEVEL", "fatal"), ("RAY_USAGE_STATS_ENABLED", "0")):
        os.environ.setdefault(name, value)
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        joined = bool(os.environ.get("RAY_ADDRESS"))
        ray.init(
            address="auto" if joined else "local",
            include_dashboard=None if joined else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        # Ray's own handler would end the process with another code.
        if threading.current_thread() is threading.main_thread() and on_term is not None:
            signal.signal(signal.SIGTERM, on_term)
        yield
    finally:
        ray.shutdown()
