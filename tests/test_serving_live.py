"""A newer snapshot is taken up while requests are answered; one that cannot be opened is not."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from pipelines.errors import IndexMissingError
from tests.serving import Shop, shop_rows
from tests.waiting import wait_until


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def snapshot(client: TestClient) -> int:
    return client.get("/ready").json()["snapshot"]


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_newer_snapshots_are_taken_up_without_a_failed_request(shop: Shop):
    first = shop.searchers[1]
    first.may_end.clear()
    with TestClient(shop.app()) as client, ThreadPoolExecutor(4) as threads:
        stop = False
        seen: list[tuple[int, int, str]] = []

        def ask() -> None:
            while not stop:
                response = client.get("/search?text=ring&k=1")
                body = response.json()
                key = body["hits"][0]["key"] if response.status_code == 200 else body["detail"]
                seen.append((response.status_code, body.get("snapshot"), key))

        def answers_from(number: int) -> bool:
            return any(snapshot == number for _, snapshot, _ in seen)

        asking = [threads.submit(ask) for _ in range(3)]
        try:
            wait_until(first.begun.is_set)
            shop.commit(shop_rows(12, first=24))
            wait_until(lambda: snapshot(client) == 2)
            first.may_end.set()  # a search that began in the snapshot before
            for number in (3, 4):
                wait_until(lambda number=number: answers_from(number - 1))
                assert shop.commit(shop_rows(12, first=12 * number)) == number
            wait_until(lambda: answers_from(4))
        finally:
            first.may_end.set()
            stop = True
        for future in asking:
            future.result()
    assert {status for status, _, _ in seen} == {200}
    # Each answer is of one snapshot: its number and its rows belong together.
    first_of = {1: "k0000", 2: "k0024", 3: "k0036", 4: "k0048"}
    assert {(number, key) for _, number, key in seen} == set(first_of.items())


def test_a_snapshot_that_cannot_be_opened_leaves_the_one_before(shop: Shop, caplog):
    shop.errors[2] = IndexMissingError("no index of snapshot 2; run `clipmill index`")
    with TestClient(shop.app()) as client, caplog.at_level(logging.WARNING):
        assert metric(client, "clipmill_snapshot_behind") == 0
        shop.commit(shop_rows(3))
        wait_until(lambda: client.get("/ready").json()["failure"] is not None)
        assert "run `clipmill index`" in client.get("/ready").json()["failure"]
        assert snapshot(client) == 1
        assert client.get("/search?text=ring").status_code == 200
        assert metric(client, "clipmill_snapshot_behind") == 1
        assert metric(client, 'clipmill_snapshot_openings_total{replica="0",result="failed"}') >= 1
        assert "snapshot 1 answers: no index of snapshot 2" in caplog.text
        del shop.errors[2]  # indexed meanwhile
        wait_until(lambda: snapshot(client) == 2)
        assert client.get("/ready").json()["failure"] is None
        assert metric(client, "clipmill_snapshot_behind") == 0
        assert metric(client, "clipmill_snapshot{") == 2
    assert caplog.text.count("no index of snapshot 2") == 1  # said once, however often it is tried


def test_whatever_an_opening_raises_the_service_goes_on(shop: Shop):
    shop.errors[2] = RuntimeError("Error: 'ret == (1)' failed")
    with TestClient(shop.app()) as client:
        shop.commit(shop_rows(3))
        wait_until(lambda: client.get("/ready").json()["failure"] is not None)
        assert client.get("/search?text=ring").json()["snapshot"] == 1


def test_what_comes_after_an_opening_may_fail_and_is_done_again(shop: Shop):
    app = shop.app()
    live = app.state.service.live
    follow = live._on_opened
    with TestClient(app) as client:
        live._on_opened = lambda opened: 1 / 0
        shop.commit(shop_rows(3))
        wait_until(lambda: "ZeroDivisionError" in (client.get("/ready").json()["failure"] or ""))
        assert snapshot(client) == 1
        live._on_opened = follow
        wait_until(lambda: snapshot(client) == 2)
        assert client.get("/ready").json()["failure"] is None


def test_before_anything_can_be_opened_the_service_says_so_and_waits(shop: Shop):
    shop.errors[1] = IndexMissingError("no index; run `clipmill index`")
    with TestClient(shop.app()) as client:
        assert client.get("/health").status_code == 200
        for path in ("/ready", "/search?text=ring", "/columns", "/items/k0000"):
            response = client.get(path)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "run `clipmill index`" in response.json()["detail"]
        del shop.errors[1]
        wait_until(lambda: client.get("/ready").status_code == 200)


def test_tries_to_open_what_cannot_be_opened_become_rarer(shop: Shop):
    shop.errors[2] = IndexMissingError("no index")
    with TestClient(shop.app(refresh_seconds=0.02)) as client:
        shop.commit(shop_rows(3))
        wait_until(lambda: shop.num_opened >= 3)
        first = shop.num_opened
        client.portal.call(_sleep, 0.3)
        assert shop.num_opened - first <= 4  # without a longer pause each time, 15


async def _sleep(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)
