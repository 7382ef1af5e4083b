"""Tests of pipelines/building.py: small checkpoints, and what stops a build on its way."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.accuracy import Thresholds
from engine.backends.choice import Machine
from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.checkpoint import find_checkpoint
from engine.errors import DeviceMemoryError, PlanError, QuantizationError
from engine.gate_reports import last_gate
from engine.plans.plan import read_plan
from engine.promotion import promoted
from engine.registry import Registry
from jobs.engine import build_summary, main
from pipelines import building
from pipelines.building import BuildConfig, BuildResult, build_engine
from pipelines.catalog import CatalogConfig
from pipelines.errors import CatalogError
from pipelines.sampling import SampleConfig
from tests.catalogs import scene_rows, write_rows
from tests.checkpoints import IMAGE_SIZE, save_clip, save_image_only
from tests.demo_build import NUM_ROWS, build
from tests.quantized import BLOCK_PRODUCTS

PRODUCTS_OF_UNIT = {"qkv": 3, "products": 2, "output": 1, "fc1": 1, "fc2": 1}
NUM_FP16_ROWS = 64
# No 16 bit is as exact as this.
UNREACHABLE = Thresholds(min_cosine_min=1)


@pytest.fixture(scope="module")
def checkpoint_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def catalog_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("catalog"), scene_rows(NUM_FP16_ROWS)))


@pytest.fixture
def settings(checkpoint_uri: str, catalog_uri: str, tmp_path: Path) -> dict[str, Any]:
    """Of an fp16 engine, which takes seconds to build."""
    return {
        "checkpoint": checkpoint_uri,
        "precision": "fp16",
        "sample": SampleConfig(catalog=CatalogConfig(uri=catalog_uri), num_held_out=NUM_FP16_ROWS),
        "engines_uri": str(tmp_path / "engines"),
    }


def built(**settings: Any) -> BuildResult:
    return build_engine(BuildConfig(**settings), on_progress=lambda stage, done, total: None)


def test_a_current_engine_that_fails_now_stays_so_and_is_called_refused(
    settings: dict[str, Any],
) -> None:
    registry = Registry(settings["engines_uri"])
    digest = find_checkpoint(settings["checkpoint"]).digest
    failed = built(**settings, thresholds=UNREACHABLE)
    assert failed.gate.agreements["image"].num_rows == NUM_FP16_ROWS  # all: none is to calibrate
    assert not failed.is_promoted
    assert promoted(registry, digest) is None
    assert "gate failed by onnxruntime: not promoted" in build_summary(failed)
    passed = built(**settings)
    assert passed.is_promoted
    assert promoted(registry, digest) == passed.manifest.engine_id
    assert "gate passed by onnxruntime: promoted" in build_summary(passed)
    failed = built(**settings, thresholds=UNREACHABLE)
    assert failed.is_promoted
    assert (
        "gate failed by onnxruntime: current, but refused until it passes again; `clipmill engine "
        f"rollback --checkpoint {settings['checkpoint']}`"
    ) in build_summary(failed)
    gate = last_gate(registry, failed.manifest.engine_id)
    assert gate is not None
    assert not gate.passed
    report = json.loads(registry.root.read(f"{gate.path}/report.json"))
    assert report["passed"] is False
    assert report["faults"] == list(failed.gate.faults)


@pytest.mark.parametrize(
    ("precision", "architecture", "fault"),
    [
        ("fp16", "sm_90", "builds for .*, not for sm_90"),
        ("fp8", "hopper", "not for hopper"),
        ("fp8", "sm_86", "--plans-for sm_86: that GPU has no FP8; leave it out"),
    ],
)
def test_architectures_are_checked_before_anything_is_done(
    settings: dict[str, Any], precision: str, architecture: str, fault: str
) -> None:
    stages: list[str] = []
    asked = {**settings, "precision": precision, "plans_for": ("sm_89", architecture)}
    asked["sample"] = SampleConfig(catalog=settings["sample"].catalog)
    with pytest.raises(PlanError, match=fault):
        build_engine(
            BuildConfig(**asked), on_progress=lambda stage, done, total: stages.append(stage)
        )
    assert stages == []


def test_what_cannot_be_compiled_ahead_of_time_costs_no_report(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(*arguments: object, architecture: str, **other: object) -> Path:
        asked.append(architecture)
        raise PlanError("out of sorts")

    monkeypatch.setattr(building, "obtain_plan", refuse)
    registry = Registry(settings["engines_uri"])
    with pytest.raises(PlanError, match="out of sorts"):
        built(**settings, plans_for=("sm_89",))
    (engine_id,) = registry.engine_ids()
    gate = last_gate(registry, engine_id)
    assert gate is not None
    assert gate.passed
    assert promoted(registry, find_checkpoint(settings["checkpoint"]).digest) is None
    assert asked == ["sm_89"]
    built(**settings, thresholds=UNREACHABLE, plans_for=("sm_89",))
    assert asked == ["sm_89"]  # nobody needs plans of an engine that failed


def test_plans_say_which_products_are_fp8(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = built(**settings, plans_for=("sm_89",))
    assert result.is_promoted
    assert [plan.key.profile.kind for plan in result.plans] == ["bulk", "query"]
    lines = [
        f"plan {plan.key.plan_id}: image without FP8; text without FP8" for plan in result.plans
    ]
    assert all(f"  {line}\n" in build_summary(result) for line in lines)
    show = ["show", result.manifest.engine_id, "--engines", settings["engines_uri"]]
    assert main(show) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{line}\n" in shown for line in lines)
    assert main([*show, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans.keys() == {plan.key.plan_id for plan in result.plans}
    for plan in plans.values():
        assert plan["image"]["num_fp8_products"] == 0
        assert plan["text"]["fallbacks"] == []


def test_activations_that_16_bit_does_not_hold_are_found_on_a_cpu(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_clip(tmp_path / "large")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    # The second layer takes back what the first adds, so that the embeddings are as good as any.
    part = "text_model.encoder.layers.1.mlp"
    tensors[f"{part}.fc1.weight"] *= 2e4
    tensors[f"{part}.fc2.weight"] /= 2e4
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(QuantizationError) as caught:
        built(**{**settings, "checkpoint": str(folder)})
    for text in (
        "backbone.blocks.1.feed_forward.fc1: activations reach",
        "this checkpoint cannot run in 16 bit; embed with `clipmill embed --precision fp32`",
    ):
        assert text in str(caught.value)
    registry = Registry(settings["engines_uri"])
    assert promoted(registry, find_checkpoint(str(folder)).digest) is None


def test_a_card_that_is_too_small_to_build_on_is_named(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def obtain(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    card = Machine(architecture="sm_90", tensorrt_fault="none", has_torch=True)
    monkeypatch.setattr(building, "this_machine", lambda: card)
    monkeypatch.setattr(building, "_obtain", obtain)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**29, 2**33))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    with pytest.raises(DeviceMemoryError, match=r"GPU 0 \(Card\) .* or use a larger card"):
        built(**settings)


def test_fp8_needs_rows_to_calibrate_with(settings: dict[str, Any]) -> None:
    sample = SampleConfig(catalog=settings["sample"].catalog, num_rows=511)
    text = r"sample\.num_rows=511 \(--rows\): expected at least 512 to calibrate fp8 with"
    with pytest.raises(ValueError, match=text):
        BuildConfig(**{**settings, "precision": "fp8", "sample": sample})
    BuildConfig(**{**settings, "sample": sample})


# An image tower alone


@pytest.fixture
def image_only(tmp_path: Path) -> BuildConfig:
    """A small image tower of random weights, and a catalog without texts."""
    rows = [{"key": row["key"], "image": row["image"]} for row in scene_rows(NUM_ROWS + 64)]
    return BuildConfig(
        checkpoint=str(save_image_only(tmp_path / "checkpoint")),
        sample=SampleConfig(
            catalog=CatalogConfig(uri=str(write_rows(tmp_path / "images", rows))), num_held_out=64
        ),
        thresholds=Thresholds(min_cosine_p1=0.5, min_cosine_min=0.5, min_neighbour_overlap=0.5),
        backend="onnxruntime",
        plans_for=("sm_89",),
        engines_uri=str(tmp_path / "engines"),
    )


def test_an_image_tower_alone(image_only: BuildConfig) -> None:
    result, steps = build(image_only)
    assert result.is_promoted
    engine = Registry(image_only.engines_uri).find(result.manifest.engine_id)
    assert engine is not None
    assert not {"text.onnx", "text.safetensors", "tokenizer.json"} & engine.manifest.files.keys()
    audits = json.loads((engine.directory / "audit.json").read_text())
    assert audits.keys() == {"image"}
    assert engine.manifest.quantization is not None
    kept = [unit.rpartition(".")[2] for unit in engine.manifest.quantization.kept_in_16_bit]
    num_kept = sum(PRODUCTS_OF_UNIT[kind] for kind in kept)
    assert len(audits["image"]["fp8"]) == 2 * len(BLOCK_PRODUCTS) - num_kept
    assert set(result.gate.agreements) == {"image"}
    assert result.gate.recalls == ()
    assert not any(stage.startswith("text") for stage, _, _ in steps)
    for path in result.plan_paths:
        record = read_plan(Path(path))
        assert record.text is None
        assert record.image.num_fp8_products == len(audits["image"]["fp8"])
    pixels = np.zeros((3, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    assert OnnxCpuEncoder(engine.directory, num_threads=1).encode_images(pixels).shape == (3, 24)


def test_a_checkpoint_that_cannot_be_as_close_leaves_the_current_engine(
    image_only: BuildConfig,
) -> None:
    config = dataclasses.replace(image_only, plans_for=())
    before, _ = build(config)
    strict = dataclasses.replace(config, thresholds=Thresholds(min_cosine_min=1))
    with pytest.raises(QuantizationError, match="not close enough even with every unit in 16 bit"):
        build(strict)
    registry = Registry(config.engines_uri)
    assert registry.engine_ids() == [before.manifest.engine_id]
    digest = before.manifest.checkpoint_digest
    assert promoted(registry, digest) == before.manifest.engine_id
    assert registry.local.leftovers() == {}


# What there is not to build from


@pytest.mark.parametrize(
    ("num_rows", "columns", "text"),
    [
        (
            NUM_ROWS + 63,
            ("key", "image", "text"),
            "575 usable rows of 575; 512 to calibrate and at least 64 to judge",
        ),
        (640, ("key", "text"), "has no image column, .* name the column with --image-column"),
        (640, ("key", "image"), "has no text column, .* name the column with --text-column"),
    ],
)
def test_a_catalog_that_does_not_do(
    settings: dict[str, Any], tmp_path: Path, num_rows: int, columns: Sequence[str], text: str
) -> None:
    rows = [{name: row[name] for name in columns} for row in scene_rows(num_rows)]
    catalog = CatalogConfig(uri=str(write_rows(tmp_path / "rows", rows)))
    asked = {**settings, "precision": "fp8", "sample": SampleConfig(catalog=catalog)}
    with pytest.raises(CatalogError, match=text):
        built(**asked, backend="onnxruntime")
    registry = Registry(settings["engines_uri"])
    assert registry.engine_ids() == []
    assert promoted(registry, find_checkpoint(settings["checkpoint"]).digest) is None


def test_fp32_is_the_reference_itself(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="precision='fp32': such an engine is the reference"):
        BuildConfig(**{**settings, "precision": "fp32"})
