"""Whether a cluster can grow: by what Ray's heads are told, and by those of real clusters."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.autoscaler.v2.schema import ClusterStatus, Stats
from ray.autoscaler.v2.utils import ClusterStatusParser
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from pipelines import autoscaler
from pipelines.autoscaler import can_grow, have_types, only_looks, reports, starts_nodes
from tests.prometheus import free_port
from tests.ray_nodes import ray_nodes
from tests.scaled_cluster import scaled_cluster

ROOT = Path(__file__).resolve().parent.parent


def status_of(version: int) -> ClusterStatus:
    reply = GetClusterStatusReply()
    reply.autoscaling_state.autoscaler_state_version = version
    return ClusterStatusParser.from_get_cluster_status_reply(reply, stats=Stats())


def written_down(**report: Any) -> bytes:
    return json.dumps({"time": 1.0, "autoscaler_report": report}).encode()


@pytest.mark.parametrize(
    ("v1_status", "is_one"),
    [
        (written_down(active_nodes={"headgroup": 1}, pending_launches={}), True),
        (written_down(active_nodes={}, pending_launches={"l4_worker": 2}), True),
        (written_down(active_nodes={f"node_{'0a' * 28}": 1}, pending_launches={}), False),
        (written_down(active_nodes={}, node_type_mapping={"10.0.0.1": "headgroup"}), True),
        (written_down(active_nodes={"node_1": 1}, pending_launches={}), True),
        (written_down(active_nodes={}, node_type_mapping={"0a": f"node_{'0a' * 28}"}), False),
        (b'{"time": 1.0}', False),
        (b'{"autoscaler_report": null}', False),
        (None, False),
    ],
)
def test_by_what_version_1_writes_down(v1_status: bytes | None, is_one: bool):
    assert starts_nodes(v1_status) is is_one


def test_version_2_has_reported_or_not():
    assert reports(status_of(3))
    assert not reports(status_of(0))


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
def test_by_the_metrics_of_version_2(text: str, types: set[str], looks: bool | None):
    assert only_looks(text, session_name="mine", types=types) is looks


def ray_node(**labels: str) -> dict[str, Any]:
    return {"Alive": True, "Labels": {"ray.io/node-id": "ab", **labels}}


TYPED = ray_node(**{"ray.io/node-group": "head"})


def test_nodes_have_types_where_they_were_given_one():
    assert have_types([ray_node(), TYPED])
    assert not have_types([ray_node()])


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A head of typed nodes: how old it is, and what it is told at which look."""
    told = {"seconds": 0.0, "versions": [0], "looks": 0}

    def look(address: str, timeout: int) -> ClusterStatus:
        versions = told["versions"]
        version = versions[min(told["looks"], len(versions) - 1)]
        told["looks"] += 1
        return status_of(version)

    def wait(seconds: float) -> None:
        told["seconds"] += seconds

    told["metrics"] = metrics(headgroup=1)
    context = SimpleNamespace(gcs_address="head:6379", get_session_name=lambda: "mine")
    monkeypatch.setattr(ray, "nodes", lambda: [TYPED])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(autoscaler, "get_cluster_status", look)
    monkeypatch.setattr(autoscaler, "_internal_kv_get", lambda key: None)
    monkeypatch.setattr(autoscaler, "_metrics", lambda: told["metrics"])
    monkeypatch.setattr(autoscaler, "_head_seconds", lambda address: told["seconds"])
    monkeypatch.setattr(autoscaler.time, "sleep", wait)
    autoscaler._found.cache_clear()
    yield told
    autoscaler._found.cache_clear()


def test_the_first_report_is_waited_for_while_the_head_is_new(head: dict[str, Any]):
    head["versions"] = [0] * 20 + [1]
    assert can_grow()
    assert head["looks"] == 21
    assert can_grow()
    assert head["looks"] == 21, "it is known"


def test_a_head_that_is_told_nothing_has_no_autoscaler(head: dict[str, Any]):
    assert not can_grow()
    assert autoscaler.FIRST_REPORT_SECONDS < head["seconds"] < autoscaler.FIRST_REPORT_SECONDS + 2


def test_one_that_only_looks_starts_no_nodes(head: dict[str, Any]):
    head.update(versions=[1], metrics=metrics(ray_head_default=0, head=1))
    assert not can_grow()
    assert head["looks"] == 1


def test_without_its_metrics_one_that_reports_is_taken_for_one_that_starts_nodes(
    head: dict[str, Any],
):
    head.update(versions=[1], metrics="")
    assert can_grow()
    assert head["seconds"] > autoscaler.FIRST_REPORT_SECONDS


def test_an_old_head_is_not_waited_for(head: dict[str, Any]):
    head["seconds"] = 3600.0
    assert not can_grow()
    assert head["looks"] == 1


def test_from_afar_types_are_what_is_seen(head: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autoscaler.client, "is_connected", lambda: True)
    assert can_grow()
    assert head["looks"] == 0


ASK = """
import sys
import ray
from pipelines.autoscaler import can_grow

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
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize("version", [1, 2])
def test_a_real_autoscaler_is_found(version: int):
    with scaled_cluster(version=version) as address:
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


def test_a_cluster_of_ray_start_does_not_grow():
    with ray_nodes(1) as nodes:
        assert asked(nodes.gcs) == "False"
