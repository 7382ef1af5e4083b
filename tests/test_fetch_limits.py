"""Tests of pipelines/fetching/fetch_limits.py, and of what batches of fetches hold and wait for."""

import asyncio
import itertools
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.registry import known_implementations
from fsspec.spec import AbstractFileSystem

from pipelines.fetching import fetch, fetch_limits, http_fetch
from pipelines.fetching.fetch import NUM_FETCHES, FetchFailure, fetch_all
from pipelines.fetching.fetch_limits import MAX_UNANSWERED, ByteBudget, NoRoomError, Unanswered
from pipelines.fetching.fetch_policy import FetchPolicy
from tests.image_server import BIG_BYTES, CONTENT, ImageServer, image_server
from tests.waiting import WAIT_SECONDS, wait_until

MAX_BYTES = 1_000_000


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with image_server("0.0.0.0") as server:
        server.address = "127.0.0.1"
        yield server


def policy(**options) -> FetchPolicy:
    return FetchPolicy(allow=("127.0.0.0/8", "file:"), **options)


def details(contents: list[bytes | FetchFailure]) -> list[str]:
    return [content.detail if isinstance(content, FetchFailure) else "" for content in contents]


def of_uris(uris: list[str], policy: FetchPolicy) -> list[bytes | FetchFailure]:
    return list(fetch_all([uri.encode() for uri in uris], max_bytes=MAX_BYTES, policy=policy))


def test_what_has_no_room_waits_until_others_are_taken():
    async def main() -> None:
        budget = ByteBudget(asyncio.get_running_loop(), max_bytes=100)
        for number in range(3):
            await budget.reserve(number, num_bytes=30)
        with pytest.raises(NoRoomError, match="50") as caught:
            budget.hold(1, num_bytes=50)
        assert caught.value.num_bytes == 50
        budget.hold(0, num_bytes=500)  # its turn
        waiting = asyncio.ensure_future(budget.reserve(1, num_bytes=50))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        budget.keep(0, num_bytes=40)  # with 30 of another: 70
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await asyncio.to_thread(budget.take, 1)
        await asyncio.wait_for(waiting, WAIT_SECONDS)
        budget.keep(1, num_bytes=0)
        with pytest.raises(NoRoomError):
            budget.hold(1, num_bytes=1)  # of a thread that was left behind
        budget.hold(2, num_bytes=100)

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_sizes_all_come_and_only_one_goes_beyond(seed: int):
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 20, 60, 100, 250]) for _ in range(60)]
    held: dict[int, int] = {}
    most = 0

    async def main() -> None:
        budget = ByteBudget(asyncio.get_running_loop(), max_bytes=100)
        slots = asyncio.Semaphore(8)

        async def fetched(number: int) -> None:
            async with slots:
                need = 10
                while True:
                    await budget.reserve(number, num_bytes=need)
                    await asyncio.sleep(rng.random() / 1000)
                    try:
                        budget.hold(number, num_bytes=sizes[number])
                        break
                    except NoRoomError as error:
                        need = error.num_bytes
                held[number] = sizes[number]
                nonlocal most
                most = max(most, sum(held.values()) - max(held.values()))
                await asyncio.sleep(rng.random() / 1000)
                budget.keep(number, num_bytes=sizes[number])

        tasks = [asyncio.ensure_future(fetched(number)) for number in range(len(sizes))]
        for number, task in enumerate(tasks):
            held.pop(number - 1, None)
            budget.take(number)
            await asyncio.wait_for(task, WAIT_SECONDS)

    asyncio.run(main())
    assert most <= 100


@pytest.mark.parametrize("unsaid", ["", ",unsaid"])
def test_a_batch_is_never_in_memory_as_a_whole(server, monkeypatch, unsaid):
    monkeypatch.setattr(fetch, "MAX_AHEAD_BYTES", 2 * BIG_BYTES)
    for module in (fetch, http_fetch):  # so that many begin, and find no room
        monkeypatch.setattr(module, "FIRST_BYTES", BIG_BYTES // 8)
    num_images = 60
    uris = [server.uri(f"big?{number}{unsaid}").encode() for number in range(num_images)]
    tracemalloc.start()
    try:
        contents = fetch_all(uris, max_bytes=MAX_BYTES, policy=policy())
        first = next(contents)
        time.sleep(0.3)
        num_asked = len(server.requests)
        found = [len(first), *map(len, contents)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [BIG_BYTES] * num_images
    assert num_asked < 3 * NUM_FETCHES  # one without room is begun anew
    assert peak < num_images * BIG_BYTES / 2


def test_they_come_in_their_order_however_little_room_there_is(server, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_AHEAD_BYTES", 1000)
    uris = [server.uri(f"big?{number}") for number in range(8)]
    uris[3:3] = [server.uri("number?7"), server.uri("missing"), "nope://a/b", "\udcff"]
    encoded = [uri.encode("utf-8", "surrogateescape") for uri in uris]
    contents = list(fetch_all(encoded, max_bytes=MAX_BYTES, policy=policy()))
    assert contents.pop(3) == b"7"
    failures = [contents.pop(3) for _ in range(3)]
    assert [type(failure) for failure in failures] == [FetchFailure] * 3
    assert contents == [bytes([number]) * BIG_BYTES for number in range(8)]


def test_who_stops_taking_ends_the_fetches_and_none_begins_meanwhile(server, monkeypatch):
    begin = fetch._Batch.begin

    def begin_what_is_cancelled_slowly(self, number: int, uri: bytes) -> Future:
        future = begin(self, number, uri)
        cancel = future.cancel
        future.cancel = lambda: (cancel(), time.sleep(0.01))
        return future

    monkeypatch.setattr(fetch._Batch, "begin", begin_what_is_cancelled_slowly)
    uris = [server.uri("drip").encode() for _ in range(3 * NUM_FETCHES)]
    contents = fetch_all(
        [server.uri("whole").encode(), *uris], max_bytes=MAX_BYTES, policy=policy(max_seconds=600)
    )
    assert next(contents) == CONTENT
    wait_until(lambda: len(server.requests) == 1 + NUM_FETCHES)
    contents.close()
    wait_until(lambda: len(server.left) >= NUM_FETCHES)
    assert len(server.requests) == 1 + NUM_FETCHES


def test_a_host_that_lets_all_wait_is_not_asked_again(server, no_batch_limit):
    dead, alive = [server.uri("drip")] * 120, server.uri("whole", host="127.0.0.2")
    *contents, last = of_uris([*dead, alive], policy(max_seconds=0.5))
    assert details([last])[0] in ("", "timeout: not there after 0.5 seconds")
    said = details(contents)
    assert said[0] == "timeout: not there after 0.5 seconds"
    assert said[-1] == (
        f"timeout: {MAX_UNANSWERED} fetches in a row from 127.0.0.1:{server.server_port} took all "
        "their time, so that it was not asked again"
    )
    assert len(server.requests) <= MAX_UNANSWERED + NUM_FETCHES + 1


def test_a_host_that_answers_now_and_then_is_asked_on():
    unanswered = Unanswered()
    for _ in range(3):
        for _ in range(MAX_UNANSWERED - 1):
            unanswered.count("slow")
        assert not unanswered.is_lost("slow")
        unanswered.clear("slow")
    for _ in range(MAX_UNANSWERED):
        unanswered.count("dead")
    assert unanswered.is_lost("dead")
    assert not unanswered.is_lost("slow")


def test_a_batch_of_hosts_that_let_it_wait_ends(server, monkeypatch):
    """Each of another name, so that none of them is known to be slow."""
    monkeypatch.setattr(fetch, "BATCH_LIMITS", 2)
    uris = [server.uri("drip", host=f"127.0.0.{number}") for number in range(2, 162)]
    said = details(of_uris(uris, policy(max_seconds=0.3)))
    assert len(server.requests) <= len(uris) / 2  # of ten rounds, the first two or three
    late = "timeout: the images of its batch were waited for more than 0.6 seconds"
    assert set(said) <= {"timeout: not there after 0.3 seconds", late}
    assert said[-1] == late


@pytest.mark.parametrize(("bytes_per_second", "all_come"), [(10, True), (10**12, False)])
def test_who_gives_much_is_waited_for_longer(server, monkeypatch, bytes_per_second, all_come):
    clock = itertools.count(step=100)  # each look at it takes 100 s
    monkeypatch.setattr(fetch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(fetch, "BATCH_LIMITS", 1)
    monkeypatch.setattr(fetch, "MIN_BYTES_PER_SECOND", bytes_per_second)
    monkeypatch.setattr(fetch, "NUM_FETCHES", 1)
    contents = of_uris([server.uri("piecemeal")] * 10, policy(max_seconds=60))
    assert contents[0] == CONTENT
    assert (contents == [CONTENT] * 10) == all_come


class StuckFileSystem(AbstractFileSystem):
    """Whose calls do not come back, and cannot be cancelled."""

    protocol = "stuck"
    released = threading.Event()

    def _open(self, path, *args, **kwargs):
        self.released.wait()
        raise FileNotFoundError(path)


def test_a_call_that_does_not_come_back_is_left_behind(tmp_path, monkeypatch, no_batch_limit):
    monkeypatch.setitem(known_implementations, "stuck", {"class": "Stuck"})
    fsspec.register_implementation("stuck", StuckFileSystem, clobber=True)
    (tmp_path / "a.jpg").write_bytes(CONTENT)
    uris = [f"stuck://host/{number}" for number in range(40)]
    try:
        contents = of_uris(uris, FetchPolicy(allow=("stuck:",), max_seconds=0.3))
        assert set(details(contents)) == {"timeout: not there after 0.3 seconds"}
        assert of_uris([str(tmp_path / "a.jpg")], policy()) == [CONTENT]
    finally:
        StuckFileSystem.released.set()


def test_constants_fit_each_other():
    assert fetch_limits.FIRST_BYTES * NUM_FETCHES <= fetch_limits.MAX_AHEAD_BYTES
