"""Leases: one holder at a time as long as it lives, and no clock but one's own."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.publishing.folders import Folder
from engine.publishing.leases import LeaseQueue, LeaseTiming, is_released
from tests.object_store import s3_bucket
from tests.waiting import wait_until

TIMING = LeaseTiming(beat_seconds=0.05, expiry_seconds=0.4)


@pytest.fixture
def root(tmp_path: Path) -> Folder:
    return Folder(f"memory://{tmp_path.name}/engines", called="engines", error=EngineError)


@pytest.fixture
def queue(root: Folder) -> Callable[[], LeaseQueue]:
    """Another one who waits."""
    return lambda: LeaseQueue(root, "engine", timing=TIMING)


def test_who_lives_keeps_the_lease(root: Folder):
    timing = LeaseTiming(beat_seconds=0.05, expiry_seconds=1.5)
    lease = LeaseQueue(root, "engine", timing=timing).take()
    assert lease is not None
    with lease:
        waiting = LeaseQueue(root, "engine", timing=timing)
        end = time.monotonic() + 1.3 * timing.expiry_seconds
        while time.monotonic() < end:
            assert waiting.take() is None
            _wait_for_a_beat(root)


def _wait_for_a_beat(root: Folder) -> None:
    """So that who waits sees one, however slow this machine is."""
    before = root.read("leases/engine/00000001.json")
    wait_until(lambda: root.read("leases/engine/00000001.json") != before)


def test_a_lease_that_is_given_back_is_free_at_once(root: Folder, queue: Callable[[], LeaseQueue]):
    first = queue().take()
    assert first is not None
    waiting = queue()
    with first:
        assert waiting.take() is None
    assert waiting.take() is not None
    assert root.list("leases/engine", suffix="") == [
        "leases/engine/00000001.json",
        "leases/engine/00000002.json",
    ]
    assert [is_released(root.read(path)) for path in root.list("leases/engine", suffix="")] == [
        True,
        False,
    ]


def test_a_lease_without_a_beat_is_free_when_it_was_seen_for_long_enough(
    queue: Callable[[], LeaseQueue],
):
    assert queue().take() is not None  # never beats: its process is gone
    time.sleep(TIMING.expiry_seconds)
    waiting = queue()
    assert waiting.take() is None  # seen for the first time, however old it may be
    time.sleep(TIMING.expiry_seconds)
    late = queue()
    assert late.take() is None
    assert waiting.take() is not None
    time.sleep(TIMING.expiry_seconds)
    assert late.take() is None  # the next holder's, seen for the first time


def test_of_two_who_find_it_free_one_takes_it(root: Folder, queue: Callable[[], LeaseQueue]):
    class Slow(Folder):
        """Somebody is quicker between look and take."""

        def create(self, relative: str, content: bytes) -> None:
            assert queue().take() is not None
            super().create(relative, content)

    slow = Slow(root.uri, called="engines", error=EngineError)
    assert LeaseQueue(slow, "engine", timing=TIMING).take() is None
    assert queue().take() is None


def test_leases_of_other_things_are_no_concern(root: Folder, queue: Callable[[], LeaseQueue]):
    assert queue().take() is not None
    assert LeaseQueue(root, "engine/plans/plan", timing=TIMING).take() is not None
    assert LeaseQueue(root, "engine2", timing=TIMING).take() is not None


def test_a_root_out_of_reach_ends_no_build(root: Folder, queue: Callable[[], LeaseQueue]):
    class OutOfReach(Folder):
        def publish(self, relative: str, content: bytes) -> None:
            raise EngineError("out of reach")

    away = OutOfReach(root.uri, called="engines", error=EngineError)
    lease = LeaseQueue(away, "engine", timing=TIMING).take()
    assert lease is not None
    with lease:
        time.sleep(3 * TIMING.beat_seconds)
    assert not is_released(root.read("leases/engine/00000001.json"))


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="beat_seconds=0: expected more than 0"):
        LeaseTiming(beat_seconds=0)
    with pytest.raises(ValueError, match=r"expiry_seconds=9: expected at least two beats of 5"):
        LeaseTiming(expiry_seconds=9)


def test_two_of_one_process_that_ask_an_object_store_at_once_do_not_both_hold_it():
    """Whose answer is lost takes what is there for its own if it is of the same content."""
    with s3_bucket() as uri:
        shared = Folder(f"{uri}/engines", called="engines", error=EngineError)
        queues = [LeaseQueue(shared, "engine", timing=TIMING) for _ in range(8)]
        with ThreadPoolExecutor(len(queues)) as threads:
            taken = list(threads.map(LeaseQueue.take, queues))
    assert sum(lease is not None for lease in taken) == 1
