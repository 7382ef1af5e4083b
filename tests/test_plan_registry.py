"""An engine's plans, compiled once for all who ask, by TensorRT for RTX itself or by a made-up one.

The engine is FP8 but for one layer; its audit says so.
"""

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import tensorrt_rtx_bindings as rtx

from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.errors import DamagedError, EngineError, PlanError
from engine.manifest import AUDIT_FILE, file_digest, read_manifest, verify_files
from engine.plans import plan_registry
from engine.plans.plan import PlanProfile, read_plan
from engine.plans.plan_builder import build_plans
from engine.plans.plan_registry import obtain_plan
from engine.registry import Engine, Registry
from tests.engines import flip_byte
from tests.fake_builder import FakeBuilderApi
from tests.fake_gpu import FakeCuda
from tests.fake_tensorrt import forget_libraries
from tests.quantized_engines import ENGINE_ID, fp8_products, save_quantized_engine

REPOSITORY_DIR = Path(__file__).resolve().parents[1]
BULK, QUERY = PlanProfile(kind="bulk", max_rows=4), PlanProfile(kind="query", max_rows=2)
IN_16_BIT = "backbone.blocks.1.feed_forward.fc2"
PRODUCT_IN_16_BIT = "/backbone/blocks.1/feed_forward/fc2/MatMul"
NUM_ASKERS = 4
Audits = Mapping[str, Mapping[str, Sequence[str]]]
Publish = Callable[..., tuple[Registry, Engine]]

# Asks when told to; a build writes a line to a log.
ASK = """
import sys
from pathlib import Path
from engine.plans import plan_registry
from engine.plans.plan import PlanProfile
from engine.registry import Registry

uri, engine_id, log = sys.argv[1:]
build_plans = plan_registry.build_plans

def logged(*arguments, **named):
    with open(log, "a") as file:
        file.write("built\\n")
    return build_plans(*arguments, **named)

plan_registry.build_plans = logged
registry = Registry(uri)
engine = registry.find(engine_id)
print("ready", flush=True)
sys.stdin.readline()
print(
    plan_registry.obtain_plan(
        engine,
        registry=registry,
        profile=PlanProfile(kind="bulk", max_rows=4),
        flavour="tensorrt_rtx",
        architecture="sm_89",
    )
)
"""


@pytest.fixture(scope="module")
def files_dir(
    checkpoint_dir: Path, engines_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The engine's files, without an audit."""
    checkpoint = find_checkpoint(str(checkpoint_dir))
    return save_quantized_engine(
        tmp_path_factory.mktemp("fp8") / "engine",
        unquantized=load_or_build(checkpoint, registry=Registry(str(engines_dir))).directory,
        checkpoint_dir=checkpoint_dir,
        in_16_bit=IN_16_BIT,
    )


@pytest.fixture(scope="module")
def audits(files_dir: Path) -> Audits:
    return {
        tower: {"fp8": sorted(fp8_products(files_dir / f"{tower}.onnx"))}
        for tower in ("image", "text")
    }


@pytest.fixture
def publish(files_dir: Path, tmp_path: Path) -> Publish:
    """Publishes the engine, with an audit if one is given, in a registry of its own."""

    def publish_engine(audits: Audits | None = None) -> tuple[Registry, Engine]:
        def build(directory: Path) -> None:
            shutil.copytree(files_dir, directory, dirs_exist_ok=True)
            manifest = read_manifest(directory)
            files = dict(manifest.files)
            if audits is not None:
                (directory / AUDIT_FILE).write_text(json.dumps(audits))
                files[AUDIT_FILE] = file_digest(directory / AUDIT_FILE)
            dataclasses.replace(manifest, files=files).write(directory)

        registry = Registry(str(tmp_path / "engines"))
        return registry, registry.obtain(ENGINE_ID, build)

    return publish_engine


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.fail("cudaDeviceGetAttribute", "cudaErrorInsufficientDriver", forever=True)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[PlanProfile]:
    """The profile of each build."""
    profiles: list[PlanProfile] = []

    def counted(engine_dir: Path, **arguments: Any) -> object:
        profiles.append(arguments["config"].profile)
        return build_plans(engine_dir, **arguments)

    monkeypatch.setattr(plan_registry, "build_plans", counted)
    return profiles


def obtain(found: tuple[Registry, Engine], **wanted: Any) -> Path:
    registry, engine = found
    settings = {"profile": BULK, "flavour": "tensorrt_rtx", "architecture": "sm_89", **wanted}
    return obtain_plan(engine, registry=registry, **settings)


def input_shapes_of(layers_path: Path) -> dict[str, list[int]]:
    """The inputs of the whole tower as its layers read them."""
    tensors = [
        tensor for layer in json.loads(layers_path.read_text()) for tensor in layer["inputs"]
    ]
    return {t["name"]: t["dimensions"] for t in tensors if t["name"] in ("pixels", "token_ids")}


def test_a_plan_lies_under_its_engine_and_is_compiled_once(
    publish: Publish, audits: Audits, built: list[PlanProfile]
) -> None:
    registry, engine = found = publish(audits)
    directory = obtain(found)
    plan_id = f"tensorrt_rtx-{rtx.__version__}-sm_89-bulk4"
    assert directory == engine.directory / "plans" / plan_id
    assert registry.plan_ids(ENGINE_ID) == [plan_id]
    record = read_plan(directory)
    verify_files(record.files, directory=directory)
    assert (record.engine_id, record.key.plan_id) == (ENGINE_ID, plan_id)
    assert obtain(found) == directory
    assert built == [BULK]


def test_another_profile_and_another_card_are_other_plans(
    publish: Publish, built: list[PlanProfile]
) -> None:
    registry, _ = found = publish()
    wanted = [(BULK, "sm_89"), (QUERY, "sm_89"), (BULK, "sm_120")]
    directories = [obtain(found, profile=profile, architecture=card) for profile, card in wanted]
    assert len(set(directories)) == 3
    assert built == [BULK, QUERY, BULK]
    assert sorted(registry.plan_ids(ENGINE_ID)) == sorted(path.name for path in directories)
    for directory, (profile, card) in zip(directories, wanted, strict=True):
        record = read_plan(directory)
        assert (record.key.profile, record.key.architecture) == (profile, card)
        verify_files(record.files, directory=directory)
    plans = [(directory / "image.plan").read_bytes() for directory in directories]
    assert len(set(plans)) == 3


def test_threads_that_ask_at_once_get_each_plan_compiled_once(
    publish: Publish, audits: Audits, built: list[PlanProfile]
) -> None:
    found = publish(audits)
    together = Barrier(2 * NUM_ASKERS)

    def ask(profile: PlanProfile) -> Path:
        together.wait()
        return obtain(found, profile=profile)

    with ThreadPoolExecutor(2 * NUM_ASKERS) as pool:
        directories = list(pool.map(ask, (BULK, QUERY) * NUM_ASKERS))
    assert sorted(profile.kind for profile in built) == ["bulk", "query"]
    bulk, query = directories[:2]
    assert directories == [bulk, query] * NUM_ASKERS
    for directory, rows in ((bulk, BULK.max_rows), (query, -1)):
        record = read_plan(directory)
        assert record.image.num_fp8_products == 31
        # Of its own plan, though others were compiled at the same time.
        assert input_shapes_of(directory / "image.layers.json") == {"pixels": [rows, 64, 64, 3]}
        assert input_shapes_of(directory / "text.layers.json") == {"token_ids": [rows, -1]}


def test_processes_that_ask_at_once_get_one_plan(publish: Publish, tmp_path: Path) -> None:
    registry, _ = publish()
    log = tmp_path / "log"
    command = [sys.executable, "-c", ASK, registry.uri, ENGINE_ID, str(log)]
    with ExitStack() as running:
        askers = [
            running.enter_context(
                subprocess.Popen(
                    command,
                    cwd=REPOSITORY_DIR,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(NUM_ASKERS)
        ]
        for asker in askers:
            assert asker.stdout is not None
            assert asker.stdout.readline() == "ready\n"
        for asker in askers:
            assert asker.stdin is not None
            asker.stdin.write("\n")
            asker.stdin.flush()
        answers = [asker.communicate()[0].strip() for asker in askers]
        assert [asker.returncode for asker in askers] == [0] * NUM_ASKERS
    assert log.read_text() == "built\n"
    assert len(set(answers)) == 1
    verify_files(read_plan(Path(answers[0])).files, directory=Path(answers[0]))


def test_what_should_be_fp8_is_what_the_audit_says(publish: Publish, audits: Audits) -> None:
    # That one layer of the image tower stayed in 16 bit was no wish, and is no news.
    record = read_plan(obtain(publish(audits)))
    assert [tower.num_fp8_products for tower in record.towers.values()] == [31, 15]
    assert [tower.fallbacks for tower in record.towers.values()] == [(), ()]


def test_what_the_audit_says_and_the_plan_lacks_fell_back(publish: Publish, audits: Audits) -> None:
    wished = {"image": {"fp8": [*audits["image"]["fp8"], PRODUCT_IN_16_BIT]}}
    record = read_plan(obtain(publish(wished)))
    assert record.image.num_fp8_products == 31
    assert record.image.fallbacks == (PRODUCT_IN_16_BIT,)
    assert record.text is not None
    assert (record.text.num_fp8_products, record.text.fallbacks) == (0, ())  # not in the audit


def test_without_an_audit_nothing_is_expected_to_be_fp8(publish: Publish) -> None:
    directory = obtain(publish())
    record = read_plan(directory)
    assert [tower.num_fp8_products for tower in record.towers.values()] == [0, 0]
    assert [tower.fallbacks for tower in record.towers.values()] == [(), ()]
    assert '"fp8"' in (directory / "image.layers.json").read_text()


@pytest.mark.parametrize("name", ["image.plan", "text.layers.json"])
def test_a_flipped_byte_is_refused_and_the_plan_compiled_anew(
    publish: Publish, built: list[PlanProfile], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = publish()
    directory = obtain(found)
    flip_byte(directory / name)
    with pytest.raises(DamagedError, match="does not match its checksum"):
        verify_files(read_plan(directory).files, directory=directory)
    with caplog.at_level(logging.WARNING):
        assert obtain(found) == directory
    assert f"{directory.name} is damaged and not used" in caplog.text
    assert built == [BULK, BULK]
    verify_files(read_plan(directory).files, directory=directory)


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        (
            "sm_90",
            r"not for sm_90: use TensorRT \(`pip install 'clipmill\[gpu\]'`\) on such a card",
        ),
        ("sm_80", r"cannot compile it for sm_80 \(.*fp8_e4m3"),
    ],
)
def test_a_card_that_rtx_cannot_compile_it_for(
    publish: Publish, architecture: str, text: str
) -> None:
    registry, engine = found = publish()
    with pytest.raises(PlanError, match=text):
        obtain(found, architecture=architecture)
    assert registry.plan_ids(ENGINE_ID) == []
    assert registry.local.leftovers() == {}
    assert registry.find(ENGINE_ID) == engine


def test_an_engine_that_is_gone(publish: Publish) -> None:
    _, engine = found = publish()
    shutil.rmtree(engine.directory)
    with pytest.raises(EngineError, match=f"no whole engine {ENGINE_ID} to make a plan of"):
        obtain(found)


def test_plans_of_tensorrt_share_a_timing_cache_beside_them(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_libraries(monkeypatch)
    api: Any = FakeBuilderApi()
    monkeypatch.setitem(sys.modules, "tensorrt", api)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(capability=(9, 0)))
    registry, engine = found = publish()
    here = {"flavour": None, "architecture": None}
    names = [obtain(found, profile=profile, **here).name for profile in (BULK, QUERY)]
    assert names == [f"tensorrt-{api.__version__}-sm_90-{kind}" for kind in ("bulk4", "query2")]
    caches = list((engine.directory / "plans").glob("*.timing"))
    assert [path.read_bytes() for path in caches] == [b"timed," * 4]  # two plans of two towers
    assert sorted(registry.plan_ids(ENGINE_ID)) == names
    assert registry.find(ENGINE_ID) == engine
