"""Engines and plans are built once, published whole, and anew when damaged or half built."""

import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from engine.errors import EngineError
from engine.manifest import read_manifest
from engine.publishing.leases import Lease, LeaseQueue, LeaseTiming
from engine.registry import Engine, Registry, default_engines_uri, engine_artifact, plan_artifact
from tests.engines import FP32_ID, PLAN_ID, flip_byte, write_engine, write_plan
from tests.object_store import s3_bucket
from tests.ray_nodes import ray_nodes

REPOSITORY_DIR = Path(__file__).resolve().parents[1]
TIMING = LeaseTiming(beat_seconds=0.2, expiry_seconds=1.5)
NUM_ASKERS = 8

# Forks askers, each a node of its own if the root is remote, who then ask all at once. A build
# writes a line to a log.
ASK = """
import os, sys, time
from pathlib import Path
from engine.publishing.leases import LeaseTiming
from engine.registry import Registry
from tests.engines import FP32_ID, write_engine

uri, log, caches, num_askers = sys.argv[1:]
timing = LeaseTiming(beat_seconds=0.2, expiry_seconds=600)

def build(directory):
    with open(log, "a") as file:
        file.write("built\\n")
    time.sleep(0.5)
    return write_engine(directory, content=str(os.getpid()).encode())

start = time.time() + 0.5
children = []
for asker in range(int(num_askers)):
    child = os.fork()
    if child == 0:
        os.environ["XDG_CACHE_HOME"] = f"{caches}/{asker}"
        time.sleep(max(0, start - time.time()))
        try:
            found = Registry(uri, lease_timing=timing).obtain(FP32_ID, build)
            answer = (found.directory / "image.onnx").read_text()
        except BaseException as error:
            answer = repr(error)
        os.write(1, f"{answer}\\n".encode())
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""

# Builds half, says so, and goes on when it is told to.
BUILD_HALF = """
import sys
from engine.publishing.leases import LeaseTiming
from engine.registry import Registry
from tests.engines import FP32_ID, write_engine

def build(directory):
    (directory / "image.onnx").write_bytes(b"half")
    print("half", flush=True)
    sys.stdin.readline()
    return write_engine(directory, content=b"first")

timing = LeaseTiming(beat_seconds=0.2, expiry_seconds=1.5)
found = Registry(sys.argv[1], lease_timing=timing).obtain(FP32_ID, build)
print((found.directory / "image.onnx").read_text(), flush=True)
"""


@contextmanager
def python(script: str, *arguments: object, cache: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY_DIR,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def building(content: bytes) -> Callable[[Path], object]:
    return lambda directory: write_engine(directory, content=content)


def never(directory: Path) -> None:
    raise AssertionError(f"built in {directory}")


def content_of(engine: Engine | None) -> bytes:
    assert engine is not None
    assert engine.directory.name == FP32_ID == engine.manifest.engine_id
    engine_artifact(FP32_ID).verify(engine.directory)
    return (engine.directory / "image.onnx").read_bytes()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture
def remote_uri(bucket: str, tmp_path: Path) -> str:
    return f"{bucket}/{tmp_path.name}/engines"


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "engines")
    return str(request.getfixturevalue("remote_uri"))


@pytest.fixture
def on_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on this process is on a node of that name."""
    return lambda name: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{name}"))


@pytest.fixture
def registry(uri: str, on_node: Callable[[str], None]) -> Registry:
    on_node("a")
    return Registry(uri, lease_timing=TIMING)


def test_an_engine_is_built_once_and_found_again(registry: Registry):
    assert registry.find(FP32_ID) is None
    assert registry.manifest(FP32_ID) is None
    assert registry.engine_ids() == []
    assert content_of(registry.obtain(FP32_ID, building(b"graph"))) == b"graph"
    found = registry.obtain(FP32_ID, never)
    assert content_of(found) == b"graph"
    assert registry.find(FP32_ID) == found
    assert registry.manifest(FP32_ID) == found.manifest == read_manifest(found.directory)
    assert registry.engine_ids() == [FP32_ID]


def test_a_plan_is_built_once_under_its_engine(registry: Registry):
    with pytest.raises(EngineError, match=r"no whole engine .* run `clipmill engine build`"):
        registry.obtain_plan(FP32_ID, PLAN_ID, never)
    engine = registry.obtain(FP32_ID, building(b"graph"))
    assert registry.plan_ids(FP32_ID) == []
    directory = registry.obtain_plan(FP32_ID, PLAN_ID, write_plan)
    assert directory == engine.directory / "plans" / PLAN_ID
    plan_artifact(FP32_ID, PLAN_ID).verify(directory)
    assert registry.obtain_plan(FP32_ID, PLAN_ID, never) == directory
    assert registry.plan_ids(FP32_ID) == [PLAN_ID]
    assert registry.find(FP32_ID) == engine


def test_a_build_that_fails_leaves_nothing_and_holds_nobody_up(registry: Registry):
    def fail(directory: Path) -> None:
        (directory / "image.onnx").write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        registry.obtain(FP32_ID, fail)
    assert registry.find(FP32_ID) is None
    patient = Registry(registry.uri, lease_timing=LeaseTiming(expiry_seconds=600))
    start = time.monotonic()
    assert content_of(patient.obtain(FP32_ID, building(b"graph"))) == b"graph"
    assert time.monotonic() - start < 600


def test_an_engine_under_another_name_is_none(registry: Registry):
    with pytest.raises(EngineError, match=f"of another engine, {FP32_ID}"):
        registry.obtain("fp32-other", building(b"graph"))
    assert registry.find("fp32-other") is None


def test_of_eight_processes_at_once_one_builds(uri: str, tmp_path: Path):
    log = tmp_path / "log"
    with python(ASK, uri, log, tmp_path / "nodes", NUM_ASKERS, cache=tmp_path) as process:
        answers = [line_of(process) for _ in range(NUM_ASKERS)]
        assert process.wait() == 0
    assert log.read_text() == "built\n"
    assert answers[0].isdecimal()
    assert answers == answers[:1] * NUM_ASKERS


def test_a_killed_builder_is_followed_by_the_next(registry: Registry, tmp_path: Path):
    with python(BUILD_HALF, registry.uri, cache=tmp_path / "cache-a") as builder:
        assert line_of(builder) == "half"
        builder.kill()
        builder.wait()
    assert len(list(registry.local.directory.glob(".building/*/*/image.onnx"))) == 1
    assert registry.find(FP32_ID) is None
    start = time.monotonic()
    assert content_of(registry.obtain(FP32_ID, building(b"second"))) == b"second"
    if not registry.root.is_local:
        assert time.monotonic() - start > TIMING.expiry_seconds
    assert list(registry.local.directory.glob(".building/*/*/image.onnx")) == []


def test_a_builder_that_was_paused_takes_what_the_next_one_built(
    remote_uri: str, on_node: Callable[[str], None], tmp_path: Path
):
    on_node("b")
    registry = Registry(remote_uri, lease_timing=TIMING)
    with python(BUILD_HALF, remote_uri, cache=tmp_path / "cache-a") as paused:
        assert line_of(paused) == "half"
        paused.send_signal(signal.SIGSTOP)
        assert content_of(registry.obtain(FP32_ID, building(b"second"))) == b"second"
        paused.send_signal(signal.SIGCONT)
        assert paused.stdin is not None
        paused.stdin.write("\n")
        paused.stdin.flush()
        assert line_of(paused) == "second"
        assert paused.wait() == 0
    shutil.rmtree(registry.local.directory)
    assert content_of(registry.find(FP32_ID)) == b"second"


@pytest.mark.parametrize("name", ["image.onnx", "weights/image.onnx"])
def test_a_flipped_byte_of_an_engine_is_refused_and_mended(
    registry: Registry, name: str, caplog: pytest.LogCaptureFixture
):
    directory = registry.obtain(FP32_ID, building(b"first")).directory
    flip_byte(directory / name)
    with caplog.at_level(logging.WARNING):
        found = registry.find(FP32_ID)
    assert f"{FP32_ID} is damaged and not used" in caplog.text
    if registry.root.is_local:
        assert found is None
        assert content_of(registry.obtain(FP32_ID, building(b"second"))) == b"second"
    else:  # the root has it whole
        assert content_of(found) == b"first"


def test_a_flipped_byte_of_a_plan_is_refused_and_mended(
    registry: Registry, caplog: pytest.LogCaptureFixture
):
    registry.obtain(FP32_ID, building(b"graph"))
    directory = registry.obtain_plan(FP32_ID, PLAN_ID, write_plan)
    flip_byte(directory / "image.plan")
    with caplog.at_level(logging.WARNING):
        mended = registry.obtain_plan(FP32_ID, PLAN_ID, write_plan)
    assert mended == directory
    assert f"{PLAN_ID} is damaged and not used" in caplog.text
    plan_artifact(FP32_ID, PLAN_ID).verify(directory)


def test_an_engine_of_a_newer_clipmill_is_neither_used_nor_replaced(registry: Registry):
    registry.obtain(FP32_ID, building(b"graph"))
    path = f"{FP32_ID}/manifest.json"
    manifest = registry.root.read(path)
    shutil.rmtree(registry.local.directory / FP32_ID)
    newer = manifest.replace(b'"format_version": 2', b'"format_version": 99')
    registry.root.publish(path, newer)
    for ask in (lambda: registry.find(FP32_ID), lambda: registry.obtain(FP32_ID, never)):
        with pytest.raises(EngineError, match=r"manifest\.json: written by a newer Clipmill"):
            ask()
    assert registry.root.read(path) == newer


def test_another_node_fetches_what_one_has_built(
    remote_uri: str, on_node: Callable[[str], None], tmp_path: Path
):
    registry = Registry(remote_uri, lease_timing=TIMING)
    on_node("a")
    built = registry.obtain(FP32_ID, building(b"graph"))
    plan = registry.obtain_plan(FP32_ID, PLAN_ID, write_plan)
    on_node("b")
    fetched = registry.obtain(FP32_ID, never)
    assert content_of(fetched) == b"graph"
    assert fetched.directory.parent != built.directory.parent
    assert fetched.directory.is_relative_to(tmp_path / "cache-b" / "clipmill" / "engines-of")
    fetched_plan = registry.obtain_plan(FP32_ID, PLAN_ID, never)
    assert fetched_plan == fetched.directory / "plans" / PLAN_ID
    assert (fetched_plan / "image.plan").read_bytes() == (plan / "image.plan").read_bytes()
    on_node("c")
    assert content_of(registry.find(FP32_ID)) == b"graph"


def test_a_copy_is_used_when_the_root_is_out_of_reach(
    remote_uri: str, on_node: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    on_node("a")
    registry = Registry(remote_uri, lease_timing=TIMING)
    registry.obtain(FP32_ID, building(b"graph"))
    with monkeypatch.context() as patch:
        patch.setattr(registry, "root", Registry("s3://no-such-bucket/engines").root)
        assert content_of(registry.find(FP32_ID)) == b"graph"
        assert content_of(registry.obtain(FP32_ID, never)) == b"graph"


def test_damage_on_the_root_is_refused_and_mended_for_all(
    remote_uri: str, on_node: Callable[[str], None], caplog: pytest.LogCaptureFixture
):
    registry = Registry(remote_uri, lease_timing=TIMING)
    on_node("a")
    registry.obtain(FP32_ID, building(b"first"))
    registry.obtain_plan(FP32_ID, PLAN_ID, write_plan)
    for name in registry.root.names(f"{FP32_ID}/files"):
        registry.root.publish(f"{FP32_ID}/files/{name}", b"something else")
    on_node("b")
    with caplog.at_level(logging.WARNING):
        assert registry.find(FP32_ID) is None
    assert f"engines {remote_uri}: damaged and not used" in caplog.text
    assert content_of(registry.obtain(FP32_ID, building(b"second"))) == b"second"
    assert registry.plan_ids(FP32_ID) == []  # made from other files
    on_node("c")
    assert content_of(registry.obtain(FP32_ID, never)) == b"second"
    on_node("a")  # whole from before
    assert content_of(registry.obtain(FP32_ID, never)) == b"first"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_was_built_or_mended_just_before_the_lease_was_taken_is_not_built_again(
    remote_uri: str,
    on_node: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    is_damaged: bool,
):
    registry = Registry(remote_uri, lease_timing=TIMING)
    if is_damaged:
        on_node("a")
        registry.obtain(FP32_ID, building(b"graph"))
        for name in registry.root.names(f"{FP32_ID}/files"):
            registry.root.publish(f"{FP32_ID}/files/{name}", b"something else")
    take = LeaseQueue.take

    def late(queue: LeaseQueue) -> Lease | None:
        monkeypatch.setattr(LeaseQueue, "take", take)
        on_node("b")
        registry.obtain(FP32_ID, building(b"graph"))
        on_node("c")
        return take(queue)

    on_node("c")
    monkeypatch.setattr(LeaseQueue, "take", late)
    assert content_of(registry.obtain(FP32_ID, never)) == b"graph"
    assert LeaseQueue.take is take


def test_a_half_published_engine_is_ignored(remote_uri: str, on_node: Callable[[str], None]):
    on_node("a")
    registry = Registry(remote_uri, lease_timing=TIMING)
    registry.root.publish(f"{FP32_ID}/files/0123-image.onnx", b"half")
    assert registry.find(FP32_ID) is None
    assert content_of(registry.obtain(FP32_ID, building(b"graph"))) == b"graph"


def test_a_root_that_cannot_be_written_says_what_to_do(
    on_node: Callable[[str], None], bucket: str, tmp_path: Path
):
    on_node("a")
    (tmp_path / "file").write_text("")
    for uri in (str(tmp_path / "file" / "engines"), "s3://no-such-bucket/engines"):
        registry = Registry(uri, lease_timing=TIMING)
        assert registry.find(FP32_ID) is None
        with pytest.raises(EngineError) as caught:
            registry.obtain(FP32_ID, never)
        for part in (uri, "cannot be written", "name another with --engines or $CLIPMILL_ENGINES"):
            assert part in str(caught.value)
    with pytest.raises(EngineError, match=r"engines nope://engines: .*nope"):
        Registry("nope://engines")


def test_a_root_that_nobody_answers_for_says_so(
    on_node: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    on_node("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    s3fs.S3FileSystem.clear_instance_cache()
    registry = Registry("s3://unreached/engines")
    try:
        for ask in (lambda: registry.find(FP32_ID), lambda: registry.obtain(FP32_ID, never)):
            with pytest.raises(EngineError, match=r"cannot be read: Could not connect.*--engines"):
                ask()
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_cache_that_cannot_be_written_says_what_to_do(
    remote_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"file/clipmill/engines-of/.* name another \$XDG_CACHE"):
        Registry(remote_uri).find(FP32_ID)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_only_ids_are_taken_for_ids(tmp_path: Path, name: str):
    registry = Registry(str(tmp_path))
    with pytest.raises(ValueError, match="expected letters, digits"):
        registry.find(name)
    with pytest.raises(ValueError, match="expected letters, digits"):
        registry.obtain_plan(FP32_ID, name, never)


def test_a_registry_travels_to_workers(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    registry.obtain(FP32_ID, building(b"graph"))
    travelled = pickle.loads(pickle.dumps(registry))
    assert content_of(travelled.find(FP32_ID)) == b"graph"


def test_a_relative_folder_means_the_same_on_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    registry = Registry("engines")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    travelled = pickle.loads(pickle.dumps(registry))
    assert travelled.obtain(FP32_ID, write_engine).directory == tmp_path / "engines" / FP32_ID


def test_default_uri(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CLIPMILL_ENGINES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_engines_uri() == str(tmp_path / "clipmill" / "engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_engines_uri() == os.path.expanduser("~/.cache/clipmill/engines")
    monkeypatch.setenv("CLIPMILL_ENGINES", "s3://bucket/engines")
    assert default_engines_uri() == "s3://bucket/engines"


# One task on each node; the nodes of a test share a disk, so each names a cache of its own.
ASK_CLUSTER = """
import os, sys, time
import ray
from engine.publishing.leases import LeaseTiming
from engine.registry import Registry
from tests.engines import FP32_ID, write_engine

address, uri, log, caches = sys.argv[1:]
ray.init(address, log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def ask(registry, start):
    node = ray.get_runtime_context().get_node_id()
    os.environ["XDG_CACHE_HOME"] = f"{caches}/{node}"

    def build(directory):
        with open(log, "a") as file:
            file.write("built\\n")
        time.sleep(0.5)
        return write_engine(directory, content=node.encode())

    time.sleep(max(0, start - time.time()))
    found = registry.obtain(FP32_ID, build)
    return node, str(found.directory), (found.directory / "image.onnx").read_text()

registry = Registry(uri, lease_timing=LeaseTiming(beat_seconds=0.2, expiry_seconds=600))
start = time.time() + 5
for answer in ray.get([ask.remote(registry, start) for _ in range(3)]):
    print(*answer)
"""


def test_of_three_nodes_of_a_cluster_one_builds(remote_uri: str, tmp_path: Path):
    log = tmp_path / "log"
    with ray_nodes(3) as cluster:
        done = subprocess.run(
            [sys.executable, "-c", ASK_CLUSTER, cluster.gcs, remote_uri, log, tmp_path],
            cwd=REPOSITORY_DIR,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    nodes, directories, contents = zip(
        *(line.split() for line in done.stdout.splitlines()), strict=True
    )
    assert log.read_text() == "built\n"
    assert len(set(nodes)) == len(set(directories)) == 3
    assert len(set(contents)) == 1
    assert contents[0] in nodes
