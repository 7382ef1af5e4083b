"""Whether a cluster can grow: by what Ray's heads are told, and by those of real clusters."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler.v2.schema import ClusterStatus, Stats
from ray.autoscaler.v2.utils import ClusterStatusParser
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from pipelines import autoscaler
from pipelines.autoscaler import can_grow, has_reported, have_types
from tests.ray_nodes import ray_nodes
from tests.scaled_cluster import scaled_cluster

ROOT = Path(__file__).resolve().parent.parent


def status_of(version: int) -> ClusterStatus:
    reply = GetClusterStatusReply()
    reply.autoscaling_state.autoscaler_state_version = version
    return ClusterStatusParser.from_get_cluster_status_reply(reply, stats=Stats())


def written_down(**report: Any) -> bytes:
    return json.dumps({"time": 1.0, "autoscaler_report": report}).encode()


OF_A_LOOKER = {"active_nodes": {f"node_{'0a' * 28}": 1}, "pending_launches": {}}


@pytest.mark.parametrize(
    ("status", "v1_status", "is_there"),
    [
        (status_of(3), None, True),
        (status_of(0), None, False),
        (ClusterStatusParser.from_get_cluster_status_reply(GetClusterStatusReply(), Stats()), None,
         False),
        (None, None, False),
        (status_of(0), written_down(active_nodes={"headgroup": 1}, pending_launches={}), True),
        (None, written_down(active_nodes={}, pending_launches={"l4_worker": 2}), True),
        (None, written_down(**OF_A_LOOKER), False),
        (None, b'{"time": 1.0}', False),
        (None, b'{"autoscaler_report": null}', False),
    ],
)  # fmt: skip
def test_who_starts_nodes_is_told_from_who_only_looks(
    status: ClusterStatus | None, v1_status: bytes | None, is_there: bool
):
    assert has_reported(status, v1_status=v1_status) is is_there


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

    context = type("Context", (), {"gcs_address": "head:6379", "get_job_id": lambda _: "01"})()
    monkeypatch.setattr(ray, "nodes", lambda: [TYPED])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(autoscaler, "get_cluster_status", look)
    monkeypatch.setattr(autoscaler, "_internal_kv_get", lambda key: None)
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
    }
    with ray_nodes(1, environment=of_a_pod) as nodes:
        assert asked(nodes.gcs) == "False"


def test_a_cluster_of_ray_start_does_not_grow():
    with ray_nodes(1) as nodes:
        assert asked(nodes.gcs) == "False"
