"""cluster.yaml is one that Ray's launcher takes, and names only files that are there."""

import os
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent


def test_cluster_yaml_passes_rays_own_checks(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    mounts = config["file_mounts"].values()
    assert all(os.path.exists(source) for source in mounts)
    validate_config(prepare_config(config))
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"]["CPU"] == 0
    workers = [kind for name, kind in kinds.items() if name != config["head_node_type"]]
    assert all(kind["min_workers"] == 0 for kind in workers)
    assert any("GPU" in kind["resources"] for kind in workers)
