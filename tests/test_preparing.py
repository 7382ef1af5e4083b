"""What a run works with, found before it begins: without a GPU's node for a night of no work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from engine.backends.choice import Machine, this_machine
from engine.errors import EngineError
from pipelines import preparing
from pipelines.cluster.placement import Placement, WorkerDemand
from pipelines.cluster.resources import Resources
from pipelines.engines import EngineChoice, Execution
from pipelines.snapshots import EngineRecord
from tests.clusters import describe_cluster
from tests.stored import make_snapshot

FP8 = EngineRecord(engine_id="fp8-0", checkpoint="a", revision=None)
CARD = Machine(architecture="sm_90", tensorrt_fault=None, has_torch=True)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Execution, int]]:
    """What is chosen, and after how many looks at a card that can all."""

    def choose(before: Execution | None, *, num_gpus: float, **asked: Any) -> tuple[Execution, int]:
        describe_cluster(monkeypatch, {"CPU": 0.0, "GPU": num_gpus}, grows=True)
        looked_at = []

        @contextmanager
        def probe(_: Placement) -> Iterator[Any]:
            def look(function: Any) -> Any:
                looked_at.append(function)
                return CARD if function is this_machine else None

            yield look

        monkeypatch.setattr(preparing, "gpu_probe", probe)
        parent = None
        if before is not None:
            parent = replace(make_snapshot([]), backend=before.backend, decoder=before.decoder)
        execution = preparing._chosen_execution(
            EngineChoice(engine_id="fp8-0", **asked),
            catalog=SimpleNamespace(modalities=("image",)),
            engine=FP8,
            parent=parent,
            placement=Placement(),
            ready_manifest=lambda: SimpleNamespace(preprocessing=None),
        )
        return execution, len(looked_at)

    return choose


TORCH, TENSORRT = (Execution(backend=name, decoder="gpu") for name in ("torch", "tensorrt"))
ON_CPUS = Execution(backend="onnxruntime", decoder="cpu")


@pytest.mark.parametrize("before", [TORCH, TENSORRT, ON_CPUS, replace(TORCH, decoder="cpu")])
def test_where_a_look_would_start_a_node_what_was_there_before_stays(chosen, before: Execution):
    assert chosen(before, num_gpus=0) == (before, 0)
    assert chosen(before, num_gpus=0, backend=before.backend) == (before, 0)
    assert chosen(before, num_gpus=0, decoder=before.decoder) == (before, 0)


def test_a_gpu_is_looked_at_where_it_is_there_or_nothing_was_before_or_another_is_asked(chosen):
    assert chosen(TORCH, num_gpus=1) == (TENSORRT, 2)  # which is then refused beside torch's
    assert chosen(None, num_gpus=0) == (TENSORRT, 2)
    assert chosen(TORCH, num_gpus=0, backend="tensorrt") == (TENSORRT, 2)
    on_cpus = replace(TENSORRT, decoder="cpu")
    assert chosen(on_cpus, num_gpus=0, decoder="gpu") == (TENSORRT, 1)
    assert chosen(TENSORRT, num_gpus=0, decoder="cpu") == (on_cpus, 0)


def test_looking_alone_builds_no_engine():
    registry = SimpleNamespace(uri="engines", manifest=lambda _: None)
    with pytest.raises(EngineError, match="engine fp8-0 is not built, and looking alone builds no"):
        preparing.built_manifest(FP8, registry=registry)


def test_building_the_engine_counts_as_waiting_behind_others(monkeypatch: pytest.MonkeyPatch):
    """It is one task, of which is known whether it has a place; not a queue."""
    demands: list[WorkerDemand] = []
    manifest = SimpleNamespace(modalities=("image",))
    built = SimpleNamespace(manifest=manifest)
    task = SimpleNamespace(remote=lambda *_, **__: "built")
    monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=lambda **_: task))
    monkeypatch.setattr(ray, "get", lambda _: built)
    monkeypatch.setattr(
        preparing, "wait_for_place", lambda _, *, wanted, placement: demands.append(wanted)
    )
    found = preparing.ready_manifest(
        FP8,
        registry=SimpleNamespace(manifest=lambda _: None),
        catalog=SimpleNamespace(modalities=("image",)),
        resources=Resources(decode_cpus=2),
    )
    assert found is manifest
    (demand,) = demands
    assert (demand.kind, demand.resources) == ("task", {"CPU": 2})
