"""Runs the app in replicas of Ray Serve.

Knows nothing of what the app does. Ray starts a replica anew whose process is gone.
"""

import logging
from collections.abc import Sequence

import ray
from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from engine.errors import ClipmillError
from engine.process_redaction import redact_process
from jobs.serving.app import make_app
from jobs.serving.options import ServiceConfig

APP_NAME = "clipmill"
_DEPLOYMENT = "search"
# A replica refuses by itself what is beyond its limit, with a problem that says so: Ray would let
# it wait without end. The rest is for those who watch.
_SPARE_REQUESTS = 64
_SCRAPE_SECONDS = 2.0
# Threads of a search that is over would spin for the next one, on cores that HTTP needs.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
Families = Sequence[Metric]


@serve.ingress()
class Replica:
    """One process that answers."""

    def __init__(self, config: ServiceConfig) -> None:
        """Ray calls `__serve_build_asgi_app__` next, and then opens what the app needs."""
        redact_process()
        self._config = config
        self._name = serve.get_replica_context().replica_id.unique_id

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = make_app(self._config, replica=self._name, all_families=self._all_families)
        self._service = app.state.service
        return app

    def families(self) -> tuple[str, Families]:
        """This replica's name and counts."""
        return self._name, self._service.metrics.families()

    async def _all_families(self) -> list[tuple[str, Families]]:
        """Those of all replicas: whoever scrapes reaches one of them, and not always the same."""
        handle = serve.get_deployment_handle(_DEPLOYMENT, APP_NAME)
        try:
            found: list[tuple[str, Families]] = await handle.broadcast("families").results_async(
                timeout_s=_SCRAPE_SECONDS
            )
        except (TimeoutError, ray.exceptions.RayError, RayServeException):
            # One of them just went; the next scrape finds those that are left.
            found = [self.families()]
        return sorted(found)


def deploy(config: ServiceConfig, *, host: str, port: int, num_replicas: int) -> str:
    """Start replicas and HTTP on the Ray that this process is connected to.

    Args:
        config: Of the service.
        host: To bind to, on each node that has a replica.
        port: To bind to.
        num_replicas: Processes that answer; each maps the same index files.

    Returns:
        The URL.

    Raises:
        ClipmillError: Ray could not start them.
    """
    options = HTTPOptions(host=host, port=port, keep_alive_timeout_s=75)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options)
    num_cpus = ray.cluster_resources().get("CPU", 1.0)
    deployment = serve.deployment(
        name=_DEPLOYMENT,
        num_replicas=num_replicas,
        # A replica waits for requests most of its time: more of them than CPUs can start.
        ray_actor_options={
            "num_cpus": min(1.0, round(num_cpus / num_replicas, 3)),
            "runtime_env": {"env_vars": _ENVIRONMENT},
        },
        max_ongoing_requests=config.limits.max_concurrent + _SPARE_REQUESTS,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.limits.max_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        # What answers HTTP keeps one already; a second line costs a tenth of a replica's time.
        logging_config=LoggingConfig(enable_access_log=False),
    )(Replica)
    try:
        serve.run(deployment.bind(config), name=APP_NAME, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        raise ClipmillError(
            f"Ray Serve could not start the service: {error}. The logs of its replicas say more "
            "(logs/serve in Ray's session folder)"
        ) from error
    return f"http://{_for_people(host)}:{port}"


def check_place(*, host: str, port: int) -> None:
    """See that the Ray that this process is connected to has room for the service.

    Raises:
        ClipmillError: The service runs there already, or Ray Serve does, at another address.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    if APP_NAME in serve.status().applications:
        raise ClipmillError(
            f"this Ray cluster has an app {APP_NAME!r} already, which would be replaced; end the "
            "`clipmill serve` that it belongs to, or name another --address"
        )
    found = client.http_config
    if (found.host, found.port) != (host, port):
        raise ClipmillError(
            f"Ray Serve answers on this cluster already, at {found.host}:{found.port}, and cannot "
            f"at {host}:{port} as well; name that --host and --port, or another --address"
        )


def take_down(*, is_own_cluster: bool) -> None:
    """End the replicas, once what is being answered is; on a Ray of our own, HTTP as well.

    A cluster of others may run other apps on the same Ray Serve, which go on.
    """
    if is_own_cluster:
        serve.shutdown()
    elif _get_global_client(raise_if_no_controller_running=False) is not None:
        serve.delete(APP_NAME)


def _for_people(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
