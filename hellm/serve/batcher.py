"""A bounded queue in front of one thread, which takes all that has come together."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hellm.serve.errors import Overloaded

__all__ = ["Batcher"]


class Batcher:
    """Hands jobs, in the order they came and several at a time, to a function in a thread of its own.

    While a batch is in work the next one gathers, so that batches grow with the load by themselves, and nobody waits
    when there is none.

    Args:
        work: Takes a batch of jobs and gives, for each, its result or an exception. It runs in one thread only.
        name: Of the thread.
        max_batch: Jobs in a batch, >= 1.
        max_wait: Seconds that a batch may wait for more jobs; 0 takes what is there.
        max_queue: Jobs that may wait; one more is refused.
        timeout: Seconds until a job that waits, or is in work, is given up.
        on_batch: Called with the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        name: str,
        max_batch: int = 32,
        max_wait: float = 0.0,
        max_queue: int = 1024,
        timeout: float = 10.0,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        for what, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"{what} must be >= 1, got {value}")
        if max_wait < 0 or timeout <= 0:
            raise ValueError(f"max_wait must be >= 0 and timeout > 0, got {max_wait} and {timeout}")
        self._work, self._name, self._on_batch = work, name, on_batch
        self.max_batch, self.max_wait, self.max_queue, self.timeout = max_batch, max_wait, max_queue, timeout
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._arrival = asyncio.Event()
        self._batches: queue.SimpleQueue[tuple[list[Any], asyncio.Future] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task | None = None
        self._closing = False

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to work, on the running event loop."""
        self._closing = False
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work_off, args=[loop], name=self._name, daemon=True)
        self._thread.start()
        self._task = loop.create_task(self._run())

    async def close(self) -> None:
        """Finish what is waiting, and end; jobs that come later are refused."""
        self._closing = True
        self._arrival.set()
        if self._task is not None:
            await self._task
        if self._thread is not None:
            self._batches.put(None)
            await asyncio.to_thread(self._thread.join)

    async def submit(self, job: Any) -> Any:
        """The result of a job.

        Raises: Overloaded, the queue is full or closed, or the job has taken longer than `timeout`. Whatever the work
            raised for it.
        """
        if self._closing:
            raise Overloaded("the server is stopping")
        if len(self._waiting) >= self.max_queue:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already")
        loop = asyncio.get_running_loop()
        future: asyncio.Future = loop.create_future()
        self._waiting.append((job, future))
        self._arrival.set()
        late = loop.call_later(self.timeout, self._give_up, future)
        try:
            return await future
        finally:
            late.cancel()

    def _give_up(self, future: asyncio.Future) -> None:
        if not future.done():
            future.set_exception(Overloaded(f"no answer within {self.timeout:g} seconds"))

    def _work_off(self, loop: asyncio.AbstractEventLoop) -> None:
        """What the thread does. An executor of the standard library takes several times as long for each batch."""
        while (batch := self._batches.get()) is not None:
            jobs, done = batch
            try:
                results = self._work(jobs)
            except Exception as error:
                results = [error] * len(jobs)
            loop.call_soon_threadsafe(done.set_result, results)
            # A job may hold a run, and the next batch may be long in coming.
            del batch, jobs, done, results

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                if self._closing:
                    return
                self._arrival.clear()
                await self._arrival.wait()
                continue
            if self.max_wait and len(self._waiting) < self.max_batch and not self._closing:
                await asyncio.sleep(self.max_wait)
            await self._run_batch(loop)

    async def _run_batch(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = []
        while self._waiting and len(batch) < self.max_batch:
            job, future = self._waiting.popleft()
            # Who has gone or waited too long is not worked for.
            if not future.done():
                batch.append((job, future))
        if not batch:
            return
        self._on_batch(len(batch))
        done = loop.create_future()
        self._batches.put(([job for job, _ in batch], done))
        results = await done
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
