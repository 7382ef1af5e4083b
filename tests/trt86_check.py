"""Checks the TensorRT backend on a real GPU, with TensorRT 8.6 under Python 3.10.

    PYTHONPATH=$PWD:$PYTHONPATH python3.10 tests/trt86_check.py FOLDER ... [--bulk 256] [--query 8]

Each folder comes from tests/export_for_trt86.py. Needs tensorrt 8.6, cuda-bindings, numpy, pillow
and tokenizers, and no torch. TensorRT 8.6 is the last whose whole wheel can be had anywhere; it
has no FP8, so the plans are FP16, built here. The backend that runs them is the one that runs FP8
plans with TensorRT 10.13 to 11.

Prints a log, and as the last line a JSON object; exit 1 if a check fails.
"""

import argparse
import dataclasses
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.encoder import normalized
from engine.backends.trt import TrtConfig, TrtEncoder
from engine.device import Device, open_device
from engine.errors import DeviceMemoryError, EngineError, PlanError
from engine.manifest import IMAGE_ONNX, TEXT_ONNX, file_digest, read_manifest
from engine.plans.plan import (
    PlanKey,
    PlanProfile,
    PlanRecord,
    TowerPlan,
    input_shapes,
    layers_file,
    plan_file,
    read_plan,
)
from engine.plans.runtimes import Library, installed_library

MIB = 2**20
MIN_COSINE = 0.999
NUM_BATCHES = 100
ONE_AT_A_TIME = TrtConfig(num_slots=1, max_graphs=0)
WAYS = {
    "overlap and graphs": TrtConfig(),
    "overlap": TrtConfig(max_graphs=0),
    "graphs": TrtConfig(num_slots=1),
    "one at a time": ONE_AT_A_TIME,
}


class Log:
    """Results as they come."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.figures: dict[str, Any] = {}

    def say(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def check(self, name: str, passed: Any, detail: str = "") -> None:
        self.say(f"{'ok    ' if passed else 'FAILED'} {name}{f': {detail}' if detail else ''}")
        if not passed:
            self.failures.append(name)

    def section(self, name: str, checks: Callable[[], None]) -> None:
        """Run checks; what they raise is a failure, and the next ones run all the same."""
        try:
            checks()
        except Exception:
            self.check(name, False, traceback.format_exc())

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self.say(f"       {name}: {value}")


# Building


def build(engine_dir: Path, plan_dir: Path, *, profile: PlanProfile, library: Library) -> None:
    """Write a plan folder as engine/plans/plan_builder.py does, with TensorRT 8.6 and in FP16."""
    manifest = read_manifest(engine_dir)
    plan_dir.mkdir(parents=True)
    started = time.monotonic()
    towers: dict[str, TowerPlan] = {}
    for tower, shapes in input_shapes(manifest, profile).items():
        onnx_path = engine_dir / {"image": IMAGE_ONNX, "text": TEXT_ONNX}[tower]
        plan = compiled(onnx_path, shapes=shapes, library=library)
        engine = library.api.Runtime(library.logger).deserialize_cuda_engine(plan)
        (plan_dir / plan_file(tower)).write_bytes(plan)
        (plan_dir / layers_file(tower)).write_text("[]\n")  # 8.6 says them in another form
        towers[tower] = TowerPlan(
            min_shape=shapes[0],
            max_shape=shapes[1],
            plan_bytes=plan.nbytes,
            activation_bytes=engine.device_memory_size,
            num_fp8_products=0,
            fallbacks=(),
        )
    PlanRecord(
        engine_id=manifest.engine_id,
        key=PlanKey(
            flavour="tensorrt",
            version=library.version,
            architecture=open_device().architecture,
            profile=profile,
        ),
        build_seconds=round(time.monotonic() - started, 1),
        files={path.name: file_digest(path) for path in sorted(plan_dir.iterdir())},
        **towers,  # type: ignore[arg-type]
    ).write(plan_dir)


def compiled(onnx_path: Path, *, shapes: Any, library: Library) -> Any:
    api = library.api
    with library.log.recording():
        builder = api.Builder(library.logger)
        network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        parser = api.OnnxParser(network, library.logger)
        if not parser.parse_from_file(str(onnx_path)):
            errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
            raise PlanError(f"{onnx_path}: {'; '.join(errors)}; {library.log.errors}")
        config = builder.create_builder_config()
        config.set_flag(api.BuilderFlag.FP16)
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
        # Several contexts of one profile: always so from TensorRT 10 on.
        config.set_preview_feature(api.PreviewFeature.PROFILE_SHARING_0806, True)
        # cuBLAS and cuDNN need not be there.
        sources = (api.TacticSource.EDGE_MASK_CONVOLUTIONS, api.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
        profile = builder.create_optimization_profile()
        smallest, largest = shapes
        profile.set_shape(network.get_input(0).name, smallest, largest, largest)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise PlanError(f"{onnx_path}: {library.log.errors}")
    return plan


# Checking


class Sample:
    """Inputs and what the float32 towers make of them."""

    def __init__(self, folder: Path) -> None:
        self.pixels = np.load(folder / "pixels.npy")
        self.texts: list[str] = json.loads((folder / "texts.json").read_text())
        self.images = np.load(folder / "images.npy")
        self.embedded_texts = np.load(folder / "texts.npy")

    def num_pixels(self, num_rows: int) -> np.ndarray:
        """So many rows, repeated where there are too few."""
        return np.resize(self.pixels, (num_rows, *self.pixels.shape[1:]))

    def batches(self, num_batches: int, *, num_rows: int) -> Iterator[np.ndarray]:
        """Full batches that all differ."""
        rng = np.random.default_rng(7)
        for _ in range(num_batches):
            yield self.pixels[rng.integers(0, len(self.pixels), num_rows)]


def check_loaded(log: Log, engine_dir: Path, plan_dir: Path, sample: Sample) -> None:
    started = time.monotonic()
    with TrtEncoder(engine_dir, plan_dir=plan_dir) as encoder:
        log.figure("load seconds", round(time.monotonic() - started, 2))
        check_agreement(log, encoder, sample)
        check_batch_sizes(log, encoder, sample)


def check_agreement(log: Log, encoder: TrtEncoder, sample: Sample) -> None:
    for name, found, expected in (
        ("images", encoder.encode_images(sample.pixels), sample.images),
        ("texts", encoder.encode_texts(sample.texts), sample.embedded_texts),
    ):
        cosines = np.einsum("nd,nd->n", found, expected)
        # Rows must agree with their own, not with any.
        others = found @ expected.T
        nearest = (others.argmax(axis=1) == np.arange(len(found))) | (
            others.max(axis=1) - cosines < 1e-3
        )
        log.check(
            f"{name} agree with float32 at cosine {MIN_COSINE}",
            cosines.min() >= MIN_COSINE and nearest.all(),
            f"{len(found)} rows, lowest {cosines.min():.6f}, mean {cosines.mean():.6f}",
        )
        log.figure(f"lowest cosine of {name}", round(float(cosines.min()), 6))


def check_batch_sizes(log: Log, encoder: TrtEncoder, sample: Sample) -> None:
    rows = encoder._image.max_rows
    whole = encoder.encode_images(sample.num_pixels(3 * rows))
    for num_rows in sorted({0, 1, 2, rows - 1, rows, rows + 1, 2 * rows + rows // 2}):
        found = encoder.encode_images(sample.num_pixels(num_rows))
        cosines = np.einsum("nd,nd->n", found, whole[:num_rows])
        log.check(
            f"{num_rows} images",
            found.shape == whole[:num_rows].shape and (cosines > 0.9999).all(),
            "the same bits" if np.array_equal(found, whole[:num_rows]) else "not the same bits",
        )


def check_bits(log: Log, engine_dir: Path, plan_dir: Path, sample: Sample) -> None:
    rows = read_plan(plan_dir).key.profile.max_rows
    texts = (sample.texts * (1 + 1000 // len(sample.texts)))[:1000]
    with TrtEncoder(engine_dir, plan_dir=plan_dir, config=ONE_AT_A_TIME) as encoder:
        images = [encoder.encode_images(x) for x in sample.batches(NUM_BATCHES, num_rows=rows)]
        embedded_texts = encoder.encode_texts(texts)
    for name, config in WAYS.items():
        with TrtEncoder(engine_dir, plan_dir=plan_dir, config=config) as encoder:
            for turn in ("first", "second"):
                # As `encode_images` does, but many batches under way at once.
                parts = encoder._image.run(sample.batches(NUM_BATCHES, num_rows=rows))
                found = list(map(normalized, parts))
                log.check(
                    f"{NUM_BATCHES} batches of {rows} images, {name}, {turn} run: the same bits "
                    "as one at a time",
                    all(np.array_equal(x, y) for x, y in zip(found, images, strict=True)),
                )
            log.check(
                f"{len(texts)} texts, {name}: the same bits",
                np.array_equal(encoder.encode_texts(texts), embedded_texts),
            )
            kept = encoder._image._launches._kept.values()
            num_graphs = sum(graph is not None for _, graph in kept)
            log.check(
                f"{name}: graphs of images",
                num_graphs == (config.num_slots if config.max_graphs else 0),
                str(num_graphs),
            )


def check_ends(log: Log, engine_dir: Path, plan_dir: Path, sample: Sample, gpu: Device) -> None:
    rows = read_plan(plan_dir).key.profile.max_rows
    free_before, _ = gpu.memory()
    encoder = TrtEncoder(engine_dir, plan_dir=plan_dir)
    expected = encoder.encode_images(sample.pixels)
    abandoned = encoder._image.run(sample.batches(9, num_rows=rows))
    next(abandoned)
    log.check(
        "an abandoned run does no harm",
        np.array_equal(encoder.encode_images(sample.pixels), expected),
    )
    encoder.encode_texts(sample.texts)
    used = free_before - gpu.memory()[0]
    stated = encoder.device_memory_bytes
    log.figure("GPU memory stated, MiB", round(stated / MIB, 1))
    log.figure("GPU memory taken, with graphs, MiB", round(used / MIB, 1))
    log.check("memory taken is about what was stated", used < 1.5 * stated + 512 * MIB)
    for how in ("close", "garbage collection"):
        if how == "close":
            encoder.close()
        else:
            encoder = TrtEncoder(engine_dir, plan_dir=plan_dir)
            encoder.encode_images(sample.pixels)
            del encoder
            gc.collect()
        lost = free_before - gpu.memory()[0]
        log.check(f"memory given back by {how}", lost < 128 * MIB, f"{lost / MIB:.1f} MiB kept")


def check_refusals(log: Log, engine_dir: Path, plan_dir: Path, gpu: Device) -> None:
    record = read_plan(plan_dir)

    def refused(name: str, kind: type[EngineError], text: str, copy: Path) -> None:
        free_before, _ = gpu.memory()
        try:
            TrtEncoder(engine_dir, plan_dir=copy).close()
        except EngineError as error:
            said = str(error)
            log.check(f"{name} is refused", isinstance(error, kind) and text in said, said)
        else:
            log.check(f"{name} is refused", False, "it was loaded")
        kept = free_before - gpu.memory()[0]
        log.check(f"{name} leaves no memory behind", kept < 64 * MIB, f"{kept / MIB:.1f} MiB")

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "plan"
        shutil.copytree(plan_dir, copy)
        for name, change in (
            ("a plan for another card", {"architecture": "sm_80"}),
            ("a plan of another version", {"version": "8.5.3"}),
        ):
            key = dataclasses.replace(record.key, **change)  # type: ignore[arg-type]
            dataclasses.replace(record, key=key).write(copy)
            refused(name, PlanError, "run `clipmill engine build` there", copy)
        rows = 10_000_000
        image = dataclasses.replace(record.image, max_shape=(rows, *record.image.max_shape[1:]))
        dataclasses.replace(record, image=image).write(copy)
        refused("a plan beyond the card's memory", DeviceMemoryError, "MiB free", copy)
        record.write(copy)
        content = bytearray((copy / "image.plan").read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "image.plan").write_bytes(content)
        refused("a plan with a flipped byte", PlanError, "does not match its checksum", copy)
        # What the library itself says where a checksum would not have told.
        files = {**record.files, "image.plan": file_digest(copy / "image.plan")}
        (copy / "image.plan").write_bytes(b"no plan at all")
        files["image.plan"] = file_digest(copy / "image.plan")
        dataclasses.replace(record, files=files).write(copy)
        refused("no plan at all", PlanError, "cannot load it", copy)
    try:
        gpu.allocate(2 * gpu.memory()[1])
    except DeviceMemoryError as error:
        log.check("more memory than there is", True, str(error))
    else:
        log.check("more memory than there is", False)


def measure(log: Log, engine_dir: Path, plan_dir: Path, sample: Sample) -> None:
    profile = read_plan(plan_dir).key.profile
    batches = list(sample.batches(8, num_rows=profile.max_rows))
    repeated = [batches[number % len(batches)] for number in range(NUM_BATCHES)]
    for name, config in WAYS.items():
        with TrtEncoder(engine_dir, plan_dir=plan_dir, config=config) as encoder:
            list(encoder._image.run(batches))
            started = time.monotonic()
            for _ in encoder._image.run(repeated):
                pass
            seconds = time.monotonic() - started
            log.figure(
                f"images/s, {profile.kind} of {profile.max_rows}, {name}",
                round(profile.max_rows * NUM_BATCHES / seconds),
            )
            if profile.kind == "query":
                for what, call in (
                    ("image", lambda: encoder.encode_images(sample.pixels[:1])),
                    ("text", lambda: encoder.encode_texts(sample.texts[:1])),
                ):
                    log.figure(
                        f"median milliseconds of one {what}, {name}",
                        round(1000 * median_seconds(call), 3),
                    )


def median_seconds(call: Any) -> float:
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[20:])


def main() -> int:
    """Check every folder; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--bulk", type=int, default=256, help="rows of the bulk plan, 0 for none")
    parser.add_argument("--query", type=int, default=8, help="rows of the query plan, 0 for none")
    options = parser.parse_args()

    log = Log()
    gpu = open_device()
    library = installed_library("tensorrt")
    log.say(f"TensorRT {library.version}, {gpu.architecture}, Python {sys.version.split()[0]}")
    log.check("no torch", "torch" not in sys.modules)
    profiles = [
        PlanProfile(kind=kind, max_rows=rows)
        for kind, rows in (("bulk", options.bulk), ("query", options.query))
        if rows
    ]
    for folder in options.folders:
        sample = Sample(folder)
        engine_dir = folder / "engine"
        for profile in profiles:
            log.say(f"\n{folder.name}, {profile.kind} of {profile.max_rows}")
            with tempfile.TemporaryDirectory() as scratch:
                plan_dir = Path(scratch) / "plan"
                figures, log.figures = log.figures, {}
                build(engine_dir, plan_dir, profile=profile, library=library)
                log.figure("build seconds", read_plan(plan_dir).build_seconds)
                place = (log, engine_dir, plan_dir)
                log.section("agreement", partial(check_loaded, *place, sample))
                log.section("bits", partial(check_bits, *place, sample))
                log.section("ends", partial(check_ends, *place, sample, gpu))
                log.section("refusals", partial(check_refusals, *place, gpu))
                log.section("speed", partial(measure, *place, sample))
                figures[f"{folder.name} {profile.kind}{profile.max_rows}"] = log.figures
                log.figures = figures
    log.say("")
    log.say(f"{len(log.failures)} failed" if log.failures else "all passed")
    log.say(
        json.dumps(
            {
                "tensorrt": library.version,
                "architecture": gpu.architecture,
                "failures": log.failures,
                **log.figures,
            }
        )
    )
    return 1 if log.failures else 0


if __name__ == "__main__":
    sys.exit(main())
