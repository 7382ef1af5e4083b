"""`clipmill submit` against a job server whose jobs do what the test says."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from aiohttp import encode_basic_auth

from jobs import submit
from jobs.submission import following
from jobs.submission.entrypoint import STDOUT_MARK
from tests.commands import Done, command
from tests.job_server import FakeJobServer, ScriptedJob, fake_job_server, words_of

NIGHTLY = ("nightly", "--catalog", "s3://bucket/products", "--store", "s3://bucket/vectors")


@pytest.fixture
def server() -> Iterator[FakeJobServer]:
    with fake_job_server() as running:
        yield running


@pytest.fixture(autouse=True)
def no_address_and_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_MAX_PAUSE_SECONDS", 0.01)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)


def submitted(server: FakeJobServer, *words: str) -> Done:
    return command(submit.main, [*words, "--address", server.url])


def test_a_log_is_parted_into_stdout_and_stderr(server: FakeJobServer):
    server.coming = [
        ScriptedJob(
            pieces=[
                "Running entrypoint\n30 s: read 5",
                f"0 of 60 rows\n{STDOUT_MARK}" + '{"snap',
                'shot": 1}\nbye\n',
            ]
        )
    ]
    done = submitted(server, *NIGHTLY, "--json")
    assert done.code == 0
    assert done.json == {"snapshot": 1}
    assert "30 s: read 50 of 60 rows\nbye\n" in done.err
    (job_id,) = server.jobs
    assert words_of(server.files(job_id)) == [*NIGHTLY, "--json"]


@pytest.mark.parametrize(
    ("ends", "exit_code", "expected", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 1, 1, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", -9, 1, "failed: the end"),
        ("FAILED", None, 1, "failed: the end"),
        ("STOPPED", None, 1, "was stopped; submit the same again"),
    ],
)
def test_the_exit_status_is_that_of_the_command(
    server: FakeJobServer, ends: str, exit_code: int | None, expected: int, said: str
):
    server.coming = [ScriptedJob(ends=ends, exit_code=exit_code, message="the end")]
    done = submitted(server, *NIGHTLY)
    assert done.code == expected
    assert said in done.err


def test_a_second_one_on_the_same_store_is_refused_until_the_first_has_ended(
    server: FakeJobServer,
):
    server.coming = [ScriptedJob(goes_on=True, pieces=[f"{STDOUT_MARK}first\n"])]
    first = submitted(server, *NIGHTLY, "--detach")
    job_id = first.out.strip()
    assert first.code == 0
    assert job_id.startswith("clipmill-vectors-")
    assert job_id.endswith("-1")
    assert f"clipmill jobs attach {job_id}" in first.err

    others = ("s3://bucket/vectors/", "s3a://key:hush@bucket/vectors?sig=hush")
    embeds = (("embed", "--store", store, "--catalog", "s3://b/c") for store in others)
    for words in (NIGHTLY, *embeds):
        refused = submitted(server, *words)
        assert refused.code == 1
        assert f"{job_id} works on it already since 2025-06-15T15:06:40+00:00" in refused.err
        assert " ".join(NIGHTLY) in refused.err
    assert list(server.jobs) == [job_id]

    other = submitted(server, "embed", "--store", "s3://bucket/others")
    assert other.code == 0

    server.jobs[job_id].goes_on = False
    attached = submitted(server, *NIGHTLY, "--attach")
    assert (attached.code, attached.out) == (0, "first\n")

    again = submitted(server, *NIGHTLY, "--attach", "--detach")
    assert again.code == 2
    again = submitted(server, *NIGHTLY, "--detach")
    assert again.out.strip() == job_id.removesuffix("1") + "2"


@pytest.mark.parametrize("rivals_command", ["nightly", "embed"])
def test_of_two_at_the_same_moment_one_is_refused(server: FakeJobServer, rivals_command: str):
    words = (rivals_command, *NIGHTLY[1:])
    job_id = submitted(server, *words, "--detach").out.strip()
    rival = ScriptedJob(request=server.jobs[job_id].request)
    server.jobs[job_id].status = "SUCCEEDED"
    rival_id = job_id.removesuffix("1") + "2"
    server.rivals = [(rival_id, rival)]
    refused = submitted(server, *NIGHTLY)
    assert refused.code == 1
    assert f"{rival_id} works on it already" in refused.err
    # One that ended as fast as it came is in nobody's way.
    rival.status = "FAILED"
    server.rivals = [(job_id.removesuffix("1") + "3", rival)]
    assert submitted(server, *NIGHTLY, "--detach").out.strip() == job_id.removesuffix("1") + "4"


def test_the_config_and_the_queries_travel(server: FakeJobServer, tmp_path: Path):
    asked = tmp_path / "asked.txt"
    asked.write_text("a red bicycle\n")
    config = tmp_path / "products.yaml"
    config.write_text(
        f"store: s3://bucket/vectors\naddress: {server.url}\nqueries: {asked}\ncarry: [brand]\n"
    )
    done = command(
        submit.main, ["nightly", "--config", str(config), "--catalog", "s3://b/c", "--detach"]
    )
    assert done.code == 0, done.err
    job_id = done.out.strip()
    assert job_id.startswith("clipmill-vectors-")
    files = server.files(job_id)
    assert words_of(files) == [
        *("nightly", "--catalog", "s3://b/c", "--config", "submitted/products.yaml"),
        *("--queries", "submitted/queries/asked.txt"),
    ]
    travelled = yaml.safe_load(files["submitted/products.yaml"])
    assert travelled["carry"] == ["brand"]
    assert "address" not in travelled
    assert files["submitted/queries/asked.txt"] == b"a red bicycle\n"


def test_secrets_are_in_no_record_of_the_job_and_in_no_message(
    server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BUCKET_KEY", "hush-value")
    words = (
        "embed",
        "--store",
        "s3://me:hush-password@x/s?sig=hush-sig",
        "--catalog",
        "s3://b/c",
    )
    done = submitted(server, *words, "--env", "BUCKET_KEY", "--detach")
    assert done.code == 0
    request = dict(server.jobs[done.out.strip()].request)
    runtime_env = request.pop("runtime_env")
    stop_seconds = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
    assert runtime_env["env_vars"] == {**stop_seconds, "BUCKET_KEY": "hush-value"}
    assert request["metadata"]["clipmill_store"] == "s3://***@x/s?***"
    assert request["metadata"]["clipmill_catalog"] == "s3://b/c"
    assert "hush" not in json.dumps(request) + done.out + done.err
    # The command itself has all of it.
    assert words_of(server.files(done.out.strip())) == list(words)


def test_what_the_driver_reserves_is_said(server: FakeJobServer):
    done = submitted(
        server,
        *NIGHTLY,
        "--detach",
        *("--entrypoint-num-cpus", "2", "--entrypoint-memory", "1000"),
        *("--entrypoint-resources", '{"driver": 1}'),
    )
    request = server.jobs[done.out.strip()].request
    assert request["entrypoint_num_cpus"] == 2
    assert request["entrypoint_memory"] == 1000
    assert request["entrypoint_resources"] == {"driver": 1}
    assert "entrypoint_num_gpus" not in request


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say which before its options"),
        (("--store", "s3://b/s"), "say which before its options"),
        (("query", "--store", "s3://b/s"), "run `clipmill query` without submit"),
        (("embed", "--store", "vectors"), "--store vectors: relative"),
        (("embed", "--store=vectors"), "--store vectors: relative"),
        (("engine", "build", "--checkpoint", "jobs"), "--checkpoint jobs: relative"),
        (("index", "--store", "s3://b/s", "--page", "plots.html"), "--page"),
        (("embed", "--env", "A=hush"), "--env A: a name alone"),
        (("embed", "--env", "NOT_SET_ANYWHERE"), "--env NOT_SET_ANYWHERE: not set"),
        (("embed", "--config", "/nowhere.yaml"), "--config /nowhere.yaml"),
        (("embed", "--entrypoint-resources", '{"a": "b"}'), "expected a JSON object"),
        (("embed", "--entrypoint-num-cpus", "-1"), "num_cpus must be at least 0"),
        (("nightly", "--store", "s3://b/s", "--queries", "/nowhere.txt"), "--queries /nowhere.txt"),
    ],
)
def test_what_cant_be_submitted_is_a_usage_error(
    server: FakeJobServer, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
):
    monkeypatch.chdir(Path(submit.__file__).parent.parent)
    done = submitted(server, *words)
    assert done.code == 2
    assert message in done.err
    assert "hush" not in done.err
    assert not server.jobs


def test_the_address_is_said_or_in_the_environment(
    server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
):
    missing = command(submit.main, NIGHTLY)
    assert missing.code == 2
    assert "http://HEAD:8265" in missing.err
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert command(submit.main, NIGHTLY).code == 2
    assert command(submit.main, [*NIGHTLY, "--address", "head:6379"]).code == 2
    monkeypatch.setenv("RAY_ADDRESS", server.url)
    assert command(submit.main, NIGHTLY).code == 0
    # What is said comes before it.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert submitted(server, *NIGHTLY).code == 0
    assert len(server.jobs) == 2


def test_a_head_that_does_not_answer_is_an_error_with_the_way_out():
    done = command(submit.main, [*NIGHTLY, "--address", "http://127.0.0.1:9"])
    assert done.code == 1
    assert "no job server of Ray answers at http://127.0.0.1:9" in done.err
    assert "ray dashboard" in done.err


def test_neither_the_address_nor_what_the_server_says_shows_a_password(server: FakeJobServer):
    server.coming = [ScriptedJob(ends="FAILED", exit_code=None, message="at s3://u:hush@b: no")]
    address = server.url.replace("://", "://user:hush@")
    done = command(submit.main, [*NIGHTLY, "--address", address])
    (job_id,) = server.jobs
    assert done.code == 1
    assert f"submitted {job_id} to {server.url}\n" in done.err
    assert "failed: at s3://***@b: no" in done.err
    assert "hush" not in done.err
    assert server.authorizations == {encode_basic_auth("user", "hush")}


def test_ctrl_c_leaves_the_job_running(server: FakeJobServer, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "follow", interrupted)
    server.coming = [ScriptedJob(goes_on=True)]
    done = submitted(server, *NIGHTLY)
    (job_id,) = server.jobs
    assert done.code == 130
    assert f"clipmill jobs attach {job_id}" in done.err
    assert server.jobs[job_id].status == "RUNNING"


WITHOUT_MODELS = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refused())
from jobs.cli import main
main({words})
"""


def test_a_client_needs_ray_alone(server: FakeJobServer):
    refused = {"PIL", "duckdb", "faiss", "fsspec", "numpy", "onnxruntime", "pyarrow", "rich"}
    refused |= {"torch", "transformers", "xxhash"}
    words = ["submit", *NIGHTLY, "--detach", "--address", server.url]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODELS.format(refused=refused, words=words)],
        cwd=Path(submit.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in server.jobs
