"""Whether a cluster can grow: by what Ray's heads are told, and by those of real clusters."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipelines.cluster import autoscaler
from pipelines.cluster.autoscaler import can_grow, only_looks
from tests.ports import free_port
from tests.ray_nodes import ray_nodes
from tests.scaled_cluster import scaled_cluster

ROOT = Path(__file__).resolve().parent.parent


def metrics(**nodes: int) -> str:
    """Nodes by type, as an autoscaler of session `mine` counts them."""
    head = "# HELP autoscaler_active_nodes Number of nodes in the cluster.\n"
    counts = [
        f'autoscaler_active_nodes{{NodeType="{name.replace("_", ".")}",SessionName="mine"}} {num}.0'
        for name, num in nodes.items()
    ]
    return head + "\n".join(counts) + '\nautoscaler_failed_nodes{SessionName="mine"} 0.0\n'


@pytest.mark.parametrize(
    ("text", "types", "looks"),
    [
        (metrics(ray_head_default=0, headgroup=1), {"headgroup"}, True),
        (metrics(headgroup=1, gpu=0), {"headgroup"}, False),
        (metrics(ray_head_default=1, worker=2), {"ray.head.default", "worker"}, False),
        (metrics(headgroup=1).replace("mine", "others"), {"headgroup"}, None),
        (metrics(), {"headgroup"}, None),
        ("", {"headgroup"}, None),
    ],
)
def test_by_the_metrics(text: str, types: set[str], looks: bool | None):
    assert only_looks(text, session_name="mine", types=types) is looks


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A head: types of its nodes, how old it is, and what an autoscaler tells from when on."""
    told = {"types": ["headgroup"], "seconds": 0.0, "from": 0.0, "looks": 0}
    told |= {"metrics": metrics(headgroup=1), "v1": None, "v2": 0}

    def nodes() -> list[dict[str, Any]]:
        return [
            {"Alive": True, "Labels": {"ray.io/node-group": name} if name else {}}
            for name in told["types"]
        ]

    def scraped() -> str:
        told["looks"] += 1
        return told["metrics"] if told["seconds"] >= told["from"] else ""

    def wait(seconds: float) -> None:
        told["seconds"] += seconds

    def status(address: str, timeout: int) -> Any:
        return SimpleNamespace(stats=SimpleNamespace(autoscaler_version=told["v2"]))

    context = SimpleNamespace(gcs_address="head:6379", get_session_name=lambda: "mine")
    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(autoscaler, "get_cluster_status", status)
    monkeypatch.setattr(autoscaler, "_internal_kv_get", lambda key: told["v1"])
    monkeypatch.setattr(autoscaler, "_metrics", scraped)
    monkeypatch.setattr(autoscaler, "_head_seconds", lambda address: told["seconds"])
    monkeypatch.setattr(autoscaler.time, "sleep", wait)
    autoscaler._is_scaled.cache_clear()
    yield told
    autoscaler._is_scaled.cache_clear()


def test_the_first_report_is_waited_for_while_the_head_is_new(head: dict[str, Any]):
    head["from"] = 20.0
    assert can_grow()
    assert head["looks"] == 21


def test_what_is_known_is_not_asked_again_though_nodes_of_another_type_have_come(
    head: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    assert can_grow()
    # Ray Data's scheduling thread asks while a run waits.
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("the head is asked"))
    head["types"].append("h100")
    assert can_grow()
    assert head["looks"] == 1


def test_a_head_that_is_told_nothing_has_no_autoscaler(head: dict[str, Any]):
    head["metrics"] = ""
    assert not can_grow()
    assert autoscaler.FIRST_REPORT_SECONDS < head["seconds"] < autoscaler.FIRST_REPORT_SECONDS + 2


def test_one_that_only_looks_starts_no_nodes(head: dict[str, Any]):
    head["metrics"] = metrics(ray_head_default=0, head=1)
    assert not can_grow()
    assert head["looks"] == 1


@pytest.mark.parametrize("report", [{"v1": b"{}"}, {"v2": 3}])
def test_without_its_metrics_one_that_reports_is_taken_for_one_that_starts_nodes(
    head: dict[str, Any], report: dict[str, Any]
):
    head.update(seconds=3600.0, metrics="", **report)
    assert can_grow()
    assert head["looks"] == 1, "an old head is not waited for"


@pytest.mark.parametrize(
    ("text", "grows"),
    [("", False), (metrics(ray_head_default=0, local=1), False), (metrics(head=1, gpu=0), True)],
)
def test_of_nodes_without_types_the_head_is_asked_once(
    head: dict[str, Any], text: str, grows: bool
):
    """As those of `ray start`, and of `ray up` with version 1 of the autoscaler."""
    head.update(types=[None], metrics=text)
    assert can_grow() is grows
    assert (head["looks"], head["seconds"]) == (1, 0.0)


def test_from_afar_types_are_what_is_seen(head: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autoscaler.client, "is_connected", lambda: True)
    assert can_grow()
    assert head["looks"] == 0


ASK = """
import sys
import ray
from pipelines.cluster.autoscaler import can_grow

ray.init(sys.argv[1], log_to_driver=False)
print(can_grow())
"""


def asked(address: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_a_real_autoscaler_is_found():
    with scaled_cluster() as address:
        assert asked(address) == "True"


def test_a_ray_cluster_of_kuberay_without_one_does_not_grow():
    """As KubeRay starts its head, which runs the autoscaler that only looks, beside Ray's own."""
    of_a_pod = {
        "RAY_NODE_TYPE_NAME": "headgroup",
        "RAY_CLOUD_INSTANCE_ID": "pod-1",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_enable_autoscaler_v2": "1",  # `ray start` sets it where it finds the three
        "AUTOSCALER_METRIC_PORT": str(free_port()),  # another Ray of this machine may have it
    }
    with ray_nodes(1, environment=of_a_pod) as nodes:
        assert asked(nodes.gcs) == "False"
