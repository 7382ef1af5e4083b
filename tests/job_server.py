"""A job server with Ray's REST interface, whose jobs do what a test says."""

import asyncio
import io
import json
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.waiting import WAIT_SECONDS

STARTED_MS = 1_750_000_000_000


@dataclass
class ScriptedJob:
    """How a job goes: the pieces of its log, then its end."""

    pieces: Sequence[str] = ()
    ends: str = "SUCCEEDED"
    exit_code: int | None = 0
    message: str = ""
    breaks_after: list[int] = field(default_factory=list)
    """The first connections to its log break after so many pieces."""
    goes_on: bool = False
    """Whether it runs until it is stopped."""
    status: str = "RUNNING"
    request: Mapping[str, Any] = field(default_factory=dict)


class FakeJobServer:
    """What it knows and was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.jobs: dict[str, ScriptedJob] = {}
        self.coming: list[ScriptedJob] = []
        """What the next jobs do."""
        self.packages: dict[str, bytes] = {}
        self.num_log_connections = 0
        self.authorizations: set[str | None] = set()
        """Of all requests."""
        self.rivals: list[tuple[str, ScriptedJob]] = []
        """Others' jobs that arrive just before the next one."""

    def files(self, job_id: str) -> dict[str, bytes]:
        """What travelled with a job: path -> bytes."""
        uri = self.jobs[job_id].request["runtime_env"]["working_dir"]
        with zipfile.ZipFile(io.BytesIO(self.packages[uri.rsplit("/", 1)[-1]])) as package:
            return {name: package.read(name) for name in package.namelist()}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26, middlewares=[self._look])
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/packages/gcs/{name}", self._has_package),
                web.put("/api/packages/gcs/{name}", self._take_package),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{job_id}", self._info),
                web.post("/api/jobs/{job_id}/stop", self._stop),
                web.get("/api/jobs/{job_id}/logs/tail", self._tail),
            ]
        )
        return app

    @web.middleware
    async def _look(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.authorizations.add(request.headers.get("Authorization"))
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0"})

    async def _has_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _take_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response([self._details(job_id) for job_id in self.jobs])

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        while self.rivals:
            rival_id, rival = self.rivals.pop()
            self.jobs[rival_id] = rival
        job_id = asked["submission_id"]
        if job_id in self.jobs:
            return web.Response(status=500, text=f"... {job_id} already exists. ...")
        job = self.coming.pop(0) if self.coming else ScriptedJob()
        job.request = asked
        self.jobs[job_id] = job
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    async def _info(self, request: web.Request) -> web.Response:
        job_id = request.match_info["job_id"]
        if job_id not in self.jobs:
            return web.Response(status=404, text=f"Job {job_id} does not exist")
        return web.json_response(self._details(job_id))

    async def _stop(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["job_id"]]
        job.status, job.exit_code = "STOPPED", None
        return web.json_response({"stopped": True})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        self.num_log_connections += 1
        job = self.jobs[request.match_info["job_id"]]
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        breaks_after = job.breaks_after.pop(0) if job.breaks_after else None
        for number, piece in enumerate(job.pieces):
            if number == breaks_after:
                assert request.transport is not None
                request.transport.abort()
                return socket
            await socket.send_str(piece)
        while job.goes_on and job.status == "RUNNING":
            await asyncio.sleep(0.01)
        if job.status == "RUNNING":
            job.status = job.ends
        return socket

    def _details(self, job_id: str) -> dict[str, Any]:
        job = self.jobs[job_id]
        is_over = job.status != "RUNNING"
        return {
            "type": "SUBMISSION",
            "submission_id": job_id,
            "status": job.status,
            "entrypoint": job.request.get("entrypoint", "sleep 1"),
            "metadata": job.request.get("metadata", {}),
            "message": job.message,
            "start_time": STARTED_MS + 1000 * list(self.jobs).index(job_id),
            "end_time": STARTED_MS + 60_000 if is_over else None,
            "driver_exit_code": job.exit_code if is_over else None,
        }


@contextmanager
def fake_job_server() -> Iterator[FakeJobServer]:
    """A running one, on a free port of this machine."""
    server = FakeJobServer()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.app(), shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = loop.run_until_complete(start())
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=WAIT_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def words_of(files: Mapping[str, bytes]) -> list[str]:
    """The command that travelled."""
    words: list[str] = json.loads(files["submitted/words.json"])
    return words
