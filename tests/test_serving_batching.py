"""What waits together is asked together, and nobody pays for another's bad query."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from jobs.serving.batching import MAX_BATCH_HITS, MAX_BATCH_PARTS, Asked, Batcher
from jobs.serving.metrics import Metrics
from pipelines.indexes.filters import Condition
from pipelines.indexes.queries import Part, Query
from tests.serving import WordSearcher, shop_rows
from tests.stored import make_snapshot
from tests.waiting import WAIT_SECONDS


def searcher(**options: Any) -> WordSearcher:
    return WordSearcher(rows=shop_rows(12), snapshot=make_snapshot([]), **options)


def asked(found: Any, text: str, *, num_hits: int = 1, where: tuple[Condition, ...] = ()) -> Asked:
    query = Query(parts=(Part(text=text),))
    return Asked(searcher=found, queries=(query,), num_hits=num_hits, where=where)


def run(use: Callable[[Batcher], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        batcher = Batcher(Metrics())
        try:
            return await use(batcher)
        finally:
            batcher.close()

    return asyncio.run(main())


def test_what_comes_while_a_batch_is_worked_on_is_the_next_batch():
    found = searcher()
    found.may_end.clear()
    texts = ["red ring", "blue cup", "green lamp", "amber ring"] * 4

    async def use(batcher: Batcher) -> list:
        asks = [batcher.ask(asked(found, text, num_hits=1 + n % 3)) for n, text in enumerate(texts)]
        first = asyncio.ensure_future(batcher.ask(asked(found, "red cup")))
        assert await asyncio.to_thread(found.begun.wait, WAIT_SECONDS)
        others = asyncio.gather(*asks)
        await asyncio.sleep(0)  # they are asked
        found.may_end.set()
        return [await first, *await others]

    answers = run(use)
    assert found.batch_sizes == [1, len(texts)]
    for n, (text, (answer,)) in enumerate(zip(texts, answers[1:], strict=True)):
        assert answer.hits[0].columns["name"] == text
        assert len(answer.hits) == 1 + n % 3


def test_a_batch_has_a_largest_size_and_one_set_of_conditions():
    found = searcher()
    where = (Condition(column="price", operator="lt", value=7),)

    async def use(batcher: Batcher) -> list:
        others = [batcher.ask(asked(found, "red ring")) for _ in range(MAX_BATCH_PARTS + 3)]
        return await asyncio.gather(*others, batcher.ask(asked(found, "lamp", where=where)))

    answers = run(use)
    assert found.batch_sizes == [MAX_BATCH_PARTS, 3, 1]
    assert answers[-1][0].hits[0].columns["price"] < 7


def test_a_batch_is_bounded_by_what_its_queries_have_and_want():
    found = searcher()
    part = Part(text="ring")
    long = Asked(
        searcher=found, queries=(Query(parts=(part,) * (MAX_BATCH_PARTS - 1)),), num_hits=1
    )

    async def use(batcher: Batcher) -> list:
        asks = [long, asked(found, "cup"), asked(found, "cup"), asked(found, "cup")]
        many = [asked(found, "cup", num_hits=MAX_BATCH_HITS // 2) for _ in range(3)]
        return await asyncio.gather(*(batcher.ask(one) for one in [*asks, *many]))

    run(use)
    # Two are full of parts, two then want as many hits as may be.
    assert found.batch_sizes == [2, 2, 2, 1]


def test_whatever_befalls_a_batch_nobody_waits_for_ever(monkeypatch):
    async def use(batcher: Batcher) -> list:
        monkeypatch.setattr(batcher, "_answers", lambda batch: [StopIteration()] * len(batch))
        asks = [batcher.ask(asked(searcher(), "ring")) for _ in range(2)]
        failed = await asyncio.gather(*asks, return_exceptions=True)
        monkeypatch.undo()
        return [*failed, await batcher.ask(asked(searcher(), "ring"))]

    *failed, good = run(use)
    assert [type(error) for error in failed] == [RuntimeError, RuntimeError]
    assert good[0].hits


def test_one_bad_query_spoils_no_other():
    found = searcher()

    async def use(batcher: Batcher) -> list:
        texts = ["red ring", "boom", "blue cup"]
        asks = [batcher.ask(asked(found, text)) for text in texts]
        unknown = Asked(searcher=found, queries=(Query(parts=(Part(key="?"),)),), num_hits=1)
        return await asyncio.gather(*asks, batcher.ask(unknown), return_exceptions=True)

    red, boom, blue, unknown = run(use)
    assert red[0].hits[0].columns["name"] == "red ring"
    assert blue[0].hits[0].columns["name"] == "blue cup"
    assert isinstance(boom, RuntimeError)
    assert isinstance(unknown, ValueError)


def test_the_event_loop_runs_on_and_who_gave_up_is_not_searched_for():
    found = searcher()
    found.may_end.clear()

    async def use(batcher: Batcher) -> None:
        first = asyncio.ensure_future(batcher.ask(asked(found, "red ring")))
        second = asyncio.ensure_future(batcher.ask(asked(found, "blue cup")))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(batcher.ask(asked(found, "green lamp")))
        assert await asyncio.to_thread(found.begun.wait, WAIT_SECONDS)
        late.cancel()
        assert not first.done()
        found.may_end.set()
        await first
        await second

    run(use)
    assert sum(found.batch_sizes) == 2


def test_closing_cancels_what_waits_and_ends_the_thread():
    found = searcher()
    found.may_end.clear()

    async def main() -> list:
        batcher = Batcher(Metrics())
        asks = [asyncio.ensure_future(batcher.ask(asked(found, "ring"))) for _ in range(40)]
        assert await asyncio.to_thread(found.begun.wait, WAIT_SECONDS)
        batcher.close()
        found.may_end.set()
        return await asyncio.gather(*asks, return_exceptions=True)

    results = asyncio.run(main())
    assert {type(result) for result in results} == {list, asyncio.CancelledError}
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("search")]
    for thread in threads:
        thread.join(WAIT_SECONDS)  # its last batch may still be under way
    assert not [thread for thread in threads if thread.is_alive()]


def test_batches_are_counted():
    metrics = Metrics()

    async def main() -> None:
        batcher = Batcher(metrics)
        await asyncio.gather(*(batcher.ask(asked(searcher(), "ring")) for _ in range(2)))
        batcher.close()

    asyncio.run(main())
    assert metrics.registry.get_sample_value("clipmill_batch_queries_sum") == pytest.approx(2)
