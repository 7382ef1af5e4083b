"""Which engine and backend a run takes: promoted, named, or of the checkpoint alone; refusals."""

import dataclasses
import importlib.util
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from engine.backends.choice import Backend, Machine
from engine.build import engine_id_of, load_or_build
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.errors import CheckpointError, DeviceError, EngineError, GateError
from engine.gate_reports import add_gate_report
from engine.promotion import promote, rollback
from engine.registry import Registry
from pipelines import engines
from pipelines.engines import (
    EngineChoice,
    chosen_backend,
    chosen_decoder,
    chosen_engine,
    ready_engine,
)
from pipelines.schema import WantedDecoder
from pipelines.snapshots import EngineRecord
from tests.checkpoints import save_clip
from tests.engines import flip_byte

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def record(checkpoint_dir: Path) -> EngineRecord:
    engine_id = engine_id_of(find_checkpoint(str(checkpoint_dir)))
    return EngineRecord(engine_id=engine_id, checkpoint=str(checkpoint_dir), revision=None)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return find_checkpoint(str(save_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "engines"))


def gated(registry: Registry, checkpoint: Checkpoint, *, passed: bool = True) -> str:
    """Build the fp16 engine and let its gate say so."""
    engine = load_or_build(checkpoint, registry=registry, precision="fp16")
    engine_id = engine.manifest.engine_id
    add_gate_report(registry, engine_id, passed=passed, files={})
    return engine_id


def test_without_a_promoted_engine_a_checkpoint_means_its_fp32_one(
    registry: Registry, small: Checkpoint
) -> None:
    for precision in (None, "fp32"):
        found = chosen_engine(
            EngineChoice(checkpoint=small.name, precision=precision), registry=registry
        )
        assert found.engine_id == engine_id_of(small)
        assert found.checkpoint == str(small.directory)
    assert registry.engine_ids() == []  # it is not built yet


def test_a_promoted_engine_is_taken_until_it_is_rolled_back(
    registry: Registry, small: Checkpoint
) -> None:
    fp32 = load_or_build(small, registry=registry).manifest.engine_id
    promote(registry, fp32)
    fp16 = gated(registry, small)
    choice = EngineChoice(checkpoint=small.name)
    assert chosen_engine(choice, registry=registry).engine_id == fp32  # built is not promoted
    promote(registry, fp16)
    assert chosen_engine(choice, registry=registry).engine_id == fp16
    assert (
        chosen_engine(
            EngineChoice(checkpoint=small.name, precision="fp32"), registry=registry
        ).engine_id
        == fp32
    )
    rollback(registry, small.digest)
    assert chosen_engine(choice, registry=registry).engine_id == fp32


def test_a_promoted_engine_that_fails_a_later_gate_is_refused_until_it_passes(
    registry: Registry, small: Checkpoint
) -> None:
    engine_id = gated(registry, small)
    promote(registry, engine_id)
    gated(registry, small, passed=False)
    for choice in (
        EngineChoice(checkpoint=small.name),
        EngineChoice(checkpoint=small.name, precision="fp16"),
        EngineChoice(engine_id=engine_id),
    ):
        with pytest.raises(GateError) as caught:
            chosen_engine(choice, registry=registry)
        for part in (
            f"{engine_id} failed its gate at ",
            registry.root.full_path(f"{engine_id}/gates/00000002"),
            f"`clipmill engine rollback --checkpoint {small.name}`",
        ):
            assert part in str(caught.value)
    fp32 = EngineChoice(checkpoint=small.name, precision="fp32")
    assert chosen_engine(fp32, registry=registry).engine_id == engine_id_of(small)
    gated(registry, small)
    assert (
        chosen_engine(EngineChoice(checkpoint=small.name), registry=registry).engine_id == engine_id
    )


def test_a_promoted_engine_that_is_gone_is_named(registry: Registry, small: Checkpoint) -> None:
    engine_id = gated(registry, small)
    promote(registry, engine_id)
    registry.root.remove(engine_id)
    with pytest.raises(GateError, match=f"no engine {engine_id}; `clipmill engine list`"):
        chosen_engine(EngineChoice(checkpoint=small.name), registry=registry)


def test_a_precision_that_is_not_promoted_is_an_error_with_the_command(
    registry: Registry, small: Checkpoint
) -> None:
    promote(registry, gated(registry, small))
    with pytest.raises(GateError) as caught:
        chosen_engine(EngineChoice(checkpoint=small.name, precision="fp8"), registry=registry)
    for part in (
        f"no fp8 engine of {small.name} is promoted; fp16-",
        f"`clipmill engine build --precision fp8 --checkpoint {small.name} --calibrate CATALOG`",
    ):
        assert part in str(caught.value)


def test_an_engine_by_its_id_needs_a_passed_gate_but_no_promotion(
    registry: Registry, small: Checkpoint
) -> None:
    engine_id = load_or_build(small, registry=registry, precision="fp16").manifest.engine_id
    choice = EngineChoice(engine_id=engine_id)
    with pytest.raises(GateError, match="was never compared with fp32, so it is neither"):
        chosen_engine(choice, registry=registry)
    gated(registry, small, passed=False)
    with pytest.raises(GateError, match=r"failed its gate at .*, so it is neither"):
        chosen_engine(choice, registry=registry)
    gated(registry, small)
    assert chosen_engine(choice, registry=registry).engine_id == engine_id
    fp32 = load_or_build(small, registry=registry).manifest.engine_id
    assert chosen_engine(EngineChoice(engine_id=fp32), registry=registry).engine_id == fp32
    with pytest.raises(EngineError, match="no engine fp8-0; `clipmill engine list`"):
        chosen_engine(EngineChoice(engine_id="fp8-0"), registry=registry)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "name either a checkpoint or an engine"),
        ({"checkpoint": "a", "engine_id": "fp32-0"}, "name either a checkpoint or an engine"),
        ({"engine_id": "fp32-0", "precision": "fp32"}, "a precision of its own"),
        ({"engine_id": "fp32-0", "revision": "main"}, "has a revision"),
        ({"checkpoint": "a", "backend": "cuda"}, "expected one of auto, onnxruntime, "),
    ],
)
def test_choices_that_contradict_themselves(options: dict[str, str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        EngineChoice(**options)


def test_a_cluster_without_gpus_runs_on_its_cpus_and_says_so(
    local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # Ray sets the handlers that it finds to ERROR
    for engine_id in ("fp8-0", "fp16-0", "fp32-0"):
        engine = EngineRecord(engine_id=engine_id, checkpoint="a", revision=None)
        looks = Looks("there is no GPU to be looked at")
        assert chosen_backend("onnxruntime", engine=engine, look=looks) == "onnxruntime"
        assert caplog.messages == []
        assert chosen_backend("auto", engine=engine, look=looks) == "onnxruntime"
        assert looks.num_looks == 0
        said = f"engine {engine_id} runs on the CPU, since there is no GPU"
        assert caplog.messages == ([] if engine_id == "fp32-0" else [said])
        caplog.clear()


def test_gpus_that_an_autoscaler_may_start_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})
    monkeypatch.setattr("pipelines.engines.can_grow", lambda: True)
    card = Machine(architecture="sm_90", tensorrt_fault=None, has_torch=True)
    num_looks = 0

    def look(look_at_it: object) -> Machine:
        nonlocal num_looks
        num_looks += 1
        return card

    engine = EngineRecord(engine_id="fp8-0", checkpoint="a", revision=None)
    for wanted, backend in (("auto", "tensorrt"), ("torch", "torch")):
        assert chosen_backend(wanted, engine=engine, look=look) == backend
    assert num_looks == 2
    on_cpus = EngineRecord(engine_id="fp32-0", checkpoint="a", revision=None)
    assert chosen_backend("auto", engine=on_cpus, look=look) == "onnxruntime"
    assert chosen_backend("onnxruntime", engine=engine, look=look) == "onnxruntime"
    assert num_looks == 2


class Looks:
    """In the place of a GPU probe's: what a GPU's worker would find, and how often it was asked."""

    def __init__(self, fault: str | None) -> None:
        self.fault = fault
        self.num_looks = 0

    def __call__(self, look_at_it: object) -> str | None:
        self.num_looks += 1
        return self.fault


@pytest.mark.parametrize(
    ("wanted", "backend", "fault", "chosen", "num_looks"),
    [
        ("auto", "torch", None, "gpu", 1),
        ("gpu", "tensorrt", None, "gpu", 1),
        ("auto", "torch", "no card", "cpu", 1),
        ("cpu", "torch", None, "cpu", 0),
        ("auto", "onnxruntime", None, "cpu", 0),
        ("cpu", "onnxruntime", None, "cpu", 0),
    ],
)
def test_images_are_decoded_where_the_engine_runs_if_that_is_possible(
    caplog: pytest.LogCaptureFixture,
    wanted: WantedDecoder,
    backend: Backend,
    fault: str | None,
    chosen: str,
    num_looks: int,
) -> None:
    caplog.set_level(logging.WARNING)
    looks = Looks(fault)
    ready = SimpleNamespace(preprocessing=None)
    decoder = chosen_decoder(wanted, backend=backend, ready_manifest=lambda: ready, look=looks)
    assert decoder == chosen
    assert looks.num_looks == num_looks
    assert caplog.messages == (
        [f"images are decoded by CPUs, since the GPU cannot: {fault}"] if fault else []
    )


def test_a_gpu_that_was_asked_for_and_cannot_is_an_error() -> None:
    options = {"ready_manifest": lambda: SimpleNamespace(preprocessing=None)}
    options["look"] = Looks("no card")
    with pytest.raises(DeviceError, match="needs an engine that runs on GPUs"):
        chosen_decoder("gpu", backend="onnxruntime", **options)
    with pytest.raises(DeviceError, match="--decode gpu: no card"):
        chosen_decoder("gpu", backend="torch", **options)


def test_a_worker_without_a_gpu_cannot_decode_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    for library in ("torch", "triton"):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, missing=library: None if name == missing else real(name),
        )
        assert engines._decoding_fault(None) == (
            f"{library} is not installed, whose kernels resize images there"
        )


def test_a_checkpoint_that_changed_is_not_taken_for_the_one_recorded(
    record: EngineRecord, tmp_path: Path
):
    changed = tmp_path / "changed"
    shutil.copytree(record.checkpoint, changed)
    config = changed / "config.json"
    config.write_text(config.read_text() + "\n")
    other = EngineRecord(engine_id=record.engine_id, checkpoint=str(changed), revision=None)
    with pytest.raises(EngineError, match=r"its files have changed or differ between machines"):
        ready_engine(other, registry=Registry(str(tmp_path / "engines")))


def test_neither_engine_nor_checkpoint_is_an_error(tmp_path: Path):
    gone = EngineRecord(engine_id="fp32-0", checkpoint=str(tmp_path / "gone"), revision=None)
    with pytest.raises(CheckpointError, match="no such folder"):
        ready_engine(gone, registry=Registry(str(tmp_path / "engines")))


def test_an_engine_that_takes_more_than_a_checkpoint_is_not_built_by_a_worker(
    record: EngineRecord, tmp_path: Path
):
    fp8 = EngineRecord(engine_id="fp8-0", checkpoint=record.checkpoint, revision=None)
    uri = str(tmp_path / "engines")
    with pytest.raises(EngineError) as caught:
        ready_engine(fp8, registry=Registry(uri))
    for part in ("fp8-0", uri, "every node reaches", "--engines", "`clipmill engine build`"):
        assert part in str(caught.value)


def test_another_build_of_an_engine_is_not_taken_for_the_one_recorded(
    record: EngineRecord, engines_dir: Path
):
    registry = Registry(str(engines_dir))
    ready_engine(record, registry=registry)
    with pytest.raises(EngineError, match="another build of it, with other weights"):
        ready_engine(dataclasses.replace(record, weights="0" * 64), registry=registry)


def test_a_damaged_engine_is_built_anew(record: EngineRecord, engines_dir: Path, tmp_path: Path):
    whole = ready_engine(record, registry=Registry(str(engines_dir)))
    shutil.copytree(whole.directory, tmp_path / record.engine_id)
    flip_byte(tmp_path / record.engine_id / "image.onnx")
    mended = ready_engine(record, registry=Registry(str(tmp_path)))
    assert mended.manifest == whole.manifest
    assert mended.directory == tmp_path / record.engine_id


def test_a_16_bit_engine_is_built_from_its_checkpoint(record: EngineRecord, tmp_path: Path):
    engine_id = engine_id_of(find_checkpoint(record.checkpoint), precision="fp16")
    fp16 = EngineRecord(engine_id=engine_id, checkpoint=record.checkpoint, revision=None)
    built = ready_engine(fp16, registry=Registry(str(tmp_path)))
    assert built.manifest.engine_id == engine_id
    assert built.manifest.precision == "fp16"
