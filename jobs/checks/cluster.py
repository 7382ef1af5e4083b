"""Checks Ray: its version, that a cluster answers, and what each of its nodes finds of itself.

Knows nothing of what is looked at on a node.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.errors import ClipmillError
from jobs.checks.check import Check
from jobs.checks.node import node_checks
from jobs.cluster import ray_cluster
from pipelines.cluster_nodes import node_line

# For a node to start a worker that imports the project, and PyTorch where there are GPUs.
NODE_SECONDS = 120.0
_PROBE_GPUS = 0.001

# Node in words -> what it found of itself, or why it could not look.
Nodes = Mapping[str, list[Check] | str]


@contextmanager
def _connected(address: str) -> Iterator[None]:
    with ray_cluster(address):
        yield


def nodes_of(address: str) -> Nodes:
    """Ask every node of a cluster to look at itself; ClipmillError if none answers."""
    with _connected(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        asked = {node_line(node): _ask(node) for node in nodes}
        return {line: _answer(reference) for line, reference in asked.items()}


def _ask(node: Mapping[str, Any]) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    num_gpus = _PROBE_GPUS if node["Resources"].get("GPU") else 0
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(node_checks)
    return task.options(scheduling_strategy=there).remote()


def _answer(reference: Any) -> list[Check] | str:
    try:
        found: list[Check] = ray.get(reference, timeout=NODE_SECONDS)
    except GetTimeoutError:
        return f"no answer within {NODE_SECONDS:g} s: its GPUs or its memory may be all in use"
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
    return found


def ray_checks(address: str | None, *, nodes: Callable[[str], Nodes] = nodes_of) -> list[Check]:
    """Ray here, or the cluster at an address with all of its nodes.

    Args:
        address: Of a cluster; None: commands start Ray on this machine.
        nodes: Asks the nodes.
    """
    if address is None:
        found = f"{ray.__version__}; commands start it on this machine (no --address)"
        return [Check(name="ray", verdict="ok", found=found, is_needed=True)]
    try:
        answers = nodes(address)
    except (ClipmillError, RayError, RuntimeError) as error:
        # RuntimeError: Ray's word for a cluster of another version of Ray or Python.
        return [
            Check(
                name="ray",
                verdict="missing" if isinstance(error, ClipmillError) else "wrong",
                found=str(error).strip(),
                mend="`ray status` on its head node; here must be its versions of Python and Ray, "
                "and its token ($RAY_AUTH_TOKEN or $RAY_AUTH_TOKEN_PATH) if it asks for one",
                is_needed=True,
            )
        ]
    found = f"{ray.__version__}; a cluster of {len(answers)} nodes answers at {address}"
    checks = [Check(name="ray", verdict="ok", found=found, is_needed=True)]
    for line, answer in answers.items():
        checks += _node(line, answer)
    return checks


def _node(line: str, answer: list[Check] | str) -> list[Check]:
    """What there is to say of a node: what is wrong there, and what runs."""
    name = line.partition(":")[0]
    if isinstance(answer, str):
        return [
            Check(
                name=f"node {name}",
                verdict="wrong",
                found=f"{line}; {answer}",
                mend="start the job with `ray job submit --working-dir .`, or Ray on the nodes "
                "where Clipmill is installed",
                is_needed=True,
            )
        ]
    faults = [
        replace(check, name=f"{check.name} of {name}") for check in answer if check.verdict != "ok"
    ]
    told = [check.found for check in answer if check.name in ("gpu", "backends")]
    runs = "; ".join([line, *told])
    return [*faults, Check(name=f"node {name}", verdict="ok", found=runs, is_needed=True)]
