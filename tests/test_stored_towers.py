"""Quantized towers written to disk and read back, whole, damaged and of other towers."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import find_checkpoint
from engine.errors import EngineError
from engine.model import load_model
from engine.quantization.fp8 import FP8, QuantizedLinear, QuantizedPoint
from engine.quantization.units import replace, units_of
from engine.stored_towers import load_tower, save_tower
from engine.towers import QuantizationPoint, Tower
from tests.checkpoints import save_clip
from tests.quantized import QuantizedDemo, embed, in_16_bit

KEPT = ("backbone.blocks.0.attention.products", "backbone.blocks.1.feed_forward.fc2")
QUERY = "backbone.blocks.1.attention.query"

# What a file says that can be read without torch, ModelOpt or this project.
READ_ALONE = """
import sys
sys.modules["modelopt"] = sys.modules["torch"] = sys.modules["engine"] = None
from safetensors import safe_open
with safe_open(sys.argv[1], framework="numpy") as file:
    for name in file.keys():
        part = file.get_slice(name)
        print(name, part.get_dtype(), *part.get_shape())
"""

LOAD_WITHOUT_MODELOPT = """
import sys
sys.modules["modelopt"] = None
from pathlib import Path
import torch
from engine.checkpoint import find_checkpoint
from engine.stored_towers import load_tower
from engine.model import load_model
model = load_model(find_checkpoint(sys.argv[1]))
tower = load_tower(model.image_tower, Path(sys.argv[2]))
pixels = torch.arange(2 * 64 * 64 * 3).remainder(256).to(torch.uint8).view(2, 64, 64, 3)
with torch.inference_mode():
    print(tower(pixels).flatten().tolist())
"""


@pytest.fixture(scope="module")
def mixed(quantized_demo: QuantizedDemo) -> Tower:
    """The image tower with two of its units in 16 bit."""
    tower = copy.deepcopy(quantized_demo.quantized["image"].tower)
    original = copy.deepcopy(quantized_demo.towers["image"].original)
    for unit in units_of(tower):
        if unit.name in KEPT:
            names = (*unit.points, *unit.layers)
            replace(tower, {name: original.get_submodule(name) for name in names})
    return tower


@pytest.fixture(scope="module")
def saved(mixed: Tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "image.safetensors"
    save_tower(mixed, path)
    return path


@pytest.fixture
def empty_tower(quantized_demo: QuantizedDemo) -> Tower:
    """A tower of the right sizes, with other weights."""
    tower = copy.deepcopy(quantized_demo.towers["image"].original)
    for parameter in tower.parameters():
        parameter.data.zero_()
    return tower.train()


def fp8_bits(tower: Tower) -> dict[str, list[int]]:
    return {
        name: tensor.view(torch.uint8).flatten().tolist()
        for name, tensor in tower.state_dict().items()
        if tensor.dtype == FP8
    }


def test_what_is_saved_is_loaded_bit_for_bit(
    quantized_demo: QuantizedDemo, mixed: Tower, saved: Path, empty_tower: Tower
) -> None:
    loaded = load_tower(empty_tower, saved)
    assert not loaded.training
    assert loaded.dtype == torch.float16
    assert fp8_bits(loaded) == fp8_bits(mixed)
    expected = in_16_bit(mixed)
    for name, tensor in expected.state_dict().items():
        if tensor.dtype != FP8:
            assert tensor.dtype == torch.float16
            assert torch.equal(loaded.state_dict()[name], tensor)
    for name, module in mixed.named_modules():
        found = loaded.get_submodule(name)
        assert type(found) is type(module)
        if isinstance(module, QuantizedLinear):
            assert found.scale == module.scale
        if isinstance(module, QuantizedPoint):
            assert found.scale == np.float32(module.scale)
    held_out = quantized_demo.towers["image"].held_out
    assert np.array_equal(embed(loaded, held_out), embed(expected, held_out))


def test_names_types_and_shapes_of_the_tensors(mixed: Tower, saved: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", READ_ALONE, str(saved)], capture_output=True, text=True, check=True
    )
    lines = set(answer.stdout.splitlines())
    attention = "backbone.blocks.0.attention"
    assert lines >= {
        f"{attention}.query.weight F8_E4M3 128 128",
        f"{attention}.query.weight_scale F32",
        f"{attention}.query.bias F16 128",
        f"{attention}.input_point.scale F32",
        "backbone.blocks.1.feed_forward.fc1.weight F8_E4M3 512 128",
        "backbone.blocks.1.feed_forward.fc2.weight F16 128 512",  # kept
        "backbone.patch_embedding.weight F16 128 3 16 16",
        "projection.weight F16 128 128",
    }
    kept = [unit for unit in units_of(mixed) if unit.name in KEPT]
    for name in (part for unit in kept for part in (*unit.points, *unit.layers)):
        assert not any(line.startswith((f"{name}.scale", f"{name}.weight_scale")) for line in lines)
    # Four blocks of six layers and eight points each.
    assert sum(" F8_E4M3 " in line for line in lines) == 4 * 6 - 1
    assert sum(line.endswith("_scale F32") for line in lines) == 4 * 6 - 1
    assert sum(line.endswith("_point.scale F32") for line in lines) == 4 * 8 - 5
    assert {line.split()[1] for line in lines} == {"F8_E4M3", "F16", "F32"}


def test_blocks_take_half_of_16_bit(quantized_demo: QuantizedDemo, tmp_path: Path) -> None:
    sizes = []
    for tower in (
        quantized_demo.quantized["image"].tower,
        quantized_demo.towers["image"].original,
    ):
        save_tower(tower, tmp_path / "tower.safetensors")
        tensors = load_file(tmp_path / "tower.safetensors")
        sizes.append(sum(t.nbytes for name, t in tensors.items() if ".blocks." in name))
        assert (tmp_path / "tower.safetensors").stat().st_size < 1.1 * sum(
            tensor.nbytes for tensor in tensors.values()
        )
    assert 0.5 < sizes[0] / sizes[1] < 0.51


def test_a_tower_without_any_fp8(quantized_demo: QuantizedDemo, tmp_path: Path) -> None:
    demo = quantized_demo.towers["text"]
    save_tower(demo.original, tmp_path / "text.safetensors")
    loaded = load_tower(copy.deepcopy(demo.original), tmp_path / "text.safetensors")
    assert any(isinstance(module, QuantizationPoint) for module in loaded.modules())
    expected = embed(in_16_bit(demo.original), demo.held_out)
    assert np.array_equal(embed(loaded, demo.held_out), expected)


def test_loaded_where_modelopt_is_not(saved: Path, mixed: Tower, checkpoint_dir: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_MODELOPT, str(checkpoint_dir), str(saved)],
        capture_output=True,
        text=True,
        check=True,
    )
    pixels = torch.arange(2 * 64 * 64 * 3).remainder(256).to(torch.uint8).view(2, 64, 64, 3)
    expected = embed(in_16_bit(mixed), pixels).flatten()
    np.testing.assert_allclose(json.loads(answer.stdout), expected, rtol=0, atol=1e-3)


def refusal(tower: Tower, path: Path) -> str:
    with pytest.raises(EngineError) as caught:
        load_tower(tower, path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("remove the engine's folder and build it again")
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other", "folder"])
def test_a_damaged_file(saved: Path, empty_tower: Tower, tmp_path: Path, damage: str) -> None:
    whole, path = saved.read_bytes(), tmp_path / "image.safetensors"
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        damaged = {"empty": b"", "cut": whole[: len(whole) // 2], "other": b"x" * 99}[damage]
        path.write_bytes(damaged)
    assert "cannot be read (" in refusal(empty_tower, path)


Tensors = dict[str, Tensor]


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def rename(name: str, other: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: to(tensors[name])})


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        (drop("projection.weight"), "projection.weight"),
        (drop(f"{QUERY}.weight"), f"{QUERY}.weight"),
        (drop(f"{QUERY}.bias"), f"{QUERY}.bias"),
        (drop(f"{QUERY}.weight_scale"), f"{QUERY}: FP8 without a scale"),
        (
            change(f"{QUERY}.weight", Tensor.half),
            f"{QUERY}: FP8 without a scale, or a scale withou",
        ),
        (
            drop("backbone.blocks.1.attention.input_point.scale"),
            "backbone.blocks.1.attention.qkv: some of its points and layers are FP8, others not",
        ),
        (
            drop("backbone.blocks.1.attention.key_point.scale"),
            "backbone.blocks.1.attention.products: some of its points",
        ),
        (rename(f"{QUERY}.weight", f"{QUERY}.kernel"), f"{QUERY}.weight"),
        (rename("backbone.blocks.2.norm1.bias", "backbone.blocks.2.norm3.bias"), "norm3.bias"),
        (rename(f"{QUERY}.weight_scale", "query.weight_scale"), f"{QUERY}: FP8 without"),
        (
            rename(
                "backbone.blocks.1.attention.output_point.scale",
                "backbone.blocks.1.attention.out_point.scale",
            ),
            "backbone.blocks.1.attention.output: some of its",
        ),
        (
            lambda tensors: tensors.update({"projection.weight_scale": torch.tensor(1.0)}),
            "projection.weight_scale",
        ),
        (
            lambda tensors: tensors.update({"backbone.blocks.4.norm1.bias": torch.ones(128)}),
            "backbone.blocks.4.norm1.bias",
        ),
        (change(f"{QUERY}.weight_scale", lambda scale: scale.expand(128)), "only one element"),
        (
            change("projection.weight", lambda weight: weight[:64]),
            "projection.weight: copying a param with shape torch.Size([64, 128])",
        ),
        (change(f"{QUERY}.weight", lambda w: w[:64]), f"{QUERY}.weight is [64, 128], not [128, 12"),
    ],
)
def test_tensors_that_do_not_fit(
    saved: Path,
    empty_tower: Tower,
    tmp_path: Path,
    changed: Callable[[Tensors], object],
    detail: str,
) -> None:
    tensors = load_file(saved)
    changed(tensors)
    path = tmp_path / "image.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    text = refusal(empty_tower, path)
    assert "does not fit the engine's config.json" in text
    assert detail in text


def test_a_tower_of_other_sizes(saved: Path, tmp_path: Path) -> None:
    other = load_model(find_checkpoint(str(save_clip(tmp_path)))).image_tower
    assert "weight is [128, 128], not [32, 32]" in refusal(other, saved)


def test_the_other_tower(saved: Path, quantized_demo: QuantizedDemo) -> None:
    text_tower = copy.deepcopy(quantized_demo.towers["text"].original)
    assert "token_embedding" in refusal(text_tower, saved)
