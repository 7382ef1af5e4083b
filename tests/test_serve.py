"""`clipmill serve` on a real Ray Serve: over HTTP, through new snapshots, and through a kill."""

import base64
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from jobs import serve
from jobs.benches.load import Load, load
from pipelines.snapshots import commit, rollback
from pipelines.store import Store
from tests.catalogs import scene_rows, stored_snapshot
from tests.commands import command
from tests.ports import free_port
from tests.serving import snapshot_of
from tests.waiting import WAIT_SECONDS, wait_until

ROOT = Path(__file__).resolve().parent.parent
NUM_CLIENTS = 6
# A connection each, since those of a replica that died are lost.
CLIENT = httpx.Client(timeout=WAIT_SECONDS, limits=httpx.Limits(max_keepalive_connections=0))
TEXTS = [row["text"] for row in scene_rows(60)]


@dataclass(frozen=True)
class Service:
    """A service that runs, in a process of its own."""

    url: str
    store_dir: Path
    process: subprocess.Popen

    def replicas(self) -> list[psutil.Process]:
        """Their processes."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return [found for found in processes if _name(found).startswith("ray::ServeReplica")]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, carried_store: Path, engines_dir: Path
) -> Iterator[Service]:
    store_dir = tmp_path_factory.mktemp("served") / "store"
    shutil.copytree(carried_store, store_dir)
    words = [
        *("--store", str(store_dir), "--engines", str(engines_dir), "--port", str(free_port())),
        *("--replicas", "2", "--refresh-seconds", "0.3", "--json"),
        *("--max-seconds", str(WAIT_SECONDS)),
    ]
    command_line = [sys.executable, "-m", "jobs.serve", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command_line, cwd=ROOT, env=env, **pipes) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(WAIT_SECONDS, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        if not line:
            pytest.fail(f"the service did not start: {process.communicate()[1]}")
        yield Service(json.loads(line)["url"], store_dir, process)
        process.kill()


def during_load(service: Service, what: Callable[[Load], None]) -> Load:
    """What comes of a load while something happens to the service, and for a while after.

    Args:
        service: That is asked.
        what: Happens, in a thread; sees what has come by then.
    """
    found = Load()
    with ThreadPoolExecutor(1) as thread:
        happening = thread.submit(what, found)
        is_over = False
        while not is_over:
            is_over = happening.done()
            part = load(service.url, TEXTS, seconds=1, num_clients=NUM_CLIENTS)
            found.statuses += part.statuses
            found.snapshots += part.snapshots
            found.errors += part.errors
        happening.result()
    return found


def test_captions_pictures_and_keys_are_answered_over_http(service: Service):
    assert service.url.startswith("http://127.0.0.1:")
    row = scene_rows(60)[7]
    image = base64.b64encode(row["image"]).decode()
    body = {"queries": [{"parts": [{"text": row["text"]}]}, {"parts": [{"image": image}]}], "k": 5}
    by_text, by_image = CLIENT.post(f"{service.url}/search", json=body).json()["answers"]
    assert row["key"] in [hit["key"] for hit in by_text["hits"]]
    assert by_image["hits"][0]["key"] == row["key"]
    assert by_image["hits"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert by_image["hits"][0]["columns"]["brand"] == "bolt"
    where = {"text": row["text"], "where": ["brand=acme", "price<9"], "among": "text"}
    hits = CLIENT.get(f"{service.url}/search", params=where).json()["hits"]
    assert {hit["key"] for hit in hits} == {"k0000", "k0003", "k0006"}
    assert CLIENT.get(f"{service.url}/items/k0007").json()["columns"]["brand"] == "bolt"


def test_problems_pass_through_rays_proxy(service: Service):
    for path, status in (("/items/a%2Fb", 404), ("/nothing", 404), ("/search?text=a&k=0", 422)):
        response = CLIENT.get(service.url + path)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
    assert "'a/b'" in CLIENT.get(f"{service.url}/items/a%2Fb").json()["detail"]
    too_large = CLIENT.post(f"{service.url}/search", content=b"x" * (33 * 2**20))
    assert too_large.status_code == 413
    assert "text/html" in CLIENT.get(service.url).headers["content-type"]


def test_metrics_are_of_all_replicas(service: Service):
    def snapshots() -> list[str]:
        lines = CLIENT.get(f"{service.url}/metrics").text.splitlines()
        return [line.split()[-1] for line in lines if line.startswith("clipmill_snapshot{")]

    wait_until(lambda: snapshots() == ["1.0", "1.0"])  # one that is slow to answer is left out


def test_new_snapshots_and_a_rollback_cost_no_request(service: Service):
    store = Store(str(service.store_dir))
    first = stored_snapshot(service.store_dir)
    images = tuple(file for file in first.files if file.modality == "image")

    def nights(found: Load) -> None:
        wait_until(lambda: 1 in found.snapshots)
        commit(store, dataclasses.replace(first, number=2, parent=1))
        wait_until(lambda: 2 in found.snapshots)
        # One that is not indexed is not taken up, and what comes after it is.
        commit(store, dataclasses.replace(first, number=3, parent=2, files=images[:0]))
        wait_until(lambda: CLIENT.get(f"{service.url}/ready").json()["failure"] is not None)
        rollback(store, 1)
        wait_until(lambda: 4 in found.snapshots)

    found = during_load(service, nights)
    assert found.errors == []
    assert set(found.statuses) == {200}
    assert {1, 2, 4} == set(found.snapshots)
    wait_until(lambda: snapshot_of(service.url) == 4)


def test_a_killed_replica_costs_what_was_in_flight_and_comes_back(service: Service):
    before = service.replicas()
    assert len(before) == 2

    def kill(found: Load) -> None:
        wait_until(lambda: found.statuses[200] > 20)
        time.sleep(0.3)  # amid a part of the load
        os.kill(before[0].pid, signal.SIGKILL)
        num_answers = found.statuses[200]
        wait_until(lambda: found.statuses[200] > num_answers + 20)

    found = during_load(service, kill)
    assert len(found.errors) <= NUM_CLIENTS
    wait_until(lambda: len({p.pid for p in service.replicas()} - {p.pid for p in before}) == 1)
    wait_until(lambda: CLIENT.get(f"{service.url}/metrics").text.count("\nclipmill_snapshot{") == 2)


def test_sigterm_ends_it_cleanly(service: Service):
    children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    out, err = service.process.communicate(timeout=WAIT_SECONDS)
    assert service.process.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=WAIT_SECONDS)[1] == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--replicas", "0"], 2, "--replicas 0: expected at least 1"),
        (["--port", "99999"], 2, "--port 99999"),
        (["--max-seconds", "0"], 2, "max_seconds=0"),
        (["--token-file", "gone"], 2, "--token-file gone: cannot be read"),
        (["--refresh-seconds", "-1"], 2, "refresh_seconds=-1"),
        ([], 1, "no snapshot; run `clipmill embed` first"),
    ],
)
def test_what_cannot_be_served_is_said_before_ray_starts(
    tmp_path: Path, words: list[str], code: int, says: str
):
    port = [] if "--port" in words else ["--port", str(free_port())]
    done = command(serve.main, ["--store", str(tmp_path / "store"), *port, *words])
    assert done.code == code
    assert says in done.err


def test_a_port_that_is_taken_is_said(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command(serve.main, ["--store", str(tmp_path), "--port", str(port)])
    assert done.code == 1
    assert "cannot be bound to" in done.err


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch):
    (tmp_path / "token").write_text("from-a-file\n")
    assert serve._token(str(tmp_path / "token")) == "from-a-file"
    monkeypatch.setenv(serve.TOKEN_VARIABLE, "from-outside")
    assert serve._token(None) == "from-outside"
    (tmp_path / "token").write_text("two words")
    words = ["--store", str(tmp_path), "--token-file", str(tmp_path / "token")]
    done = command(serve.main, words)
    assert done.code == 2
    assert "two words" not in done.err  # nor in a log
