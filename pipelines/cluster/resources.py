"""What the stages take of a cluster, as configured, and how many of their workers it has room for.

Knows nothing of what the stages do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import ray

from pipelines.cluster.autoscaler import can_grow
from pipelines.cluster.placement import Placement, WorkerDemand, accelerator
from pipelines.engines import Execution


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What the stages take of the cluster."""

    num_encoders: int | None = None
    """Encode actors; None: one for every two CPUs of the cluster, or for each of its GPUs; where an
    autoscaler gives the nodes, from one on, as the backlog asks."""
    encoder_threads: int = 2
    """Threads of one encode actor."""
    encoder_cpus: float = 0.5
    """CPUs that Ray reserves for an encode actor; below its threads, so that decoding, which is
    short beside encoding on CPUs, can use the same cores."""
    encoder_gpus: float = 1.0
    """GPUs that Ray reserves for an encode actor, if the engine runs on GPUs."""
    decode_cpus: float = 0.5
    """CPUs that Ray reserves for a decode task; it uses one, but also has to fit beside an encode
    actor on a node of one CPU."""
    io_cpus: float = 0.25
    """CPUs for a read or write task; they mostly wait."""
    batch_rows: int | None = None
    """Rows given to an encode actor at once, also rows of a decode task; None: 32 on CPUs; on GPUs
    256, which smaller batches leave idle, and 1,024 where GPUs decode: images are small before."""
    rows_per_file: int = 4096
    """Rows of a written file; a killed run redoes at most those not yet written."""
    placement: Placement = field(default_factory=Placement)
    """Where encoders may go, and how long workers may wait for a place."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_encoders is not None and self.num_encoders < 1:
            raise ValueError(f"num_encoders={self.num_encoders}: expected at least 1")
        for name in ("encoder_threads", "batch_rows", "rows_per_file"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("encoder_cpus", "encoder_gpus", "decode_cpus", "io_cpus"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0")
        least, most = self.num_encoders or 1, self.placement.max_encoders
        if most is not None and most < least:
            raise ValueError(f"max_encoders={most}: expected at least num_encoders={least}")


def wanted_workers(resources: Resources, *, execution: Execution) -> list[WorkerDemand]:
    """What each kind of the stages' workers takes of a node; kinds that take the same are one."""
    encoder, encoder_option = {"CPU": resources.encoder_cpus}, "--encoder-cpus"
    if execution.backend != "onnxruntime":
        encoder |= {"GPU": resources.encoder_gpus, **accelerator(resources.placement)}
        encoder_option = "--encoder-gpus"
    demands = [
        WorkerDemand(what="an encoder", resources=encoder, kind="actor", option=encoder_option),
        WorkerDemand(
            what="decoding",
            resources={"CPU": resources.decode_cpus},
            kind="task",
            option="--decode-cpus",
        ),
        WorkerDemand(
            what="reading or writing",
            resources={"CPU": resources.io_cpus},
            kind="task",
            option=None,
        ),
    ]
    alike: dict[frozenset[tuple[str, float]], list[WorkerDemand]] = {}
    for demand in demands:
        alike.setdefault(frozenset(demand.resources.items()), []).append(demand)
    return [_as_one(same) for same in alike.values()]


def _as_one(alike: Sequence[WorkerDemand]) -> WorkerDemand:
    """Of those that wait only what they take is known: a task may be among them."""
    if len(alike) == 1:
        return alike[0]
    return WorkerDemand(
        what=" or ".join(demand.what for demand in alike),
        resources=alike[0].resources,
        kind="task",
        option=" or ".join(demand.option for demand in alike if demand.option) or None,
    )


def encoder_bounds(resources: Resources, *, execution: Execution) -> tuple[int, int | None]:
    """Encode actors at least, and at most as the backlog asks; None: what Ray finds room for."""
    least, most = resources.num_encoders, resources.placement.max_encoders
    if most is not None:
        return least or 1, most
    if least is not None:
        return least, least
    if can_grow():
        return 1, None
    room = num_workers(resources, execution=execution)["encode"]
    return room, room


def num_workers(resources: Resources, *, execution: Execution) -> dict[str, int]:
    """Stage -> how many of its workers the cluster has room for at once."""
    cpus = num_cpus()
    io = max(1, int(cpus / resources.io_cpus))
    room = cpus // 2 if execution.backend == "onnxruntime" else _gpu_room(resources)
    most = resources.placement.max_encoders
    encoders = max(1, int(room))
    if most is not None:
        encoders = max(resources.num_encoders or 1, min(encoders, most))
    elif resources.num_encoders is not None:
        encoders = resources.num_encoders
    decoders = max(1, int(cpus / max(1.0, resources.decode_cpus)))
    if execution.decoder == "gpu":
        workers = {"read": decoders, "prepare": decoders, "decode": encoders}
    else:
        workers = {"read": io, "decode": decoders}
    return {**workers, "encode": encoders, "write": io}


def gpus_held(resources: Resources, *, execution: Execution) -> float:
    """GPUs, in shares, that the encoders hold from the first read until the stages end.

    Where an autoscaler gives the nodes, those that are there now: at the end of a run its most.
    """
    if execution.backend == "onnxruntime":
        return 0.0
    return num_workers(resources, execution=execution)["encode"] * resources.encoder_gpus


def check_room(resources: Resources, *, execution: Execution) -> None:
    """ValueError if the cluster has less room than the stages need at once.

    Where an autoscaler gives the nodes, what they lack may come.
    """
    if can_grow():
        return
    num_encoders, _ = encoder_bounds(resources, execution=execution)
    if execution.backend != "onnxruntime" and num_encoders > _gpu_room(resources):
        wanted_type = resources.placement.accelerator_type
        of_type = f" of type {wanted_type}" if wanted_type else ""
        raise ValueError(
            f"num_encoders={num_encoders}, encoder_gpus={resources.encoder_gpus:g}: the cluster's "
            f"GPUs{of_type} have room for {_gpu_room(resources)} such encoders; use fewer, or a "
            "lower --encoder-gpus"
        )
    cpus = num_cpus()
    encoders = num_encoders * resources.encoder_cpus
    needed = encoders + max(resources.decode_cpus, resources.io_cpus)
    if 0 < cpus < needed:
        raise ValueError(
            f"num_encoders={num_encoders}, encoder_cpus={resources.encoder_cpus:g}, "
            f"decode_cpus={resources.decode_cpus:g}: the stages need {needed:g} CPUs at once, the "
            f"cluster has {cpus:g}; use fewer encoders or lower --encoder-cpus, --decode-cpus"
        )


def num_cpus() -> float:
    """CPUs of the cluster."""
    # The key is missing where no node has a CPU for work yet (autoscaling from zero).
    return float(ray.cluster_resources().get("CPU", 0))


def _gpu_room(resources: Resources) -> int:
    """Encode actors that the cluster's GPUs hold; an actor's share is of one node."""
    wanted_type = accelerator(resources.placement).keys()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        int(node.get("GPU", 0) / resources.encoder_gpus)
        for node in nodes
        if wanted_type <= node.keys()
    )
