"""How memory is watched while something is measured."""

import os
from types import SimpleNamespace

import pytest

from jobs.benches import memory
from jobs.benches.memory import MemoryWatch


def test_a_last_look() -> None:
    with MemoryWatch(os.getpid()) as watch:
        pass
    assert watch.peak_bytes > 10 * 2**20


def test_long_looks_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    rests = []

    def wait(seconds: float) -> bool:
        rests.append(seconds)
        return len(rests) == 4

    watch = MemoryWatch(os.getpid())
    watch._stopped = SimpleNamespace(wait=wait)  # type: ignore[assignment]
    # Looks of a millisecond, a fifth of a second and a second.
    times = iter([0.0, 0.001, 1.0, 1.2, 2.0, 3.0])
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(times))
    watch.run()
    assert rests == pytest.approx([0.5, 0.5, 4.0, 20.0])
