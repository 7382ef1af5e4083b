"""cluster.yaml is one that Ray's launcher takes, and has what it names and what the stages need."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.cluster import IDLE_WORKERS_PER_CPU
from pipelines.cluster.placement import Placement
from pipelines.cluster.resources import Resources, wanted_workers
from pipelines.engines import Execution

ROOT = Path(__file__).resolve().parent.parent
ON_GPUS = Execution(backend="tensorrt", decoder="gpu")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def workers_of(config: Any) -> dict[str, Any]:
    kinds = config["available_node_types"].items()
    return {name: kind for name, kind in kinds if name != config["head_node_type"]}


def test_rays_own_checks_pass(config: Any):
    assert all(os.path.exists(source) for source in config["file_mounts"].values())
    validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("name", "value"), [("max_worker", 4), ("resources", {"CPU": 0.5}), ("min_workers", "0")]
)
def test_rays_own_checks_find_faults(config: Any, name: str, value: Any):
    config["available_node_types"]["cpu_worker"][name] = value
    with pytest.raises(ValidationError):
        validate_config(prepare_config(config))


def test_the_head_does_no_work_and_workers_come_from_none_as_spot_instances(config: Any):
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    workers = workers_of(config)
    assert list(workers) == ["cpu_worker", "l4_worker", "h100_worker"]
    for worker in workers.values():
        assert worker["min_workers"] == 0 < worker["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["max_workers"] == sum(worker["max_workers"] for worker in workers.values())


@pytest.mark.parametrize("accelerator_type", ["L4", "H100"])
def test_an_encoder_fits_on_the_nodes_with_its_gpu_alone_and_leaves_room_to_decode(
    config: Any, accelerator_type: str
):
    resources = Resources(placement=Placement(accelerator_type=accelerator_type))
    encoder, decoding, _ = wanted_workers(resources, execution=ON_GPUS)
    able = [
        kind["resources"]
        for kind in workers_of(config).values()
        if all(kind["resources"].get(name, 0) >= num for name, num in encoder.resources.items())
    ]
    (node,) = able
    assert node["CPU"] >= encoder.resources["CPU"] + 8 * decoding.resources["CPU"]


def test_every_node_installs_from_the_constraints_what_it_needs(config: Any):
    prepared = prepare_config(config)
    for name, kind in prepared["available_node_types"].items():
        is_head = name == prepared["head_node_type"]
        own = prepared["head_setup_commands" if is_head else "worker_setup_commands"]
        commands = kind.get("worker_setup_commands", own)
        installs = [command for command in commands if "pip install" in command]
        assert all("~/env/bin/pip install -c ~/clipmill/constraints.txt " in i for i in installs)
        extras = "[gpu,s3]" if "GPU" in kind["resources"] else "[s3]"
        boto3 = ["boto3"] if is_head else []  # Ray's autoscaler needs it
        assert [install.split()[-1] for install in installs] == [f"~/clipmill{extras}", *boto3]
        assert any("python3-venv" in command for command in commands)


def test_idle_workers_are_kept_as_by_a_ray_of_its_own(config: Any):
    (start,) = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    cpus = {kind["resources"]["CPU"] for kind in workers_of(config).values()}
    assert cpus == {16}
    assert f"RAY_num_workers_soft_limit={IDLE_WORKERS_PER_CPU * 16} " in start
