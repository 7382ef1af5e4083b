"""FP8 graphs compiled by a real TensorRT for RTX, for cards that are not there."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx_bindings as rtx

from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.errors import DeviceError, EngineError, PlanError
from engine.manifest import read_manifest, verify_files
from engine.plans import plan_builder
from engine.plans.plan import (
    PlanKey,
    PlanProfile,
    PlanRecord,
    input_shapes,
    read_plan,
)
from engine.plans.plan_builder import PlanConfig, build_plans, plan_key
from engine.registry import Registry
from tests.bindings import misuses
from tests.fake_builder import FakeBuilderApi
from tests.fake_gpu import FakeCuda
from tests.fake_tensorrt import forget_libraries
from tests.quantized_engines import ENGINE_ID, fp8_products, save_quantized_engine

SMALL_BULK = PlanProfile(kind="bulk", max_rows=4)
IN_16_BIT = "backbone.blocks.1.feed_forward.fc2"


@pytest.fixture(scope="module")
def fp32_engine_dir(checkpoint_dir: Path, engines_dir: Path) -> Path:
    checkpoint = find_checkpoint(str(checkpoint_dir))
    return load_or_build(checkpoint, registry=Registry(str(engines_dir))).directory


@pytest.fixture(scope="module")
def engine_dir(
    fp32_engine_dir: Path, checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save_quantized_engine(
        tmp_path_factory.mktemp("fp8") / "engine",
        unquantized=fp32_engine_dir,
        checkpoint_dir=checkpoint_dir,
    )


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.fail("cudaDeviceGetAttribute", "cudaErrorInsufficientDriver", forever=True)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)


def built(engine_dir: Path, plan_dir: Path, **config: Any) -> PlanRecord:
    plan_dir.mkdir()
    if "fp8_products" not in config:
        config["fp8_products"] = {
            tower: fp8_products(engine_dir / f"{tower}.onnx") for tower in ("image", "text")
        }
    config = {"flavour": "tensorrt_rtx", "profile": SMALL_BULK, **config}
    return build_plans(engine_dir, plan_dir=plan_dir, config=PlanConfig(**config))


# Built ahead of time, for real


@pytest.mark.parametrize("architecture", ["sm_89", "sm_120"])
@pytest.mark.parametrize("profile", [SMALL_BULK, PlanProfile(kind="query", max_rows=2)])
def test_fp8_plans_for_cards_that_are_not_there(
    engine_dir: Path,
    tmp_path: Path,
    architecture: str,
    profile: PlanProfile,
    capfd: pytest.CaptureFixture[str],
) -> None:
    record = built(engine_dir, tmp_path / "plan", architecture=architecture, profile=profile)
    assert record == read_plan(tmp_path / "plan")
    verify_files(record.files, directory=tmp_path / "plan")
    assert record.files.keys() == {
        "image.plan",
        "image.layers.json",
        "text.plan",
        "text.layers.json",
    }
    assert record.engine_id == ENGINE_ID
    assert record.key == PlanKey(
        flavour="tensorrt_rtx",
        version=rtx.__version__,
        architecture=architecture,
        profile=profile,
    )
    # 4 blocks of images and 2 of texts, of 8 products each.
    assert [tower.num_fp8_products for tower in record.towers.values()] == [32, 16]
    assert [tower.fallbacks for tower in record.towers.values()] == [(), ()]
    for name, tower in record.towers.items():
        shapes = input_shapes(read_manifest(engine_dir), profile)[name]
        assert (tower.min_shape, tower.max_shape) == shapes
        assert tower.plan_bytes == (tmp_path / "plan" / f"{name}.plan").stat().st_size
        assert tower.plan_bytes > 1e6
        assert tower.activation_bytes is not None
        assert tower.activation_bytes > 1e5
    assert capfd.readouterr() == ("", "")


def test_layers_are_kept(engine_dir: Path, tmp_path: Path) -> None:
    built(engine_dir, tmp_path / "plan", architecture="sm_89")
    layers = json.loads((tmp_path / "plan" / "image.layers.json").read_text())
    (patches,) = (layer for layer in layers if layer["type"] == "correlation")
    assert patches["onnx_layers"] == ["/backbone/patch_embedding/Conv"]
    assert {tensor["dtype"] for tensor in patches["inputs"]} == {"fp16"}
    (fc1,) = (
        layer
        for layer in layers
        if layer["type"] == "gemm"
        and "/backbone/blocks.0/feed_forward/fc1/MatMul" in layer["onnx_layers"]
    )
    assert [tensor["dtype"] for tensor in fc1["inputs"]] == ["fp8"]
    assert layers[-1]["outputs"][0]["name"] == "embeddings"


def test_what_falls_back_is_stated(
    fp32_engine_dir: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    engine_dir = save_quantized_engine(
        tmp_path / "engine",
        unquantized=fp32_engine_dir,
        checkpoint_dir=checkpoint_dir,
        in_16_bit=IN_16_BIT,
    )
    product = f"/{IN_16_BIT.replace('.blocks.', '/blocks.').replace('.feed', '/feed')}/MatMul"
    product = product.replace("forward.fc2", "forward/fc2")
    products = {"image": fp8_products(engine_dir / "image.onnx") | {product}}
    record = built(engine_dir, tmp_path / "plan", architecture="sm_89", fp8_products=products)
    assert record.image.fallbacks == (product,)
    assert record.image.num_fp8_products == 31


def test_an_unquantized_engine(fp32_engine_dir: Path, tmp_path: Path) -> None:
    record = built(fp32_engine_dir, tmp_path / "plan", architecture="sm_86")
    assert record.image.num_fp8_products == 0
    layers = json.loads((tmp_path / "plan" / "image.layers.json").read_text())
    dtypes = {tensor["dtype"] for layer in layers for tensor in layer["inputs"]}
    assert dtypes == {"uint8", "fp32"}


# What cannot be built


def test_a_card_without_fp8(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot compile it for sm_80 \(.*fp8_e4m3"):
        built(engine_dir, tmp_path / "plan", architecture="sm_80")
    assert not (tmp_path / "plan" / "plan.json").exists()


def test_a_card_that_rtx_does_not_know(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"builds for .*sm_89.*, not for sm_90: use TensorRT"):
        built(engine_dir, tmp_path / "plan", architecture="sm_90")


def test_no_card_and_none_named(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"driver is missing or too old.*name an architecture"):
        built(engine_dir, tmp_path / "plan")


@pytest.mark.parametrize("damage", ["missing", "cut", "not ONNX"])
def test_a_graph_that_cannot_be_read(engine_dir: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "engine"
    broken.mkdir()
    for path in engine_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    path = broken / "image.onnx"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"hello")
    with pytest.raises(PlanError, match=r"image.onnx: tensorrt_rtx .* cannot read it \(\S+"):
        built(broken, tmp_path / "plan", architecture="sm_89", fp8_products={})


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no engine there"):
        build_plans(tmp_path, plan_dir=tmp_path, config=PlanConfig(architecture="sm_89"))


# With TensorRT, for the card at hand


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeBuilderApi:
    """A TensorRT 11 and a card, both made up."""
    forget_libraries(monkeypatch)
    made: Any = FakeBuilderApi()
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(capability=(9, 0)))
    return made


def test_a_plan_of_tensorrt(api: FakeBuilderApi, engine_dir: Path, tmp_path: Path) -> None:
    record = built(
        engine_dir,
        tmp_path / "plan",
        flavour=None,
        fp8_products={"image": frozenset({"/fc1/MatMul", "/fc2/MatMul"})},
    )
    assert record.key.plan_id == "tensorrt-11.4.0.106-sm_90-bulk4"
    assert record.image.fallbacks == ("/fc2/MatMul",)
    assert record.image.activation_bytes == 12345  # as the loaded plan says
    image, text = api.configs
    assert image.profile.shapes == ((4, 64, 64, 3),) * 3
    assert text.profile.shapes == ((4, 8), (4, 32), (4, 32))
    for config in api.configs:
        assert config.flags == set()
        assert config.profiling_verbosity == "detailed"
        assert config.cache is None


def test_a_timing_cache_is_kept(api: FakeBuilderApi, engine_dir: Path, tmp_path: Path) -> None:
    config = {"flavour": None, "timing_cache_dir": tmp_path / "timings"}
    for number in (1, 2):
        built(engine_dir, tmp_path / f"plan{number}", **config)
    (path,) = (tmp_path / "timings").iterdir()
    assert path.read_bytes() == b"timed," * 4


@pytest.mark.parametrize(
    ("step", "kind", "text"),
    [
        ("start", DeviceError, "tensorrt 11.4.0.106 does not start: out of sorts"),
        ("compile", PlanError, "image.onnx: tensorrt 11.4.0.106 cannot compile it for sm_90"),
        ("load", PlanError, "cannot load its own plan (out of sorts)"),
    ],
)
def test_what_tensorrt_refuses_is_said(
    api: FakeBuilderApi,
    engine_dir: Path,
    tmp_path: Path,
    step: str,
    kind: type[EngineError],
    text: str,
) -> None:
    api.refuses = step
    with pytest.raises(kind) as caught:
        built(engine_dir, tmp_path / "plan", flavour=None)
    assert text in str(caught.value)


def test_tensorrt_builds_only_for_the_card_at_hand(
    api: FakeBuilderApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan_key(PlanConfig(architecture="sm_90")).architecture == "sm_90"
    assert plan_key(PlanConfig()).architecture == "sm_90"
    with pytest.raises(PlanError) as caught:
        plan_key(PlanConfig(architecture="sm_89"))
    assert str(caught.value) == (
        "TensorRT builds only for the card at hand, sm_90, not for sm_89: use TensorRT for RTX "
        "(`pip install 'clipmill[rtx]'`) or run on such a card"
    )
    cuda = FakeCuda()
    cuda.fail("cudaDeviceGetAttribute", "cudaErrorNoDevice", forever=True)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    with pytest.raises(PlanError, match="and here is none, for sm_89: use TensorRT for RTX"):
        plan_key(PlanConfig(architecture="sm_89"))
    with pytest.raises(DeviceError, match="CUDA sees no GPU"):
        plan_key(PlanConfig())


@pytest.mark.parametrize("version", ["8.6.0", "10.12.0.36"])
def test_an_old_tensorrt(api: FakeBuilderApi, version: str) -> None:
    api.__version__ = version
    with pytest.raises(PlanError, match=rf"TensorRT {version} is too old, 10.13 is needed"):
        plan_key(PlanConfig())


def test_the_bindings_have_what_is_used() -> None:
    objects = {
        "api": rtx,
        "library.api": rtx,
        "builder": rtx.Builder,
        "network": rtx.INetworkDefinition,
        "parser": rtx.OnnxParser,
        "error": rtx.ParserError,
        "config": rtx.IBuilderConfig,
        "profile": rtx.IOptimizationProfile,
        "engine": rtx.ICudaEngine,
        "inspector": rtx.EngineInspector,
    }
    used = set()
    for function in (
        plan_builder._compiled,
        plan_builder._parser_errors,
        plan_builder._inspected,
    ):
        names, wrong = misuses(function, objects)
        assert not wrong
        used |= names
    assert {
        "create_network",
        "parse_from_file",
        "node_name",
        "get_engine_information",
        "device_memory_size_v2",
        "REQUIRE_USER_ALLOCATION",
    } <= used
