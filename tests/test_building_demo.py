"""The demo checkpoint from a catalog of scenes to a promoted engine, and what stops it on its way.

Quantized by ModelOpt, run by ONNX Runtime, compiled by TensorRT for RTX: all of them real.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as rtx
from onnx import numpy_helper

from engine.accuracy import Thresholds
from engine.checkpoint import find_checkpoint
from engine.gate_reports import last_gate
from engine.manifest import Manifest, file_digest, read_manifest, verify_files
from engine.plans.plan import BULK, QUERY, PlanProfile, PlanRecord, read_plan
from engine.promotion import history, promoted
from engine.registry import Registry, engine_artifact
from pipelines.building import BuildConfig, BuildResult
from pipelines.catalog import CatalogConfig
from tests.catalogs import scene_rows, write_rows
from tests.demo_build import ARCHITECTURES, NUM_HELD_OUT, NUM_ROWS, DemoBuild, build
from tests.quantized import BLOCK_PRODUCTS, IN_16_BIT, MODALITIES, NUM_BLOCKS
from tests.quantized_engines import fp8_products

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
QUANTIZED_PER_BLOCK, WEIGHTS_PER_BLOCK = 8, 6


def products(modality: str) -> list[str]:
    """Those of all blocks of the demo's graph."""
    blocks = range(NUM_BLOCKS[modality])
    return [f"/backbone/blocks.{block}/{product}" for block in blocks for product in BLOCK_PRODUCTS]


def content(path: Path) -> Any:
    """Of a JSON file that has nothing but what JSON has."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def report_of(result: BuildResult) -> Any:
    """The gate's report as it was kept."""
    return content(Path(result.report_path) / "report.json")


def page_of(result: BuildResult) -> str:
    """The same for people."""
    return (Path(result.report_path) / "report.html").read_text()


def current(config: BuildConfig) -> str | None:
    """The promoted engine of a config's checkpoint."""
    digest = find_checkpoint(config.checkpoint).digest
    return promoted(Registry(config.engines_uri), digest)


@pytest.fixture
def copied(demo_build: DemoBuild, tmp_path: Path) -> DemoBuild:
    """The same in a registry that a test may change."""
    uri = str(tmp_path / "engines")
    shutil.copytree(demo_build.config.engines_uri, uri)
    config = dataclasses.replace(demo_build.config, engines_uri=uri)
    return dataclasses.replace(demo_build, config=config)


# The demo, built


def test_the_demo_is_built_and_promoted(demo_build: DemoBuild) -> None:
    config, result, engine = demo_build.config, demo_build.result, demo_build.engine
    assert result.is_promoted
    assert result.manifest == engine.manifest
    assert engine.manifest.files.keys() == {
        "README.md",
        "audit.json",
        "config.json",
        "image.onnx",
        "image.safetensors",
        "quantization.json",
        "text.onnx",
        "text.safetensors",
        "tokenizer.json",
    }
    engine_artifact(engine.manifest.engine_id).verify(engine.directory)
    assert engine.manifest.precision == "fp8"
    assert "nvidia-modelopt" in engine.manifest.versions
    checkpoint = find_checkpoint(config.checkpoint)
    assert engine.manifest.checkpoint_digest == checkpoint.digest
    (entry,) = history(demo_build.registry, checkpoint.digest)
    assert (entry.number, entry.action, entry.previous) == (1, "promote", None)
    assert entry.engine_id == current(config) == engine.manifest.engine_id
    assert demo_build.registry.local.leftovers() == {}


def test_the_manifest_says_how_it_was_quantized(demo_build: DemoBuild) -> None:
    quantization = demo_build.result.manifest.quantization
    assert quantization is not None
    assert quantization.calibration_uri == demo_build.config.sample.catalog.uri
    assert quantization.calibration_digest == demo_build.calibration.digest
    assert quantization.num_calibration_rows == NUM_ROWS
    assert quantization.kept_in_16_bit == ()


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_audit_is_that_of_the_graph(demo_build: DemoBuild, modality: str) -> None:
    directory = demo_build.engine.directory
    audits = content(directory / "audit.json")
    assert audits.keys() == set(MODALITIES)
    assert audits[modality] == {
        "fp8": products(modality),
        "not_fp8": list(IN_16_BIT[modality]),
        "num_quantize": QUANTIZED_PER_BLOCK * NUM_BLOCKS[modality],
        "num_weights": WEIGHTS_PER_BLOCK * NUM_BLOCKS[modality],
        "faults": [],
    }
    assert fp8_products(directory / f"{modality}.onnx") == set(products(modality))


def test_the_gate_judged_rows_that_were_held_out(demo_build: DemoBuild) -> None:
    gate, config = demo_build.result.gate, demo_build.config
    assert gate.passed
    assert gate.engine_id == demo_build.result.manifest.engine_id
    assert (gate.backend, gate.device) == ("onnxruntime", "CPU")
    assert gate.thresholds == config.thresholds
    assert gate.sample_uri == config.sample.catalog.uri
    assert gate.sample_digest == demo_build.held_out.digest != demo_build.calibration.digest
    assert not set(demo_build.held_out.texts or ()) & set(demo_build.calibration.texts or ())
    assert set(gate.agreements) == set(MODALITIES)
    for agreed in gate.agreements.values():
        assert agreed.num_rows == NUM_HELD_OUT
        assert 0.98 < agreed.cosine_p1 < agreed.cosine_mean < 0.9999  # not the reference itself
    assert [recall.direction for recall in gate.recalls] == ["text-to-image", "image-to-text"]
    for recall in gate.recalls:
        for cutoff, least in ((1, 0.9), (5, 0.98), (10, 0.99)):
            assert recall.reference[cutoff] >= least
            assert recall.measured[cutoff] >= least
    assert gate.top1 is None
    assert gate.speeds == ()


def test_the_report_is_kept_for_programs_and_people(demo_build: DemoBuild) -> None:
    result, registry = demo_build.result, demo_build.registry
    kept = last_gate(registry, result.manifest.engine_id)
    assert kept is not None
    assert kept.passed
    assert registry.root.full_path(kept.path) == result.report_path
    report = report_of(result)
    # Cut-offs are strings in JSON.
    assert report == json.loads(json.dumps({"passed": True, **dataclasses.asdict(result.gate)}))
    page = page_of(result)
    assert page.startswith("<!doctype html>")
    assert '<h2 id="verdict">Passed</h2>' in page
    assert "512 rows of" in page
    for modality in MODALITIES:
        agreed = result.gate.agreements[modality]
        assert f"<td>{agreed.cosine_mean:.4f}</td>" in page
        assert f'aria-label="{modality}: 128 rows, ' in page
    assert page.count("<svg") == 2
    for recall in result.gate.recalls:
        assert f"{recall.direction} recall@1</th><td>{recall.reference[1]:.4f}</td>" in page


def test_progress_goes_through_all_stages(demo_build: DemoBuild) -> None:
    stages = list(dict.fromkeys(stage for stage, _, _ in demo_build.steps))
    assert stages == [
        "sample",
        *(f"{name}: {step}" for name in MODALITIES for step in ("calibrate", "round", "judge")),
        "export",
        *(f"{who}: {name}" for who in ("engine", "reference") for name in MODALITIES),
        *(f"compile for {architecture}" for architecture in ARCHITECTURES),
    ]


# Its plans


@pytest.fixture(scope="module")
def plans(demo_build: DemoBuild) -> Mapping[tuple[str, str], tuple[Path, PlanRecord]]:
    """Folder and record of each plan, by architecture and kind."""
    paths = map(Path, demo_build.result.plan_paths)
    records = {path: read_plan(path) for path in paths}
    return {
        (record.key.architecture, record.key.profile.kind): (path, record)
        for path, record in records.items()
    }


@pytest.mark.parametrize("profile", [BULK, QUERY])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_card_has_a_plan_of_each_profile(
    demo_build: DemoBuild,
    plans: Mapping[tuple[str, str], tuple[Path, PlanRecord]],
    architecture: str,
    profile: PlanProfile,
) -> None:
    assert len(demo_build.result.plan_paths) == len(plans) == 4
    path, record = plans[architecture, profile.kind]
    engine = demo_build.engine
    assert path.parent == engine.directory / "plans"
    assert path.name in demo_build.registry.plan_ids(engine.manifest.engine_id)
    assert (record.key.flavour, record.key.version) == ("tensorrt_rtx", rtx.__version__)
    assert record.key.profile == profile
    assert record.engine_id == engine.manifest.engine_id
    verify_files(record.files, directory=path)
    assert record.image.max_shape == (profile.max_rows, 64, 64, 3)
    assert record.image.min_shape[0] == record.image.max_shape[0] or profile == QUERY
    assert record.text is not None
    assert record.text.max_shape == (profile.max_rows, 32)
    # Nothing fell back to 16 bit, and the record says so.
    for modality, tower in record.towers.items():
        assert tower.num_fp8_products == len(products(modality))
        assert tower.fallbacks == ()


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_of_a_plan_name_their_types(
    plans: Mapping[tuple[str, str], tuple[Path, PlanRecord]], architecture: str, modality: str
) -> None:
    path, _ = plans[architecture, "bulk"]
    layers = content(path / f"{modality}.layers.json")
    reads_fp8, reads_none = set(), set()
    for layer in layers:
        dtypes = {tensor["dtype"] for tensor in layer["inputs"] + layer["constants"]}
        (reads_fp8 if "fp8" in dtypes else reads_none).update(layer["onnx_layers"])
    assert set(products(modality)) <= reads_fp8
    assert set(IN_16_BIT[modality]) <= reads_none - reads_fp8


# Built again


def test_what_is_there_is_found_and_judged_anew(copied: DemoBuild) -> None:
    engine_dir = copied.engine.directory
    records = [engine_dir / "manifest.json", *sorted(engine_dir.glob("plans/*/plan.json"))]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in records]
    assert len(before) == 1 + len(copied.result.plan_paths)
    again, steps = build(copied.config)
    assert sorted(Path(path) / "plan.json" for path in again.plan_paths) == records[1:]
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in records] == before
    assert again.manifest == copied.result.manifest
    stages = {stage.partition(":")[0] for stage, _, _ in steps}
    compiled = {f"compile for {architecture}" for architecture in ARCHITECTURES}
    assert stages == {"sample", "engine", "reference"} | compiled
    assert again.gate.agreements == copied.result.gate.agreements
    assert again.report_path == str(engine_dir / "gates" / "00000002")
    assert report_of(again)["passed"]
    assert len(history(copied.registry, again.manifest.checkpoint_digest)) == 1


# What the gate stops


def test_thresholds_that_are_not_met(copied: DemoBuild) -> None:
    # No graph in 16 bit is that close to float32, and none is quantized by these thresholds.
    strict = dataclasses.replace(
        copied.config, precision="fp16", thresholds=Thresholds(min_cosine_p1=1), plans_for=()
    )
    result, _ = build(strict)
    assert not result.gate.passed
    assert not result.is_promoted
    assert [fault.partition(" of")[0] for fault in result.gate.faults] == [
        f"{modality}: 1st percentile" for modality in MODALITIES
    ]
    engine_id = result.manifest.engine_id
    assert engine_id.startswith("fp16-")
    assert copied.registry.find(engine_id) is not None
    kept = last_gate(copied.registry, engine_id)
    assert kept is not None
    assert not kept.passed
    report = report_of(result)
    assert report["passed"] is False
    assert report["faults"] == list(result.gate.faults)
    assert "Failed</h2>" in page_of(result)
    assert result.gate.faults[0] in page_of(result)
    assert current(copied.config) == copied.result.manifest.engine_id


def scale_of(graph: onnx.GraphProto, layer: str) -> onnx.AttributeProto:
    """Where the graph keeps the scale of a layer's weights."""
    (node,) = (node for node in graph.node if node.name == f"{layer}/DequantizeLinear")
    (scale,) = (other for other in graph.node if other.output[0] == node.input[1])
    assert scale.op_type == "Constant"
    return scale.attribute[0]


def publish_damaged(registry: Registry, engine_dir: Path, *, modality: str, factor: float) -> None:
    """Publish an engine, one scale of a tower so many times as large; its checksums are right."""

    def write(directory: Path) -> Manifest:
        manifest = read_manifest(engine_dir)
        for name in manifest.files:
            shutil.copy(engine_dir / name, directory)
        path = directory / f"{modality}.onnx"
        model = onnx.load(path)
        scale = scale_of(model.graph, "/backbone/blocks.1/feed_forward/fc2")
        value = numpy_helper.to_array(scale.t)
        scale.t.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype)))
        onnx.save(model, path)
        files = {name: file_digest(directory / name) for name in manifest.files}
        assert files != manifest.files
        dataclasses.replace(manifest, files=files).write(directory)
        return manifest

    registry.obtain(read_manifest(engine_dir).engine_id, write)


@pytest.mark.parametrize("factor", [64, np.nan])
@pytest.mark.parametrize("modality", MODALITIES)
def test_a_sabotaged_scale_is_caught(
    demo_build: DemoBuild, tmp_path: Path, modality: str, factor: float
) -> None:
    registry = Registry(str(tmp_path))
    publish_damaged(registry, demo_build.engine.directory, modality=modality, factor=factor)
    config = dataclasses.replace(demo_build.config, engines_uri=registry.uri, plans_for=())
    result, _ = build(config)
    assert result.manifest.engine_id == demo_build.result.manifest.engine_id
    assert not result.gate.passed
    assert not result.is_promoted
    own = [fault for fault in result.gate.faults if fault.startswith(f"{modality}: ")]
    assert own[0].startswith(f"{modality}: 1st percentile of cosines ")
    assert own[1].startswith(f"{modality}: lowest cosine ")
    # The other tower is as it was.
    (other,) = set(MODALITIES) - {modality}
    assert not any(fault.startswith(f"{other}: ") for fault in result.gate.faults)
    assert result.gate.agreements[other] == demo_build.result.gate.agreements[other]
    assert current(config) is None
    report = report_of(result)
    assert report["faults"] == list(result.gate.faults)
    measured = report["agreements"][modality]["cosine_p1"]
    assert measured is None if np.isnan(factor) else measured < 0.9
    assert "Failed</h2>" in page_of(result)


# Another precision


def test_fp16_is_built_promoted_and_compiled(copied: DemoBuild, tmp_path: Path) -> None:
    rows = [
        {**row, "shape": next(shape for shape in SHAPES if shape in row["text"])}
        for row in scene_rows(NUM_ROWS + NUM_HELD_OUT)
    ]
    sample = dataclasses.replace(
        copied.config.sample,
        catalog=CatalogConfig(uri=str(write_rows(tmp_path / "labelled", rows))),
        label_column="shape",
    )
    config = dataclasses.replace(
        copied.config,
        precision="fp16",
        sample=sample,
        thresholds=Thresholds(),
        plans_for=("sm_86",),  # without FP8
    )
    result, steps = build(config)
    assert result.is_promoted
    assert result.manifest.precision == "fp16"
    assert result.manifest.quantization is None
    assert result.gate.agreements["image"].cosine_min > 0.9999
    assert result.gate.top1 is not None
    assert result.gate.top1.num_classes == len(SHAPES)
    assert result.gate.top1.measured == pytest.approx(result.gate.top1.reference, abs=0.01)
    assert '<th scope="row">calibrated with</th><td><bdi>nothing</bdi>' in page_of(result)
    assert not any("calibrate" in stage for stage, _, _ in steps)
    records = [read_plan(Path(path)) for path in result.plan_paths]
    assert [(record.key.architecture, record.key.profile) for record in records] == [
        ("sm_86", BULK),
        ("sm_86", QUERY),
    ]
    assert [record.image.num_fp8_products for record in records] == [0, 0]
    log = history(copied.registry, result.manifest.checkpoint_digest)
    assert [entry.engine_id for entry in log] == [
        copied.result.manifest.engine_id,
        result.manifest.engine_id,
    ]
    assert log[-1].previous == copied.result.manifest.engine_id
    assert current(config) == result.manifest.engine_id
