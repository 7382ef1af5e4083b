"""The TensorRT backend on a GPU that is made up, but as strict as a real one."""

import dataclasses
import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backends.encoder import normalized
from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.backends.trt import TrtConfig, TrtEncoder
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.errors import DeviceError, DeviceMemoryError, EngineError, PlanError
from engine.manifest import Manifest, read_manifest
from engine.plans.plan import (
    PlanProfile,
    read_plan,
)
from engine.plans.plan_builder import PlanConfig, build_plans, plan_key
from engine.registry import Registry
from tests.fake_gpu import MIB, FakeCuda
from tests.fake_tensorrt import (
    SMALL_BULK,
    FakeTensorrt,
    FakeTensorrt8,
    FakeTensorrtRtx,
    expected_embeddings,
    forget_libraries,
    write_plan,
)

APIS: dict[str, type[FakeTensorrt]] = {
    "tensorrt-8": FakeTensorrt8,
    "tensorrt": FakeTensorrt,
    "tensorrt_rtx": FakeTensorrtRtx,
}
SMALL_QUERY = PlanProfile(kind="query", max_rows=3)
ONE_AT_A_TIME = TrtConfig(num_slots=1, max_graphs=0)


def unit_embeddings(rows: np.ndarray, dim: int) -> np.ndarray:
    """What an encoder makes of what the made-up TensorRT answers."""
    return normalized(expected_embeddings(rows, dim))


@pytest.fixture(scope="module")
def engine_dir(checkpoint_dir: Path, engines_dir: Path) -> Path:
    checkpoint = find_checkpoint(str(checkpoint_dir))
    return load_or_build(checkpoint, registry=Registry(str(engines_dir))).directory


@pytest.fixture(scope="module")
def manifest(engine_dir: Path) -> Manifest:
    return read_manifest(engine_dir)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeTensorrt]:
    """Puts a GPU and a TensorRT into the machine."""

    def put(api: type[FakeTensorrt] = FakeTensorrt, **gpu: Any) -> FakeTensorrt:
        forget_libraries(monkeypatch)
        cuda = FakeCuda(**gpu)
        library = api(cuda)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        name = "tensorrt_rtx" if api is FakeTensorrtRtx else "tensorrt"
        monkeypatch.setitem(sys.modules, name, library)
        return library

    return put


@pytest.fixture
def plan_dir(install: Callable[..., FakeTensorrt], engine_dir: Path, tmp_path: Path) -> Path:
    """With a GPU and a TensorRT for it."""
    return write_plan(tmp_path / "plan", engine_dir, api=install())


@pytest.fixture
def api(plan_dir: Path) -> FakeTensorrt:
    library: Any = sys.modules["tensorrt"]
    return library


def random_pixels(num_rows: int, manifest: Manifest, *, seed: int = 0) -> np.ndarray:
    size = (manifest.preprocessing.height, manifest.preprocessing.width, 3)
    return np.random.default_rng(seed).integers(0, 256, (num_rows, *size), dtype=np.uint8)


def texts_of_all_lengths(num_texts: int) -> list[str]:
    return ["a red circle on a green square " * (1 + number % 5) for number in range(num_texts)]


def expected_texts(encoder: TrtEncoder, texts: list[str], *, length_step: int) -> np.ndarray:
    found = np.empty((len(texts), encoder.manifest.embedding_dim), dtype=np.float32)
    for rows, token_ids in encoder._tokenizer.batches(texts, max_rows=4, length_step=length_step):
        found[rows] = unit_embeddings(token_ids, encoder.manifest.embedding_dim)
    return found


# Right answers


@pytest.mark.parametrize("name", APIS)
@pytest.mark.parametrize(
    ("schedule", "seed"), [("late", 0), ("early", 0), ("random", 1), ("random", 2)]
)
def test_answers_in_order_whatever_the_gpu_does_first(
    install: Callable[..., FakeTensorrt],
    engine_dir: Path,
    manifest: Manifest,
    tmp_path: Path,
    name: str,
    schedule: str,
    seed: int,
) -> None:
    api = install(APIS[name], schedule=schedule, seed=seed)
    plan_dir = write_plan(tmp_path / "plan", engine_dir, api=api)
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        for num_rows in (0, 1, 4, 5, 30, 3):
            pixels = random_pixels(num_rows, manifest, seed=num_rows)
            np.testing.assert_array_equal(
                encoder.encode_images(pixels), unit_embeddings(pixels, manifest.embedding_dim)
            )
            texts = texts_of_all_lengths(num_rows)
            np.testing.assert_array_equal(
                encoder.encode_texts(texts), expected_texts(encoder, texts, length_step=8)
            )
    assert api.cuda.calls["cudaGraphLaunch"] > 0


def test_overlap_and_graphs_change_no_bit(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest
) -> None:
    pixels, texts = random_pixels(101, manifest), texts_of_all_lengths(101)
    with TrtEncoder(engine_dir, plan_dir=plan_dir, config=ONE_AT_A_TIME) as encoder:
        plain = encoder.encode_images(pixels), encoder.encode_texts(texts)
    assert api.cuda.calls["cudaGraphLaunch"] == 0
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        images, embedded_texts = encoder.encode_images(pixels), encoder.encode_texts(texts)
    np.testing.assert_array_equal(images, plain[0])
    np.testing.assert_array_equal(embedded_texts, plain[1])


def test_a_bulk_plan_fills_short_batches(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest
) -> None:
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        encoder.encode_images(random_pixels(6, manifest))
        encoder.encode_texts(["a"])
    assert {shape[0] for shape in api.shapes} == {4}


def test_a_query_plan_runs_batches_at_their_size(
    install: Callable[..., FakeTensorrt], engine_dir: Path, manifest: Manifest, tmp_path: Path
) -> None:
    api = install()
    plan_dir = write_plan(tmp_path / "plan", engine_dir, api=api, profile=SMALL_QUERY)
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        for num_rows in (1, 2, 3, 2):
            pixels = random_pixels(num_rows, manifest)
            np.testing.assert_array_equal(
                encoder.encode_images(pixels), unit_embeddings(pixels, manifest.embedding_dim)
            )
    assert [shape[0] for shape in api.shapes] == [1, 2, 3]


def test_text_lengths_are_multiples_of_eight(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest
) -> None:
    assert manifest.text is not None
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        encoder.encode_texts([*texts_of_all_lengths(12), "a red circle " * 40])
    lengths = {shape[1] for shape in api.shapes}
    assert len(lengths) > 1
    assert max(lengths) == manifest.text.max_tokens
    assert all(length % 8 == 0 for length in lengths)


# CUDA graphs


def test_without_graphs_where_rtx_says_no(
    install: Callable[..., FakeTensorrt], engine_dir: Path, manifest: Manifest, tmp_path: Path
) -> None:
    api: Any = install(FakeTensorrtRtx)
    api.capturable = False
    plan_dir = write_plan(tmp_path / "plan", engine_dir, api=api)
    pixels = random_pixels(30, manifest)
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        np.testing.assert_array_equal(
            encoder.encode_images(pixels), unit_embeddings(pixels, manifest.embedding_dim)
        )
    assert api.cuda.calls["cudaStreamBeginCapture"] == 0


# Ends


def test_an_encoder_outlives_an_abandoned_run(
    plan_dir: Path, engine_dir: Path, manifest: Manifest
) -> None:
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        abandoned = encoder._image.run(random_pixels(4, manifest, seed=n) for n in range(9))
        next(abandoned)
        pixels = random_pixels(10, manifest, seed=99)
        np.testing.assert_array_equal(
            encoder.encode_images(pixels), unit_embeddings(pixels, manifest.embedding_dim)
        )
        with pytest.raises(RuntimeError, match="another run has begun"):
            next(abandoned)


@pytest.mark.parametrize("how", ["close", "twice", "with", "forgotten"])
def test_all_is_given_back(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest, how: str
) -> None:
    encoder: TrtEncoder | None = TrtEncoder(engine_dir, plan_dir=plan_dir)
    assert encoder is not None
    encoder.encode_images(random_pixels(30, manifest))
    encoder.encode_texts(texts_of_all_lengths(30))
    assert api.cuda.live().keys() == {"memory", "pinned", "streams", "events", "graphs"}
    if how == "forgotten":
        encoder = None
        gc.collect()
    elif how == "with":
        with encoder:
            pass
    else:
        encoder.close()
        if how == "twice":
            encoder.close()
    assert api.cuda.live() == {}
    if encoder is not None:
        with pytest.raises(DeviceError, match="this encoder is closed"):
            encoder.encode_images(random_pixels(1, manifest))


# Failures

CALLS_OF_LOADING = {
    "cudaDeviceGetAttribute": 2,
    "cudaMemGetInfo": 1,
    "cudaStreamCreateWithFlags": 6,
    "cudaHostAlloc": 12,
    "cudaMalloc": 14,
    "cudaMemset": 14,
    "cudaStreamSynchronize": 14,
    "cudaEventCreateWithFlags": 18,
}
CALLS_OF_RUNNING = (
    "cudaMemcpyAsync",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaStreamWaitEvent",
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
)


def test_calls_of_loading(api: FakeTensorrt, plan_dir: Path, engine_dir: Path) -> None:
    encoder = TrtEncoder(engine_dir, plan_dir=plan_dir)
    assert dict(api.cuda.calls) == CALLS_OF_LOADING
    encoder.close()


@pytest.mark.parametrize(
    ("name", "after"),
    [(name, after) for name, count in CALLS_OF_LOADING.items() for after in {0, count - 1}],
)
def test_a_failure_while_loading_leaks_nothing(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, name: str, after: int
) -> None:
    api.cuda.fail(name, "cudaErrorInvalidValue", after=after)
    with pytest.raises(DeviceError, match=f"{name} failed: cudaErrorInvalidValue"):
        TrtEncoder(engine_dir, plan_dir=plan_dir)
    gc.collect()
    assert api.cuda.live() == {}


@pytest.mark.parametrize("name", CALLS_OF_RUNNING)
@pytest.mark.parametrize("error", ["cudaErrorIllegalAddress", "cudaErrorInvalidValue"])
def test_after_a_failure_all_work_is_refused(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest, name: str, error: str
) -> None:
    encoder = TrtEncoder(engine_dir, plan_dir=plan_dir)
    api.cuda.fail(name, error, after=1)
    with pytest.raises(DeviceError, match=f"{name} failed: {error}") as caught:
        encoder.encode_images(random_pixels(40, manifest))
    assert ("start it anew" in str(caught.value)) == (error == "cudaErrorIllegalAddress")
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"is of no more use.*{name} failed: {error}"):
            encoder.encode_images(random_pixels(1, manifest))


@pytest.mark.parametrize(
    ("step", "kind", "text"),
    [
        ("start", DeviceError, "tensorrt 11.4.0.106 does not start: out of sorts"),
        ("load", PlanError, "image.plan: tensorrt 11.4.0.106 cannot load it (out of sorts)"),
        ("create", DeviceError, "cannot create an execution context (out of sorts)"),
        ("shape", DeviceError, "refuses an input of [4, 64, 64, 3] (out of sorts)"),
        ("run", DeviceError, "cannot run it (out of sorts)"),
    ],
)
def test_what_tensorrt_refuses_is_said(
    api: FakeTensorrt,
    plan_dir: Path,
    engine_dir: Path,
    manifest: Manifest,
    step: str,
    kind: type[EngineError],
    text: str,
) -> None:
    api.refuses = step
    with pytest.raises(kind) as caught, TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        encoder.encode_images(random_pixels(1, manifest))
    assert text in str(caught.value)
    del caught
    gc.collect()
    assert api.cuda.live() == {}


def test_a_lack_of_memory_later_on_is_survived(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest
) -> None:
    pixels = random_pixels(1, manifest)
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        api.refuses, api.reason = "create", "Cuda Runtime (out of memory)"
        with pytest.raises(DeviceMemoryError, match="fewer rows at a time"):
            encoder.encode_images(pixels)
        api.refuses = None
        np.testing.assert_array_equal(
            encoder.encode_images(pixels), unit_embeddings(pixels, manifest.embedding_dim)
        )


@pytest.mark.parametrize("wrong", [np.nan, 0.0, 1.5, np.inf])
def test_wrong_answers_are_not_handed_out(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest, wrong: float
) -> None:
    def answer(rows: np.ndarray, dim: int) -> np.ndarray:
        embeddings = expected_embeddings(rows, dim)
        embeddings[2] *= wrong
        return embeddings

    pixels = random_pixels(4, manifest)
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        api.answer = answer
        found = encoder.encode_images(pixels)
        assert np.isnan(found[2]).all()
        sound = [0, 1, 3]
        expected = unit_embeddings(pixels, manifest.embedding_dim)
        np.testing.assert_array_equal(found[sound], expected[sound])
        # What fills a batch may be anything.
        np.testing.assert_array_equal(
            encoder.encode_images(pixels[:2]),
            unit_embeddings(pixels[:2], manifest.embedding_dim),
        )


# Memory


def test_memory_is_stated_and_kept_to(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, manifest: Manifest
) -> None:
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        stated = encoder.device_memory_bytes
        encoder.encode_images(random_pixels(40, manifest))
        encoder.encode_texts(texts_of_all_lengths(40))
        assert api.cuda.used_bytes() == stated


def test_too_little_memory_is_said_before_any_is_taken(
    install: Callable[..., FakeTensorrt], engine_dir: Path, tmp_path: Path
) -> None:
    api = install(total_bytes=3 * MIB)
    profile = PlanProfile(kind="bulk", max_rows=100)
    plan_dir = write_plan(tmp_path / "plan", engine_dir, api=api, profile=profile)
    with pytest.raises(DeviceMemoryError) as caught:
        TrtEncoder(engine_dir, plan_dir=plan_dir)
    assert str(caught.value) == (
        "plan tensorrt-11.4.0.106-sm_90-bulk100 needs 4 MiB of GPU memory, of 3 MiB are 3 MiB "
        "free; end what else runs on the GPU, or use a plan with fewer than 100 rows at a time"
    )
    assert api.cuda.calls["cudaMalloc"] == 0


# Plans that do not fit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architecture": "sm_80"}, "plan built for sm_80, this GPU is sm_90; run `clipmill"),
        ({"version": "10.13.3.9"}, "plan built by tensorrt 10.13.3.9, here is 11.4.0.106; run"),
    ],
)
def test_a_plan_for_another_card_or_version_is_refused(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, change: dict[str, str], text: str
) -> None:
    record = read_plan(plan_dir)
    key = dataclasses.replace(record.key, **change)
    dataclasses.replace(record, key=key).write(plan_dir)
    with pytest.raises(PlanError) as caught:
        TrtEncoder(engine_dir, plan_dir=plan_dir)
    assert text in str(caught.value)
    assert api.cuda.calls["cudaMalloc"] == 0


def test_a_plan_of_a_library_that_is_not_here(
    plan_dir: Path, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    record = read_plan(plan_dir)
    key = dataclasses.replace(record.key, flavour="tensorrt_rtx")
    dataclasses.replace(record, key=key).write(plan_dir)
    with pytest.raises(DeviceError, match=r"no tensorrt_rtx here: pip install 'clipmill\[rtx\]'"):
        TrtEncoder(engine_dir, plan_dir=plan_dir)


def test_a_plan_of_another_engine_is_refused(plan_dir: Path, engine_dir: Path) -> None:
    dataclasses.replace(read_plan(plan_dir), engine_id="fp8-0").write(plan_dir)
    with pytest.raises(PlanError, match="plan of engine fp8-0, wanted is fp32-"):
        TrtEncoder(engine_dir, plan_dir=plan_dir)


def test_a_plan_that_its_record_misdescribes_is_refused(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, tmp_path: Path, manifest: Manifest
) -> None:
    other = shutil.copytree(engine_dir, tmp_path / "other")
    dataclasses.replace(manifest, embedding_dim=64).write(other)
    with pytest.raises(PlanError, match="gives 128 dimensions, the engine's manifest says uint8"):
        TrtEncoder(other, plan_dir=plan_dir)
    gc.collect()
    assert api.cuda.live() == {}


@pytest.mark.parametrize("name", ["image.plan", "text.plan"])
@pytest.mark.parametrize("damage", ["flipped byte", "cut", "missing"])
def test_a_damaged_plan_is_refused(
    api: FakeTensorrt, plan_dir: Path, engine_dir: Path, name: str, damage: str
) -> None:
    path = plan_dir / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped byte" else content[:-9])
    with pytest.raises(PlanError, match="the next run builds it anew") as caught:
        TrtEncoder(engine_dir, plan_dir=plan_dir)
    assert str(path) in str(caught.value)
    del caught
    gc.collect()
    assert api.cuda.live() == {}


def test_no_gpu(api: FakeTensorrt, plan_dir: Path, engine_dir: Path) -> None:
    api.cuda.fail("cudaDeviceGetAttribute", "cudaErrorInsufficientDriver")
    with pytest.raises(DeviceError, match="its NVIDIA driver is missing or too old"):
        TrtEncoder(engine_dir, plan_dir=plan_dir)


@pytest.mark.parametrize("field", ["num_slots", "max_graphs"])
def test_config_out_of_bounds(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=-1"):
        TrtConfig(**{field: -1})


def test_under_python_310() -> None:
    # What pyenv puts on the path is no interpreter unless its version is chosen.
    versions = sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))
    python = str(versions[-1]) if versions else shutil.which("python3.10")
    if python is None:
        pytest.skip("no Python 3.10 on this machine")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [python, "tests/python310.py"],
        cwd=root,
        env={"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "3.10\n"


@pytest.mark.gpu
def test_on_the_card_at_hand(engine_dir: Path, manifest: Manifest, tmp_path: Path) -> None:
    config = PlanConfig(profile=SMALL_BULK)
    try:
        plan_key(config)
    except EngineError as error:
        pytest.skip(f"needs a TensorRT that builds for this card: {error}")
    plan_dir = tmp_path / "plan"
    plan_dir.mkdir()
    build_plans(engine_dir, plan_dir=plan_dir, config=config)
    pixels, texts = random_pixels(30, manifest), texts_of_all_lengths(30)
    on_cpu = OnnxCpuEncoder(engine_dir, num_threads=1)
    with TrtEncoder(engine_dir, plan_dir=plan_dir, config=ONE_AT_A_TIME) as encoder:
        images, embedded_texts = encoder.encode_images(pixels), encoder.encode_texts(texts)
    for found, expected in (
        (images, on_cpu.encode_images(pixels)),
        (embedded_texts, on_cpu.encode_texts(texts)),
    ):
        assert np.einsum("nd,nd->n", found, expected).min() > 0.9999
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        for _ in range(2):
            np.testing.assert_array_equal(encoder.encode_images(pixels), images)
            np.testing.assert_array_equal(encoder.encode_texts(texts), embedded_texts)
