"""A port for metrics that cannot be had is found before a run begins, and delays no run's record.

No Ray is started.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import embed, nightly
from jobs.stopping import Terminated
from pipelines.runs.run_history import find_run
from pipelines.store import Store
from tests.commands import Done, command
from tests.ports import free_port


@pytest.fixture(autouse=True)
def no_ray_and_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for module in (embed, nightly):
        monkeypatch.setattr(module, "ray_cluster", lambda *_, **__: pytest.fail("begun"))


@pytest.fixture(params=["", "127.0.0.1"])
def taken_port(request: pytest.FixtureRequest) -> Iterator[int]:
    with socket.socket() as other:
        other.bind((request.param, 0))
        other.listen()
        yield other.getsockname()[1]


def run(module, folder: Path, *words: object) -> Done:
    where = ["--catalog", folder / "catalog", "--store", folder / "store", "--checkpoint", "x"]
    return command(module.main, [str(word) for word in (*where, *words)])


@pytest.mark.parametrize("words", [(embed,), (nightly,), (nightly, "--dry-run")])
def test_a_port_that_another_has_is_named_and_nothing_is_put_on_record(
    tmp_path: Path, taken_port: int, words: tuple
):
    module, *options = words
    done = run(module, tmp_path, *options, "--metrics-port", taken_port)
    assert done.code == 1
    assert f"--metrics-port {taken_port}: " in done.err
    assert "name one that is free" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics-port", 80), "expected 1024 to 65535"),
        (("--metrics-port", 8080, "--address", "head:6379"), "the cluster at head:6379 has ports"),
    ],
)
def test_a_port_that_cannot_be_meant_is_a_usage_error(tmp_path: Path, options: tuple, message: str):
    done = run(nightly, tmp_path, *options)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_free_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def begin(address: None, *, metrics_port: int) -> None:
        asked.append(metrics_port)
        raise KeyboardInterrupt

    monkeypatch.setattr(nightly, "ray_cluster", begin)
    port = free_port()
    assert run(nightly, tmp_path, "--metrics-port", port).code == 130
    assert asked == [port]


@pytest.mark.parametrize(("module", "work"), [(embed, "embed"), (nightly, "run_night")])
def test_how_a_run_ended_is_on_record_before_its_metrics_are_scraped_for_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module, work: str
):
    store = Store(str(tmp_path / "store"))
    statuses = []

    @contextmanager
    def cluster(address: None, *, metrics_port: int) -> Iterator[None]:
        try:
            yield
        finally:
            statuses.append(find_run(store, None).status)

    def stopped(*_, **__) -> None:
        statuses.append(find_run(store, None).status)
        raise Terminated

    monkeypatch.setattr(module, "ray_cluster", cluster)
    monkeypatch.setattr(module, work, stopped)
    assert run(module, tmp_path, "--metrics-port", free_port()).code == 143
    assert statuses == ["running", "stopped"]
