"""Tests of pipelines/cluster/cluster_nodes.py."""

from pipelines.cluster.cluster_nodes import node_line


def test_a_node_is_told_by_what_ray_may_use_of_it():
    resources = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H200": 1.0, "memory": 1e9}
    node = {"NodeManagerHostname": "worker-7", "Resources": resources}
    assert node_line(node) == "worker-7: 16 CPUs, 2 GPUs (H200)"
    node = {"NodeManagerHostname": "head", "Resources": {"CPU": 2.0}}
    assert node_line(node) == "head: 2 CPUs"
    assert node_line({"NodeManagerHostname": "head", "Resources": {}}) == "head: 0 CPUs"
