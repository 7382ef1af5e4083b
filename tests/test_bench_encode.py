"""`clipmill bench encode`: what is timed, counted and compared, on a small checkpoint."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.registry import Registry
from jobs.bench import main
from jobs.benches.baselines import TransformersEncoder
from jobs.benches.encode import EncodeConfig, measure_encode
from jobs.benches.encode_figures import EncodeFigures, encode_lines
from jobs.benches.encode_page import render_encode_page
from pipelines.engines import EngineChoice
from tests.checkpoints import save_clip, save_dual_encoder, save_image_only
from tests.pages import Page

BATCH_SIZES = (1, 4)


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@dataclass(frozen=True)
class Told:
    """What the command printed and wrote, and what it measured."""

    figures: EncodeFigures
    out: str
    err: str
    page: str


@pytest.fixture(scope="module")
def told(checkpoint_dir: Path, engines_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    page = tmp_path_factory.mktemp("page") / "page.html"
    words = ["--checkpoint", str(checkpoint_dir), "--engines", str(engines_dir), "--json"]
    words += ["--batch-sizes", *map(str, BATCH_SIZES), "--seconds", "0.05", "--page", str(page)]
    out, err, measured = io.StringIO(), io.StringIO(), []

    def measure(*args: Any, **options: Any) -> Iterator[EncodeFigures]:
        for figures in measure_encode(*args, **options):
            yield figures
            # The page is there before the next is measured.
            measured.append(figures)
            assert figures.encoders[-1].name in page.read_text()

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("jobs.benches.encode.measure_encode", measure)
        assert main(["encode", *words]) == 0
    assert [len(figures.encoders) for figures in measured] == [1, 2]
    return Told(figures=measured[-1], out=out.getvalue(), err=err.getvalue(), page=page.read_text())


@pytest.fixture(scope="module")
def figures(told: Told) -> EncodeFigures:
    return told.figures


def test_every_tower_is_timed_at_every_size_by_engine_and_baseline(figures: EncodeFigures) -> None:
    assert [encoder.name for encoder in figures.encoders] == [
        "transformers float32",
        "fp32 onnxruntime",
    ]
    for encoder in figures.encoders:
        timed = [(timing.modality, timing.batch_rows) for timing in encoder.timings]
        assert timed == [(name, rows) for name in ("image", "text") for rows in BATCH_SIZES]
        assert encoder.load_seconds > 0
        # torch alone takes more, this checkpoint next to nothing.
        assert 100 * 2**20 < encoder.peak_memory_bytes < 4 * 2**30
        assert encoder.device_memory_bytes == 0
        for timing in encoder.timings:
            assert 5 <= timing.num_calls <= 100
            assert 0 < timing.p50_ms <= timing.p95_ms <= timing.p99_ms
            assert timing.rows_per_second == pytest.approx(timing.batch_rows / timing.p50_ms * 1e3)


def test_both_give_the_same_embeddings(figures: EncodeFigures) -> None:
    for encoder in figures.encoders:
        assert set(encoder.cosine_min) == {"image", "text"}
        assert min(encoder.cosine_min.values()) > 0.99999


def test_operations_are_those_of_the_model(figures: EncodeFigures) -> None:
    """A ViT of 2 blocks of width 32, hidden 48, 17 tokens, patches of 8 x 8 x 3, 24 dimensions."""
    tokens, width, hidden = 17, 32, 48
    products = 4 * width * width + 2 * width * hidden + 2 * tokens * width
    expected = 2 * (16 * 192 * width + 2 * tokens * products + width * 24)
    (timing,) = (
        timing
        for timing in figures.encoders[0].timings
        if (timing.modality, timing.batch_rows) == ("image", 4)
    )
    fastest = max(timing.rows_per_second, timing.stream_rows_per_second)
    assert timing.tflops * 1e12 / fastest == pytest.approx(expected, rel=1e-6)


def test_the_table_says_all_of_it(figures: EncodeFigures) -> None:
    lines = encode_lines(figures)
    assert figures.engine_id in lines[0]
    assert re.search(r"CPU cores$", lines[0])
    assert not figures.pixels_on_gpu
    assert (
        lines[0] + ", pixels of large batches in its memory"
        == encode_lines(replace(figures, pixels_on_gpu=True))[0]
    )
    assert lines[1].startswith("large matrix products here: float32 ")
    rows = [line for line in lines if line.startswith(("fp32 onnxruntime  ", "transformers float"))]
    assert len(rows) == 2 * 2 * len(BATCH_SIZES) + 1  # and what transformers needs to be ready
    assert all(line.rstrip().endswith(("%", "MiB")) for line in rows)
    assert len({len(line) for line in rows if line.endswith("%")}) == 1


def test_the_page_holds_all_figures_and_loads_nothing(figures: EncodeFigures) -> None:
    page = render_encode_page(figures)
    found = Page(page).text("td")
    for encoder in figures.encoders:
        for timing in encoder.timings:
            assert f"{timing.rows_per_second:,.0f}" in found
            assert f"{timing.p99_ms:,.2f}" in found
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert "://" not in page


def test_the_command_prints_json_and_writes_the_page(told: Told) -> None:
    printed: dict[str, Any] = json.loads(told.out)
    timings = printed["encoders"][0]["timings"]
    assert [timing["batch_rows"] for timing in timings] == [*BATCH_SIZES] * 2
    # What each encoder does is said before the next is measured.
    assert told.err.count("fp32 onnxruntime  ") == told.err.count("transformers float32  ") == 4
    assert printed["product_tflops"]["float32"] > 0
    assert printed["engine_id"] in told.page


@pytest.mark.parametrize(
    ("field", "value"), [("batch_sizes", ()), ("batch_sizes", (0,)), ("min_calls", 0)]
)
def test_out_of_bounds(field: str, value: Any) -> None:
    choice = EngineChoice(checkpoint="c", engines_uri="e")
    with pytest.raises(ValueError, match=f"{field}={re.escape(str(value))}: expected at least 1"):
        EncodeConfig(engine=choice, **{field: value})


@pytest.mark.parametrize("save", [save_clip, save_dual_encoder, save_image_only])
def test_the_baseline_is_the_model_of_the_engine(save: Any, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(save(tmp_path / "checkpoint")))
    engine = load_or_build(checkpoint, registry=Registry(str(tmp_path / "engines")))
    ours = OnnxCpuEncoder(engine.directory, num_threads=1)
    theirs = TransformersEncoder(
        checkpoint, manifest=engine.manifest, device="cpu", dtype=torch.float32
    )
    size = (engine.manifest.preprocessing.height, engine.manifest.preprocessing.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8)
    whole = theirs.encode_images(pixels)
    np.testing.assert_allclose(ours.encode_images(pixels), whole, atol=1e-5)
    passes: list[int] = []
    encode = theirs._encode_images
    theirs._encode_images = lambda part: passes.append(len(part)) or encode(part)
    theirs.batch_rows = 2
    np.testing.assert_allclose(whole, theirs.encode_images(pixels), atol=1e-6)
    assert passes == [2, 1]
    if engine.manifest.text is not None:
        texts = ["a red circle", "two squares and a star", "a blue one"]
        np.testing.assert_allclose(ours.encode_texts(texts), theirs.encode_texts(texts), atol=1e-5)
