"""The manifests for Kubernetes and the image: valid by others' schemas, and of one mind with us."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import validate_config

from jobs.cli import COMMANDS
from jobs.cluster import IDLE_WORKERS_PER_CPU
from jobs.nightly import _config_from, _parser
from pipelines.cluster.resources import wanted_workers
from pipelines.engines import Execution
from tests.kuberay_schema import MANIFEST, SCHEMA, cut_schema

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "jobs" / "deploy"
KUBERNETES = "1.33"
ON_GPUS = Execution(backend="tensorrt", decoder="gpu")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def manifests(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture
def rayjob() -> Any:
    return yaml.safe_load(MANIFEST.read_text())


def groups(rayjob: Any) -> list[Any]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def cronjob() -> Any:
    (found,) = [one for one in manifests("nightly.yaml") if one["kind"] == "CronJob"]
    return found


def test_the_rayjob_is_valid_by_kuberays_schema(rayjob: Any):
    jsonschema.validate(rayjob, json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (("spec",), "entryPoint", "clipmill"),
        (("spec",), "activeDeadlineSeconds", "8h"),
        (("spec", "rayClusterSpec", "autoscalerOptions"), "version", "v3"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), "minReplicas", None),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), "num-cpus", 0),
        (("spec",), "ttlSecondsAfterFinished", "1h"),
        (("spec",), "shutdownAfterJobFinishes", 3600),
    ],
)
def test_kuberays_schema_finds_faults(rayjob: Any, path: tuple, name: str, value: Any):
    part = rayjob
    for step in path:
        part = part[step]
    part[name] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rayjob, json.loads(SCHEMA.read_text()))


def test_a_cluster_goes_however_its_job_ended(rayjob: Any):
    """Deletion rules know SUCCEEDED and FAILED only, and KubeRay refuses them beside a shutdown."""
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] <= 3600
    assert "deletionStrategy" not in spec


def test_a_schema_is_cut_to_what_is_used():
    schema = {
        "type": "object",
        "required": ["a"],
        "properties": {
            "a": {"type": "array", "items": {"type": "object", "properties": {"b": {"enum": [1]}}}},
            "c": {"type": "object", "additionalProperties": {"type": "string", "description": "d"}},
            "e": {"type": "integer"},
        },
    }
    cut = cut_schema(schema, [{"a": [{}, {"b": 1}], "c": {"x": "y"}}])
    assert cut == {
        "type": "object",
        "required": ["a"],
        "additionalProperties": False,
        "properties": {
            "a": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": [],
                    "additionalProperties": False,
                    "properties": {"b": {"enum": [1]}},
                },
            },
            "c": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }


def test_kubernetes_takes_every_object_and_every_pod(rayjob: Any):
    objects = manifests("nightly.yaml")
    assert [one["kind"] for one in objects] == [
        "ServiceAccount",
        "Role",
        "RoleBinding",
        "CronJob",
    ]
    pods = [group["template"] for group in groups(rayjob)]
    objects += [{"apiVersion": "v1", "kind": "PodTemplate", "template": pod} for pod in pods]
    for one in objects:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_kubernetes_schema_finds_faults():
    misspelled = cronjob()
    misspelled["spec"]["concurrencyPolicies"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelled, KUBERNETES, strict=True)


# They hold kubectl and nothing else, no shell.
WITHOUT_SHELL = ("registry.k8s.io/kubectl", "rancher/kubectl")


def test_a_container_that_runs_a_shell_is_of_an_image_that_has_one():
    (container,) = cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    image = container["image"]
    assert container["command"][0] == "/bin/sh"
    assert not any(name in image for name in WITHOUT_SHELL)
    assert re.search(r":v?\d+\.\d+\.\d+$", image)


def test_rays_autoscaler_reads_what_the_pods_ask_for(rayjob: Any):
    cluster = {
        "metadata": {"name": "clipmill", "namespace": "default"},
        "spec": rayjob["spec"]["rayClusterSpec"],
    }
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    kinds = config["available_node_types"]
    counted = {
        name: {key: value for key, value in kind["resources"].items() if key != "memory"}
        for name, kind in kinds.items()
    }
    assert counted == {
        "headgroup": {"CPU": 0},
        "cpu": {"CPU": 15},
        "l4": {"CPU": 15, "GPU": 1, "accelerator_type:L4": 1},
        "h100": {"CPU": 15, "GPU": 1, "accelerator_type:H100": 1},
    }
    workers = {name: kind for name, kind in kinds.items() if name != "headgroup"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())


def test_what_ray_counts_is_what_a_pod_has(rayjob: Any):
    head, *workers = groups(rayjob)
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in workers:
        (container,) = group["template"]["spec"]["containers"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        start = group["rayStartParams"]
        assert requests == limits
        assert requests["cpu"] == start["num-cpus"]
        assert requests.get("nvidia.com/gpu") == start.get("num-gpus")
        (idle,) = [one["value"] for one in container["env"] if one["name"].startswith("RAY_")]
        assert int(idle) == IDLE_WORKERS_PER_CPU * int(start["num-cpus"])
        keys = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        assert ("nvidia.com/gpu" in keys) == ("num-gpus" in start)
        assert container["image"] == ("clipmill:gpu" if "num-gpus" in start else "clipmill:cpu")


def test_an_encoder_and_decoding_fit_on_a_gpu_node(rayjob: Any):
    options = _parser().parse_options(["--config", str(DEPLOY / "options.yaml")])
    config = _config_from(options, command=())
    encoder, decoding, _ = wanted_workers(config.embed.resources, execution=ON_GPUS)
    on_gpus = [group for group in groups(rayjob) if "num-gpus" in group["rayStartParams"]]
    for group in on_gpus:
        start = group["rayStartParams"]
        assert encoder.resources["GPU"] <= int(start["num-gpus"])
        needed = encoder.resources["CPU"] + 8 * decoding.resources["CPU"]
        assert needed <= int(start["num-cpus"])
    most = config.embed.resources.placement.max_encoders
    assert most is not None
    assert most <= sum(group["maxReplicas"] for group in on_gpus)


def test_the_rayjob_runs_a_command_that_there_is_with_options_that_are_mounted(rayjob: Any):
    program, command, flag, path, *_ = shlex.split(rayjob["spec"]["entrypoint"])
    assert program in PYPROJECT["scripts"]
    assert command in COMMANDS
    assert flag == "--config"
    spec = groups(rayjob)[0]["template"]["spec"]
    (mount,) = spec["containers"][0]["volumeMounts"]
    (volume,) = spec["volumes"]
    assert Path(path).parent == Path(mount["mountPath"])
    generated = {
        one["name"]: one["files"]
        for one in manifests("kustomization.yaml")[0]["configMapGenerator"]
    }
    assert generated[volume["configMap"]["name"]] == [Path(path).name]
    (_, rayjob_volume) = sorted(
        cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"],
        key=lambda volume: "configMap" in volume,
    )
    assert generated[rayjob_volume["configMap"]["name"]] == [MANIFEST.name]
    assert all((DEPLOY / name).is_file() for names in generated.values() for name in names)
    assert manifests("kustomization.yaml")[0]["resources"] == ["nightly.yaml"]


def test_nights_do_not_overlap_and_each_wait_outlasts_what_it_waits_for(rayjob: Any):
    cron = cronjob()["spec"]
    job = cron["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    script = container["command"][-1]
    wait = int(re.search(r"--timeout=(\d+)s", script)[1])
    tries = rayjob["spec"]["backoffLimit"] + 1
    assert cron["concurrencyPolicy"] == "Forbid"
    assert tries * rayjob["spec"]["activeDeadlineSeconds"] < wait < job["activeDeadlineSeconds"]
    assert job["backoffLimit"] == 0
    assert "/etc/clipmill/rayjob.yaml" in script


KUBECTL = """#!/bin/sh
echo "$1" >> "$LOG"
case "$*" in
  create*) echo rayjob.ray.io/clipmill-nightly-x ;;
  *jobStatus}) printf %s "$STATUS" ;;
esac
"""


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("", 1)])
def test_the_cronjob_ends_as_its_rayjob_does(tmp_path: Path, status: str, code: int):
    """Its script by a real shell; kubectl answers as a cluster would."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    (container,) = cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    ran = subprocess.run(
        container["command"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "STATUS": status},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.splitlines()[0] == "rayjob.ray.io/clipmill-nightly-x"
    assert (tmp_path / "log").read_text().split() == ["create", "wait", "get", "get"]
    (role,) = [one for one in manifests("nightly.yaml") if one["kind"] == "Role"]
    # kubectl waits by list and watch.
    assert {"create", "get", "list", "watch"} == set(role["rules"][0]["verbs"])


def test_ray_is_the_version_of_the_constraints(rayjob: Any):
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={rayjob['spec']['rayClusterSpec']['rayVersion']}" in constraints


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path):
    # Of the environment that runs the tests, whether or not it is on the path.
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=folders)
    assert hadolint is not None
    clean = subprocess.run(
        [hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert clean.returncode == 0, clean.stdout + clean.stderr
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd src\n")
    faulty = subprocess.run(
        [hadolint, str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert faulty.returncode == 1
    assert "DL3007" in faulty.stdout


def test_the_image_is_made_of_files_that_are_there_and_sent_to_the_builder():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert {"pyproject.toml", "constraints.txt", "engine", "pipelines", "jobs"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert sorted(line[1:] for line in sent if line.startswith("!")) == sorted(sources)


def test_the_image_installs_and_runs_what_pyproject_declares():
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    (on_gpus,) = re.findall(r"--build-arg EXTRAS=(\S+) \.", DOCKERFILE)
    for extras in (default, on_gpus):
        wanted = Requirement(f"clipmill[{extras}]").extras
        assert wanted <= PYPROJECT["optional-dependencies"].keys()
    assert 'pip install -c constraints.txt ".[${EXTRAS}]"' in DOCKERFILE
    (command,) = re.findall(r"^CMD (.+)$", DOCKERFILE, flags=re.MULTILINE)
    assert json.loads(command)[0] in PYPROJECT["scripts"]
    (version,) = re.findall(r"^ARG PYTHON_IMAGE=python:([\d.]+)-", DOCKERFILE, flags=re.MULTILINE)
    assert version in SpecifierSet(PYPROJECT["requires-python"])
    assert version.count(".") == 2
    users = re.findall(r"^USER (\d+)$", DOCKERFILE, flags=re.MULTILINE)
    assert users == ["1000"]
