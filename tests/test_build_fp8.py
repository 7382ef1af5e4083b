"""Fp8 engines as folders of files: what they are called, what they hold, and what is said of it."""

import dataclasses
import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import build_fp8 as module
from engine.accuracy import Agreement, Thresholds, agreement, row_cosines
from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.build_fp8 import build_fp8, fp8_engine_id
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.errors import QuantizationError
from engine.manifest import FP8_RECIPE, Manifest, read_manifest
from engine.model import Model, load_model
from engine.quantization.audit import audit_graph
from engine.quantization.quantize import QuantizedTower
from engine.quantization.units import units_of
from engine.reference import ReferenceEncoder
from engine.sample import Sample
from tests.checkpoints import save_clip
from tests.demo_build import NUM_ROWS, THRESHOLDS, DemoBuild, Steps, one_thread
from tests.quantized import IN_16_BIT, MODALITIES, NUM_BLOCKS, with_gains

WIDTH, HIDDEN = 128, 512
LAYER = "backbone.blocks.0.feed_forward.fc1"
ROWS_PER_BATCH = 16
# The text tower with channels a million times as large as others in block 1.
OUTLIERS = (5, 60, 100)
OTHERS = tuple(channel for channel in range(WIDTH) if channel not in OUTLIERS)
KEPT = {"backbone.blocks.1.attention.qkv", "backbone.blocks.1.feed_forward.fc1"}
KEPT_PRODUCTS = {
    f"/backbone/blocks.1/{layer}/MatMul"
    for layer in ("attention/query", "attention/key", "attention/value", "feed_forward/fc1")
}

LOAD_WITHOUT_MODELOPT = """
import sys
sys.modules["modelopt"] = sys.modules["onnx"] = None
from pathlib import Path
import torch
from engine.manifest import read_manifest
from engine.stored_towers import load_towers
from engine.tokenization import Tokenizer
directory = Path(sys.argv[1])
manifest = read_manifest(directory)
model = load_towers(directory, preprocessing=manifest.preprocessing)
tokenizer = Tokenizer(directory / "tokenizer.json", text=manifest.text)
((_, token_ids),) = tokenizer.batches(sys.argv[2:], max_rows=16, length_step=1)
with torch.inference_mode():
    pixels = torch.arange(2 * 64 * 64 * 3).remainder(256).to(torch.uint8).view(2, 64, 64, 3)
    print(model.image_tower(pixels).tolist())
    print(model.text_tower(torch.from_numpy(token_ids)).tolist())
"""


def content(path: Path) -> Any:
    """Of a JSON file."""
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def checkpoint(checkpoint_dir: Path) -> Checkpoint:
    return find_checkpoint(str(checkpoint_dir))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def engine_dir(demo_build: DemoBuild) -> Path:
    return demo_build.engine.directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted:
    """An engine of a text tower with outliers, and of the image tower as it is."""

    model: Model
    directory: Path
    manifest: Manifest
    steps: Steps


@pytest.fixture(scope="module")
def planted(
    demo_build: DemoBuild,
    checkpoint: Checkpoint,
    model: Model,
    tmp_path_factory: pytest.TempPathFactory,
) -> Planted:
    tower = model.text_tower
    assert tower is not None
    tower = with_gains(tower, block=1, channels=OUTLIERS, gain=2.0**10)
    tower = with_gains(tower, block=1, channels=OTHERS, gain=2.0**-10)
    changed = dataclasses.replace(model, text_tower=tower)
    directory = tmp_path_factory.mktemp("planted")
    steps: list[tuple[str, int, int]] = []
    with one_thread():
        manifest = build_fp8(
            checkpoint,
            changed,
            directory,
            sample=demo_build.calibration,
            thresholds=THRESHOLDS,
            device="cpu",
            on_progress=lambda *step: steps.append(step),
        )
    return Planted(model=changed, directory=directory, manifest=manifest, steps=tuple(steps))


# What it is called


def sample(**changes: Any) -> Sample:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    return Sample(**{"uri": "catalog", "pixels": pixels, "texts": ("a", "bc"), **changes})


def test_an_id_covers_all_that_makes_the_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = find_checkpoint(str(save_clip(tmp_path)))
    usual = {"sample": sample(), "thresholds": Thresholds()}
    pixels = sample().pixels
    assert pixels is not None
    changes: list[dict[str, Any]] = [
        {},
        {"sample": sample(pixels=pixels[::-1])},
        {"sample": sample(pixels=None)},
        {"sample": sample(texts=("ab", "c"))},
        {"sample": sample(texts=None)},
    ]
    ids = [fp8_engine_id(checkpoint, **{**usual, **change}) for change in changes]
    ids.append(fp8_engine_id(other, **usual))
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("fp8-[0-9a-f]{16}", engine_id) for engine_id in ids)
    # Where the rows came from, and what they are called, changes nothing.
    elsewhere = sample(uri="s3://elsewhere", labels=("x", "y"))
    assert fp8_engine_id(checkpoint, sample=elsewhere, thresholds=Thresholds()) == ids[0]


def test_the_engine_has_the_id(demo_build: DemoBuild, checkpoint: Checkpoint) -> None:
    expected = fp8_engine_id(checkpoint, sample=demo_build.calibration, thresholds=THRESHOLDS)
    assert demo_build.engine.manifest.engine_id == expected


# What it holds


def test_the_account_of_the_quantization(demo_build: DemoBuild, engine_dir: Path) -> None:
    account = content(engine_dir / "quantization.json")
    assert account.keys() == {"recipe", "sample", "thresholds", "towers"}
    assert account["recipe"] == FP8_RECIPE
    assert account["sample"] == {
        "calibration_uri": demo_build.config.sample.catalog.uri,
        "calibration_digest": demo_build.calibration.digest,
        "num_calibration_rows": NUM_ROWS,
        "kept_in_16_bit": [],
    }
    assert Thresholds(**account["thresholds"]) == THRESHOLDS
    assert account["towers"].keys() == set(MODALITIES)
    for tower in account["towers"].values():
        assert tower["agreement"]["num_rows"] == NUM_ROWS
        assert 0.98 < tower["agreement"]["cosine_p1"] < 0.9999
        assert tower["kept_in_16_bit"] == tower["costs"] == []


def test_units_kept_in_16_bit_are_listed(planted: Planted) -> None:
    quantization = planted.manifest.quantization
    assert quantization is not None
    assert set(quantization.kept_in_16_bit) == {f"text.{unit}" for unit in KEPT}
    account = content(planted.directory / "quantization.json")
    assert account["sample"]["kept_in_16_bit"] == list(quantization.kept_in_16_bit)
    assert account["towers"]["image"]["kept_in_16_bit"] == []
    text = account["towers"]["text"]
    assert [f"text.{unit}" for unit in text["kept_in_16_bit"]] == list(quantization.kept_in_16_bit)
    assert planted.model.text_tower is not None
    costs = {cost["unit"]: cost["loss"] / cost["share"] for cost in text["costs"]}
    assert costs.keys() == {unit.name for unit in units_of(planted.model.text_tower)}
    assert min(costs[unit] for unit in KEPT) > max(costs[unit] for unit in costs.keys() - KEPT)
    kept = quantization.kept_in_words()
    assert kept in ("text 1.qkv, 1.fc1", "text 1.fc1, 1.qkv")
    assert f"Kept in 16 bit: {kept}.\n" in (planted.directory / "README.md").read_text()
    assert read_manifest(planted.directory) == planted.manifest


@pytest.mark.parametrize("modality", MODALITIES)
def test_what_is_kept_is_16_bit_in_graph_and_audit(planted: Planted, modality: str) -> None:
    audit = content(planted.directory / "audit.json")[modality]
    kept = KEPT_PRODUCTS if modality == "text" else set()
    assert set(audit["not_fp8"]) == {*IN_16_BIT[modality], *kept}
    assert len(audit["fp8"]) == 8 * NUM_BLOCKS[modality] - len(kept)
    assert audit["faults"] == []
    tower = {"image": planted.model.image_tower, "text": planted.model.text_tower}[modality]
    assert tower is not None
    quantized = [unit for unit in units_of(tower) if modality == "image" or unit.name not in KEPT]
    found = audit_graph(planted.directory / f"{modality}.onnx", units=quantized)
    assert json.loads(json.dumps(dataclasses.asdict(found))) == audit
    tensors = load_file(planted.directory / f"{modality}.safetensors")
    in_fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert in_fp8 == {f"{layer}.weight" for unit in quantized for layer in unit.layers}


def test_an_engine_with_units_in_16_bit_is_as_close_as_was_asked_for(
    planted: Planted, demo_build: DemoBuild
) -> None:
    ours = OnnxCpuEncoder(planted.directory, num_threads=1)
    theirs = ReferenceEncoder(
        planted.model, engine_dir=planted.directory, manifest=planted.manifest, device="cpu"
    )
    texts = demo_build.held_out.texts
    assert texts is not None
    with one_thread():
        agreed = agreement(ours.encode_texts(texts), theirs.encode_texts(texts))
    assert THRESHOLDS.faults(agreed) == []
    assert agreed.cosine_mean < 0.99999


@pytest.mark.parametrize("modality", MODALITIES)
def test_fp8_takes_a_byte_for_each_weight_of_the_blocks(
    model: Model, engine_dir: Path, modality: str
) -> None:
    tower = {"image": model.image_tower, "text": model.text_tower}[modality]
    assert tower is not None
    num_parameters = sum(parameter.numel() for parameter in tower.parameters())
    # Query, key, value, output, fc1 and fc2.
    in_fp8 = NUM_BLOCKS[modality] * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    assert in_fp8 > 0.6 * num_parameters
    num_scales = NUM_BLOCKS[modality] * (6 + 8)  # of weights and of inputs, 4 bytes each
    path = engine_dir / f"{modality}.safetensors"
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    expected = in_fp8 + 2 * (num_parameters - in_fp8) + 4 * num_scales
    assert path.stat().st_size == header_bytes + expected
    assert header_bytes < 0.02 * expected


# What is said of it


def code_of(readme: str) -> str:
    """The lines of Python in it."""
    return "\n".join(line[4:] for line in readme.splitlines() if line.startswith("    "))


def test_the_readme_names_what_is_there(demo_build: DemoBuild, engine_dir: Path) -> None:
    readme = (engine_dir / "README.md").read_text()
    manifest = demo_build.engine.manifest
    assert readme.startswith(f"# {manifest.engine_id}\n\n`{manifest.checkpoint}` in FP8 (E4M3), ")
    assert f"ModelOpt {manifest.versions['nvidia-modelopt']}.\n" in readme
    assert "Kept in 16 bit: no unit.\n" in readme
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert named == {*manifest.files, "manifest.json"} - {"README.md"}
    assert "{" not in readme


def test_the_readmes_code_reads_a_weight(
    model: Model, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(engine_dir)
    read: dict[str, Any] = {}
    exec(code_of((engine_dir / "README.md").read_text()), read)
    assert read["layer"] == LAYER
    original = model.image_tower.state_dict()[f"{LAYER}.weight"]
    assert read["weight"].shape == original.shape == (HIDDEN, WIDTH)
    # Rounded to three bits after the first; rounding for the output moves some weights further.
    assert 0.01 < float((read["weight"] - original).norm() / original.norm()) < 0.06


def test_the_readme_tells_which_point_rounds_the_input_of_a_layer(engine_dir: Path) -> None:
    text = " ".join((engine_dir / "README.md").read_text().split())
    assert "`input_point` for query, key and value, else `<layer>_point`" in text
    for modality in MODALITIES:
        tensors = load_file(engine_dir / f"{modality}.safetensors")
        layers = [name.removesuffix(".weight_scale") for name in tensors if "weight_scale" in name]
        assert len(layers) == 6 * NUM_BLOCKS[modality]
        for layer in layers:
            parent, _, name = layer.rpartition(".")
            point = "input_point" if name in ("query", "key", "value") else f"{name}_point"
            assert f"{parent}.{point}.scale" in tensors


def test_loaded_without_modelopt_it_is_the_same(engine_dir: Path) -> None:
    texts = ("a red circle on a white background", "two squares")
    answer = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_MODELOPT, str(engine_dir), *texts],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    images, tokens = (np.array(json.loads(line)) for line in answer.stdout.splitlines())
    encoder = OnnxCpuEncoder(engine_dir, num_threads=1)
    pixels = np.resize(np.arange(256, dtype=np.uint8), (2, 64, 64, 3))
    assert row_cosines(images, encoder.encode_images(pixels)).min() > 0.999
    # Batches go by length: the shorter text may come first.
    expected = encoder.encode_texts(texts)
    assert (tokens @ expected.T).max(axis=1).min() > 0.999


# Its progress


def steps_of(steps: Steps, stage: str) -> list[tuple[int, int]]:
    return [(done, total) for name, done, total in steps if name == stage]


def test_progress_counts_batches_and_units(planted: Planted) -> None:
    num_batches = NUM_ROWS // ROWS_PER_BATCH
    for modality in MODALITIES:
        num_units = 4 * NUM_BLOCKS[modality]
        for stage, total in (("calibrate", num_batches), ("round", num_units)):
            counts = steps_of(planted.steps, f"{modality}: {stage}")
            assert counts == [(done, total) for done in range(total + 1)]
    stages = list(dict.fromkeys(stage for stage, _, _ in planted.steps))
    assert stages[:3] == ["image: calibrate", "image: round", "image: judge"]
    assert stages[3:7] == ["text: calibrate", "text: round", "text: judge", "text: rank"]
    assert stages[-2:] == ["text: judge with 1 of 10 units in 16 bit", "export"]
    assert steps_of(planted.steps, "export") == [(0, 1), (1, 1)]


# What does not allow it


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("texts", "the sample has no texts to calibrate the text tower with"),
        ("pixels", "the sample has no images to calibrate the image tower with"),
    ],
)
def test_a_sample_without_what_a_tower_takes(
    demo_build: DemoBuild,
    checkpoint: Checkpoint,
    model: Model,
    tmp_path: Path,
    missing: str,
    text: str,
) -> None:
    steps: list[tuple[str, int, int]] = []
    with pytest.raises(QuantizationError, match=text):
        build_fp8(
            checkpoint,
            model,
            tmp_path,
            sample=dataclasses.replace(demo_build.calibration, **{missing: None}),
            thresholds=THRESHOLDS,
            device="cpu",
            on_progress=lambda *step: steps.append(step),
        )
    assert steps == []  # before any work is done
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"max_recall_loss": 0.5}, False),
        ({"max_top1_loss": 0.5}, False),
        ({"min_cosine_p1": 0.5}, True),
        ({"min_cosine_min": 0.5}, True),
        ({"min_neighbour_overlap": 0.5}, True),
    ],
)
def test_thresholds_of_the_gate_alone_ask_for_no_other_engine(
    checkpoint: Checkpoint, change: dict[str, float], is_another: bool
) -> None:
    sample = Sample(uri="catalog", pixels=np.zeros((1, 2, 2, 3), dtype=np.uint8), texts=("a",))
    usual, changed = (
        fp8_engine_id(checkpoint, sample=sample, thresholds=thresholds)
        for thresholds in (Thresholds(), Thresholds(**change))
    )
    assert (changed != usual) == is_another


class FarEnoughError(Exception):
    """Nothing after this is of interest."""


def test_simulations_are_let_go_before_the_towers_are_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulations: list[weakref.ref[nn.Module]] = []

    def quantize_tower(tower: nn.Module, *arguments: object, **others: object) -> Any:
        simulation = nn.Linear(1, 1)
        simulations.append(weakref.ref(simulation))
        return QuantizedTower(
            tower=tower,
            fake_quantized=simulation,
            quantized=(),
            kept=(),
            costs=(),
            agreement=Agreement(
                num_rows=1, cosine_mean=1, cosine_p1=1, cosine_min=1, neighbour_overlap=1
            ),
        )

    def write_towers(*arguments: object, **others: object) -> None:
        gc.collect()
        assert [simulation() for simulation in simulations] == [None, None]
        raise FarEnoughError

    monkeypatch.setattr(module, "quantize_tower", quantize_tower)
    monkeypatch.setattr(module, "write_towers", write_towers)
    with pytest.raises(FarEnoughError):
        build_fp8(
            checkpoint,
            load_model(checkpoint),
            tmp_path,
            sample=Sample(
                uri="catalog", pixels=np.zeros((1, 64, 64, 3), dtype=np.uint8), texts=("a",)
            ),
            thresholds=Thresholds(),
            device="cpu",
            on_progress=lambda stage, done, total: None,
        )
