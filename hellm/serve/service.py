"""The only way to what is served: questions of readers, and what writers change, each through a queue of its own."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hellm.serve.batcher import Batcher
from hellm.serve.encoding import Encoders
from hellm.serve.errors import RequestError
from hellm.serve.memory import release_memory
from hellm.serve.metrics import Metrics
from hellm.serve.readiness import is_row_exact
from hellm.serve.schema import ItemRequest
from hellm.serve.settings import Settings
from hellm.serve.state import Snapshot, load_snapshot
from hellm.serve.store import Entry, Store
from hellm.serve.writer import Stored, Takeover, replayed, write

__all__ = ["Service", "Source"]

logger = logging.getLogger(__name__)

Question = Callable[[Snapshot, Sequence[Any]], Sequence[Any]]
# Items that wait to be encoded, writes that share a transaction, and studies that wait.
_MAX_ENCODED, _MAX_WRITES, _MAX_STUDIES = 64, 256, 16
# Seconds from a new catalogue until the memory of the one before is given back. A reader holds that until its batch is
# answered, and items that come together are one catalogue after another.
_RELEASE_AFTER = 0.2


@dataclass(frozen=True)
class Source:
    """Where runs are read from; nothing of it ever comes from a request.

    Attributes:
        run: The run directory, or a link to it.
        reload_from: What `/admin/reload` reads; None is `run`.
        device, language_model: As in `hellm.recommend.Recommender.load`.
        onnx: As in `load_snapshot`; read again with the run.
        encoders: Modality -> encoder of new items, in place of what the run names.
        compared: Another run, for pages that show the two side by side.
    """

    run: str | os.PathLike[str]
    reload_from: str | os.PathLike[str] | None = None
    device: str = "cpu"
    language_model: str | os.PathLike[str] | None = None
    onnx: str | os.PathLike[str] | None = None
    encoders: dict[str, str] = field(default_factory=dict)
    compared: str | os.PathLike[str] | None = None

    def load(self, *, again: bool = False) -> Snapshot:
        """The run as it is now. Raises: As `load_snapshot`."""
        path = self.reload_from if again and self.reload_from is not None else self.run
        return self._read(path, self.onnx)

    def load_compared(self) -> Snapshot | None:
        """The other run, if there is one. Raises: As `load_snapshot`."""
        return None if self.compared is None else self._read(self.compared, None)

    def _read(self, path: str | os.PathLike[str], onnx: str | os.PathLike[str] | None) -> Snapshot:
        return load_snapshot(path, device=self.device, language_model=self.language_model, onnx=onnx)


class Service:
    """What is served.

    Args:
        source: Where the run is.
        store: What has come to it; without one, nothing is taken.
        settings: Limits.
        metrics: Where it is counted.

    Raises: As `load_snapshot` and `Store`.
    """

    def __init__(self, source: Source, store: Store | None, settings: Settings, metrics: Metrics) -> None:
        self._source, self._store, self._metrics = source, store, metrics
        self._snapshot, self.skipped = self._replayed(source.load())
        compared = source.load_compared()
        self._compared = None if compared is None else self._replayed(compared)[0]
        self._told()
        limits = {"max_queue": settings.max_queue, "timeout": settings.timeout}
        self._readers = Batcher(
            self._answer,
            name="model",
            max_batch=settings.max_batch,
            max_wait=settings.max_wait,
            on_batch=metrics.batch_size.observe,
            **limits,
        )
        self._writers = Batcher(self._write, name="writer", max_batch=_MAX_WRITES, **limits)
        limits |= {"max_queue": _MAX_ENCODED, "timeout": settings.encode_timeout}
        self._encoders = Batcher(self._encode, name="encoder", max_batch=1, **limits)
        limits |= {"max_queue": _MAX_STUDIES, "timeout": settings.study_timeout}
        self._studies = Batcher(self._answer, name="study", max_batch=1, **limits)
        self._encode_item = Encoders(source.encoders)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._reloading = False
        self._releasing: asyncio.TimerHandle | None = None
        metrics.waiting.set_function(lambda: len(self._readers))

    @property
    def snapshot(self) -> Snapshot:
        """What is served at this moment. Who needs several values of it takes it once."""
        return self._snapshot

    @property
    def store(self) -> Store | None:
        return self._store

    @property
    def has_other(self) -> bool:
        """Whether another run was named, to be compared with."""
        return self._compared is not None

    def compared_with(self, snapshot: Snapshot) -> Snapshot | None:
        """The other run, with what is stored up to a snapshot; for studies alone, which follow one another."""
        compared = self._compared
        if compared is not None and self._store is not None and compared.revision < snapshot.revision:
            new = self._store.entries(compared.revision, snapshot.revision)
            self._compared, _ = replayed(compared, new)
        return self._compared

    async def open(self) -> None:
        """Start the threads, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        for one in (self._readers, self._writers, self._encoders, self._studies):
            one.start()

    async def close(self) -> None:
        """Answer what is waiting, then stop."""
        for one in (self._studies, self._encoders, self._writers, self._readers):
            await one.close()
        if self._releasing is not None:
            self._releasing.cancel()
        self._background.shutdown(cancel_futures=True)

    def warm_up(self) -> None:
        """Answer for the first time, and see whether requests may share a call."""
        self._snapshot = _warmed_up(self._snapshot)

    async def read(self, question: Question, request: Any) -> Any:
        """Put a request to a question of `hellm.serve.answers`, together with others that are waiting.

        Raises: RequestError; Overloaded.
        """
        return await self._readers.submit((question, request))

    async def study(self, question: Question, request: Any) -> Any:
        """As `read`, in a thread of its own and one after another, for what would hold up others.

        Raises: RequestError; Overloaded.
        """
        return await self._studies.submit((question, request))

    async def add(self, entries: Sequence[Entry]) -> Stored:
        """Put entries on disk and take them up, all or none; those that are there already count as duplicates.

        Raises: RequestError, an entry that does not fit, or another of its key; Overloaded.
        """
        if self._store is None:
            raise RequestError(409, "this server keeps nothing: it was started without a store")
        return await self._writers.submit(list(entries))

    async def encode(self, item: ItemRequest, picture: bytes | None) -> dict[str, np.ndarray]:
        """The features of a new item, see `Encoders`. Raises: RequestError; Overloaded."""
        return await self._encoders.submit((item, picture))

    async def reload(self, learned: int | None = None) -> Stored:
        """Read the run again, or the one that was named for it, and serve it with all that is stored.

        Args:
            learned: Number of the last stored entry that the run was trained with; what is up to it is not replayed.
        Raises: RequestError, another reload goes on, or the run cannot be served; the one before stays.
        """
        if self._reloading:
            raise RequestError(409, "a reload is going on already")
        self._reloading = True
        try:
            loop = asyncio.get_running_loop()
            try:
                job = await loop.run_in_executor(self._background, self._load, learned)
            except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
                raise RequestError(409, f"the run cannot take over, the one before stays: {error}") from None
            stored = await self._writers.submit(job)
        except BaseException:
            self._metrics.reloads.labels("failed").inc()
            raise
        finally:
            self._reloading = False
        self._metrics.reloads.labels("done").inc()
        logger.info("run %s takes over", stored.snapshot.model_version)
        return stored

    def _load(self, learned: int | None) -> Takeover:
        snapshot = _warmed_up(self._source.load(again=True))
        return Takeover(*self._replayed(snapshot, learned), learned)

    def _replayed(self, snapshot: Snapshot, learned: int | None = None) -> tuple[Snapshot, int]:
        """With what is stored and was not learned."""
        if self._store is None:
            return snapshot, 0
        after = self._store.learned(snapshot.run_hash) if learned is None else learned
        return replayed(snapshot.learned_up_to(after), self._store.entries(after))

    def _answer(self, jobs: Sequence[tuple[Question, Any]]) -> list[Any]:
        """One snapshot for a batch."""
        snapshot, answers = self._snapshot, [None] * len(jobs)
        places: dict[Question, list[int]] = {}
        for place, (question, _) in enumerate(jobs):
            places.setdefault(question, []).append(place)
        for question, own in places.items():
            try:
                # A tenth less for the model than without gradients alone.
                with torch.inference_mode():
                    found = question(snapshot, [jobs[place][1] for place in own])
            except Exception as error:
                found = [error] * len(own)
            for place, answer in zip(own, found, strict=True):
                answers[place] = _refused(answer)
        return answers

    def _write(self, jobs: Sequence[Any]) -> list[Any]:
        before = self._snapshot
        self._snapshot, results = write(before, self._store, jobs)
        self._told()
        if self._snapshot.recommender.item_ids is not before.recommender.item_ids:
            self._loop.call_soon_threadsafe(self._release_later)
        return results

    def _release_later(self) -> None:
        if self._releasing is None:
            self._releasing = self._loop.call_later(_RELEASE_AFTER, self._release)

    def _release(self) -> None:
        self._releasing = None
        self._background.submit(release_memory)

    def _encode(self, jobs: Sequence[tuple[ItemRequest, bytes | None]]) -> list[Any]:
        content = self._snapshot.recommender.content
        return [self._encode_item(content, item, picture) for item, picture in jobs]

    def _told(self) -> None:
        snapshot, metrics = self._snapshot, self._metrics
        metrics.users.set(snapshot.recommender.num_users)
        metrics.items.set(snapshot.recommender.num_items)
        metrics.revision.set(snapshot.revision)
        metrics.run.clear()
        metrics.run.labels(snapshot.model_version).set(1)


def _warmed_up(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, is_row_exact=is_row_exact(snapshot.recommender))


def _refused(answer: Any) -> Any:
    """What a model refuses is a mistake of the request that no check before it has seen."""
    return RequestError(422, str(answer)) if isinstance(answer, ValueError) else answer
