"""A real Prometheus where one is installed, and the names in its queries where none is."""

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.ports import free_port
from tests.waiting import WAIT_SECONDS

DEPLOY = Path(__file__).resolve().parent.parent / "jobs" / "deploy"
ALERTS = DEPLOY / "alerts.yaml"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
# What Grafana puts in the place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$store": ".*"}


def alert_rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def panel_queries() -> dict[str, str]:
    """Title of a panel and letter of a query -> the query, as Grafana would send it."""
    return {
        f"{panel['title']} {target['refId']}": filled(target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }


def filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


def selectors(query: str) -> Iterator[Any]:
    """Every selector of a query, of ranges as well."""
    found = [promql_parser.parse(query)]
    while found:
        node = found.pop()
        if isinstance(node, promql_parser.VectorSelector):
            yield node
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        else:
            found += [getattr(node, part) for part in ("lhs", "rhs", "expr") if hasattr(node, part)]
            found += getattr(node, "args", ())


def installed(program: str) -> str:
    """Where it is; skips the test if it is not."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (apt install prometheus)")
    return path


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, query: str) -> list[dict[str, Any]]:
        """The series that a query has now."""
        words = urllib.parse.urlencode({"query": query})
        url = f"{self.url}/api/v1/query?{words}"
        with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/api/v1/rules", timeout=WAIT_SECONDS) as answer:
            (group,) = json.load(answer)["data"]["groups"]
        return list(group["rules"])


@contextmanager
def prometheus(folder: Path, *, targets: Sequence[str]) -> Iterator[Prometheus]:
    """One with our alert rules, which scrapes often, and waits for a busy machine."""
    port = free_port()
    config = {
        "global": {"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "test", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            installed("prometheus"),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'series'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                server.query("up")
                break
            except OSError:
                assert process.poll() is None, "prometheus ended"
                assert time.monotonic() < deadline, "prometheus did not start"
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=WAIT_SECONDS)
