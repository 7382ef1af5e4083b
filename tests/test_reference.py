"""The reference encoder beside a float32 engine of the same checkpoint."""

from pathlib import Path

import numpy as np
import pytest

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.checkpoint import find_checkpoint
from engine.errors import EngineError
from engine.images import ImageLimits
from engine.model import load_model
from engine.preprocess import decode_pixels
from engine.reference import ROWS_PER_CALL, ReferenceEncoder
from engine.registry import load_or_build
from jobs.demo.catalog import sample_rows
from tests.checkpoints import IMAGE_SIZE, save_image_only

ROWS = sample_rows(ROWS_PER_CALL + 3)


def encoders(checkpoint_dir: Path, engines_dir: Path) -> tuple[ReferenceEncoder, OnnxCpuEncoder]:
    checkpoint = find_checkpoint(str(checkpoint_dir))
    manifest = load_or_build(checkpoint, engines_dir=engines_dir)
    engine_dir = engines_dir / manifest.engine_id
    reference = ReferenceEncoder(
        load_model(checkpoint), engine_dir=engine_dir, manifest=manifest, device="cpu"
    )
    return reference, OnnxCpuEncoder(engine_dir, num_threads=1)


def test_it_embeds_as_a_float32_engine_does(checkpoint_dir: Path, engines_dir: Path) -> None:
    reference, engine = encoders(checkpoint_dir, engines_dir)
    assert reference.manifest == engine.manifest
    preprocessing = reference.manifest.preprocessing
    pixels = np.stack(
        [decode_pixels(r.image, preprocessing=preprocessing, limits=ImageLimits()) for r in ROWS]
    )
    pixels.setflags(write=False)  # as those from Arrow are
    texts = [row.text[: 5 + 3 * number] for number, row in enumerate(ROWS)]
    for ours, theirs in (
        (reference.encode_images(pixels), engine.encode_images(pixels)),
        (reference.encode_texts(texts), engine.encode_texts(texts)),
    ):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        assert np.linalg.norm(ours[1:] - ours[:-1], axis=1).min() > 0.001


def test_an_image_only_checkpoint(tmp_path: Path) -> None:
    reference, engine = encoders(save_image_only(tmp_path / "checkpoint"), tmp_path)
    pixels = np.random.default_rng(0).integers(
        0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8
    )
    np.testing.assert_allclose(
        reference.encode_images(pixels), engine.encode_images(pixels), rtol=0, atol=1e-5
    )
    with pytest.raises(EngineError, match="has no text tower"):
        reference.encode_texts(["a red circle"])
