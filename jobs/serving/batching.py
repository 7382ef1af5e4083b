"""Puts requests that wait at the same moment together, so that they are encoded and searched once.

Knows nothing of HTTP. A request that comes alone does not wait for others: while one batch is
worked on, in a thread, the next one gathers.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from jobs.serving.metrics import Metrics
from pipelines.indexes.filters import Condition
from pipelines.indexes.queries import Query
from pipelines.search import Answer

MAX_BATCH_PARTS = 32
"""More gain nothing: a text tower on a CPU takes as long for each of 32 as of 64."""
MAX_BATCH_HITS = 10_000
"""Of all queries: each gets as many as the one that wants most, before it is cut."""

_logger = logging.getLogger("clipmill.serve")


class Searching(Protocol):
    """What answers queries; `pipelines.search.Searcher` does."""

    def search(
        self, queries: Sequence[Query], *, num_hits: int, where: Sequence[Condition] = ()
    ) -> list[Answer]:
        """Answer all of them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The queries of one request."""

    searcher: Searching
    """Of the snapshot that was current when it came."""
    queries: tuple[Query, ...]
    """At least one."""
    num_hits: int
    """For each."""
    where: tuple[Condition, ...] = ()
    """Conditions on the hits."""

    @property
    def num_parts(self) -> int:
        """Of all queries."""
        return sum(len(query.parts) for query in self.queries)


@dataclass(frozen=True, slots=True)
class _Waiting:
    asked: Asked
    answers: asyncio.Future[list[Answer]] = field(compare=False)


class Batcher:
    """Answers requests in batches, one at a time: a batch uses all cores by itself."""

    def __init__(self, metrics: Metrics) -> None:
        """Begin idle; `metrics` counts the batches."""
        self._metrics = metrics
        self._waiting: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._working: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> list[Answer]:
        """The answers to a request; what the searcher raises for it is raised."""
        answers: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(asked, answers))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await answers

    def close(self) -> None:
        """End the thread, once its batch is done; what waits is cancelled."""
        for waiting in self._waiting:
            waiting.answers.cancel()
        self._waiting.clear()
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        try:
            while batch := self._next_batch():
                await self._answer(batch)
        finally:
            self._working = None

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._answers, [waiting.asked for waiting in batch]
            )
            for waiting, result in zip(batch, results, strict=True):
                if waiting.answers.done():  # its request ran out of time
                    continue
                if isinstance(result, Exception):
                    waiting.answers.set_exception(result)
                else:
                    waiting.answers.set_result(result)
        # Of the work itself, not of a query: nobody is to wait for what will not come.
        except Exception as error:
            _logger.exception("a batch failed")
            failure = RuntimeError(f"the batch failed ({type(error).__name__})")
            failure.__cause__ = error
            for waiting in batch:
                if not waiting.answers.done():
                    waiting.answers.set_exception(failure)
        finally:
            for waiting in batch:
                waiting.answers.cancel()

    def _next_batch(self) -> list[_Waiting]:
        """The oldest request, with those behind it that can be asked together with it."""
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        num_parts = num_queries = num_hits = 0
        while self._waiting:
            waiting = self._waiting.popleft()
            asked = waiting.asked
            if waiting.answers.done():
                continue
            together = not batch or (
                num_parts + asked.num_parts <= MAX_BATCH_PARTS
                and (num_queries + len(asked.queries)) * max(num_hits, asked.num_hits)
                <= MAX_BATCH_HITS
                and asked.searcher is batch[0].asked.searcher
                and asked.where == batch[0].asked.where
            )
            if together:
                batch.append(waiting)
                num_parts += asked.num_parts
                num_queries += len(asked.queries)
                num_hits = max(num_hits, asked.num_hits)
            else:
                others.append(waiting)
        self._waiting = others
        return batch

    def _answers(self, batch: Sequence[Asked]) -> list[list[Answer] | Exception]:
        """In the thread: the answers to each request, or what was raised for it."""
        started = time.monotonic()
        try:
            return self._together(batch)
        # Whatever it is, it belongs to the request that caused it, who passes it on.
        except Exception as error:  # noqa: BLE001
            if len(batch) == 1:
                return [error]
            # One query that cannot be answered fails a batch; the others are to have their answers.
            return [result for asked in batch for result in self._answers([asked])]
        finally:
            self._metrics.batches.observe(sum(len(asked.queries) for asked in batch))
            self._metrics.batch_seconds.observe(time.monotonic() - started)

    def _together(self, batch: Sequence[Asked]) -> list[list[Answer] | Exception]:
        first = batch[0]
        num_hits = max(asked.num_hits for asked in batch)
        queries = [query for asked in batch for query in asked.queries]
        answers = iter(first.searcher.search(queries, num_hits=num_hits, where=first.where))
        return [
            [_cut(next(answers), num_hits=asked.num_hits) for _ in asked.queries] for asked in batch
        ]


def _cut(answer: Answer, *, num_hits: int) -> Answer:
    if len(answer.hits) <= num_hits:
        return answer
    return Answer(hits=answer.hits[:num_hits], notes=answer.notes, snapshot=answer.snapshot)
