"""Checks Ray: its version, that a cluster answers, and what each of its nodes finds of itself.

Knows nothing of how the nodes are asked.
"""

from collections.abc import Callable
from dataclasses import replace

import ray
from ray.exceptions import RayError

from engine.errors import ClipmillError
from jobs.checks.asking import NodeAnswer, Nodes, nodes_of
from jobs.checks.check import Check, Verdict


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
    for line, answer in answers:
        checks += _node(line, answer)
    return checks


def _node(line: str, answer: NodeAnswer) -> list[Check]:
    """What there is to say of a node: what is wrong there, what runs, what was not looked at."""
    name = line.partition(":")[0]
    faults = [
        replace(check, name=f"{check.name} of {name}")
        for check in answer.found
        if check.verdict != "ok"
    ]
    told = [check.found for check in answer.found if check.name in ("gpu", "backends")]
    verdict: Verdict = "wrong"
    if answer.fault is not None:
        mend = (
            "start the job with `ray job submit --working-dir .`, or Ray on the nodes where "
            "Clipmill is installed"
        )
    elif answer.hung is not None:
        mend = (
            "see on that node whether `nvidia-smi` answers, and what /tmp/ray/session_latest/logs "
            "say; then start its Ray anew"
        )
    elif answer.unseen is not None:
        verdict, mend = "unseen", "look again when it is idle"
    else:
        verdict, mend = "ok", ""
    found = "; ".join(filter(None, [line, *told, answer.fault or answer.hung or answer.unseen]))
    node = Check(name=f"node {name}", verdict=verdict, found=found, mend=mend, is_needed=True)
    return [*faults, node]
