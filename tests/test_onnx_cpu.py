"""The demo checkpoint's engine on a CPU against transformers' own model and processors."""

import io
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from engine.backends.onnx_cpu import ROWS_PER_CALL, OnnxCpuEncoder
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.errors import EngineError
from engine.images import ImageLimits
from engine.preprocess import decode_pixels
from engine.registry import Registry
from jobs.demo.scenes import Scene, scenes
from tests.checkpoints import IMAGE_SIZE, save_dual_encoder, save_image_only

NUM_SCENES = 50


@pytest.fixture(scope="module")
def engine_dir(checkpoint_dir: Path, engines_dir: Path) -> Path:
    checkpoint = find_checkpoint(str(checkpoint_dir))
    return load_or_build(checkpoint, registry=Registry(str(engines_dir))).directory


@pytest.fixture(scope="module")
def encoder(engine_dir: Path) -> OnnxCpuEncoder:
    return OnnxCpuEncoder(engine_dir, num_threads=1)


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return list(islice(scenes(11, split="heldout"), NUM_SCENES))


@pytest.fixture(scope="module")
def captions(drawn: list[Scene]) -> list[str]:
    return [scene.caption for scene in drawn]


@pytest.fixture(scope="module")
def pixels(drawn: list[Scene], encoder: OnnxCpuEncoder) -> np.ndarray:
    return np.stack(
        [
            decode_pixels(
                png(scene.draw()),
                preprocessing=encoder.manifest.preprocessing,
                limits=ImageLimits(),
            )
            for scene in drawn
        ]
    )


@pytest.fixture(scope="module")
def theirs(checkpoint_dir: Path) -> Any:
    return CLIPModel.from_pretrained(checkpoint_dir).eval()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def assert_agree(ours: np.ndarray, features: torch.Tensor) -> None:
    expected = torch.nn.functional.normalize(features).numpy()
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    cosines = ours @ expected.T
    assert cosines.diagonal().min() >= 0.9999
    # Rows differ by far more, so the agreement is not that of rows all alike.
    others = cosines[~np.eye(len(ours), dtype=bool)]
    assert np.median(others) < 0.99


@torch.inference_mode()
def test_images_agree_with_transformers(
    encoder: OnnxCpuEncoder,
    drawn: list[Scene],
    pixels: np.ndarray,
    theirs: Any,
    checkpoint_dir: Path,
) -> None:
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint_dir)
    inputs = processor(images=[scene.draw() for scene in drawn], return_tensors="pt")
    features = theirs.get_image_features(**inputs).pooler_output
    assert_agree(encoder.encode_images(pixels), features)


@torch.inference_mode()
def test_captions_agree_with_transformers(
    encoder: OnnxCpuEncoder, captions: list[str], theirs: Any, checkpoint_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint_dir))
    # Lengths of all kinds: nothing, parts, whole captions, and one that must be cut.
    texts = [
        "",
        " ".join(captions[:9]),
        *(text[: 3 + number] for number, text in enumerate(captions)),
    ]
    texts = list(dict.fromkeys(texts))[:NUM_SCENES]
    for asked in (captions, texts):
        inputs = tokenizer(asked, padding=True, truncation=True, return_tensors="pt")
        features = theirs.get_text_features(**inputs).pooler_output
        assert_agree(encoder.encode_texts(asked), features)


def test_rows_come_back_in_order(
    encoder: OnnxCpuEncoder, pixels: np.ndarray, captions: list[str]
) -> None:
    shuffled = np.random.default_rng(12).permutation(NUM_SCENES)
    images, texts = encoder.encode_images(pixels), encoder.encode_texts(captions)
    np.testing.assert_allclose(
        encoder.encode_images(pixels[shuffled]), images[shuffled], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        encoder.encode_texts([captions[row] for row in shuffled]),
        texts[shuffled],
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("num_rows", [1, ROWS_PER_CALL, ROWS_PER_CALL + 1])
def test_the_batch_has_no_influence(
    encoder: OnnxCpuEncoder, pixels: np.ndarray, captions: list[str], num_rows: int
) -> None:
    np.testing.assert_allclose(
        encoder.encode_images(pixels[:num_rows]),
        encoder.encode_images(pixels)[:num_rows],
        rtol=0,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        encoder.encode_texts(captions[:num_rows]),
        encoder.encode_texts(captions)[:num_rows],
        rtol=0,
        atol=1e-5,
    )


def test_bert_texts_of_unlike_lengths(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(save_dual_encoder(tmp_path / "checkpoint")))
    engine = load_or_build(checkpoint, registry=Registry(str(tmp_path)))
    encoder = OnnxCpuEncoder(engine.directory, num_threads=1)
    texts = ["the red circle on a green square", "", "red", "a square 42"]
    alone = np.concatenate([encoder.encode_texts([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode_texts(texts), alone, rtol=0, atol=1e-5)
    distances = np.linalg.norm(alone[:, None] - alone, axis=-1) + 9 * np.eye(len(texts))
    assert distances.min() > 0.01


def test_no_rows(encoder: OnnxCpuEncoder, pixels: np.ndarray) -> None:
    shape = (0, encoder.manifest.embedding_dim)
    assert encoder.encode_images(pixels[:0]).shape == shape
    assert encoder.encode_texts([]).shape == shape


def test_other_pixels_are_refused(encoder: OnnxCpuEncoder, pixels: np.ndarray) -> None:
    height, width = pixels.shape[1:3]
    expected = rf"the engine takes uint8 \[N, {height}, {width}, 3\]"
    for wrong in (
        pixels[:, 1:],
        pixels[..., :1],
        pixels[0],
        pixels.transpose(0, 3, 1, 2),
        pixels.astype(np.float32),
        pixels.astype(np.int8),
    ):
        with pytest.raises(ValueError, match=expected):
            encoder.encode_images(wrong)


def test_image_only_engine_refuses_texts(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(save_image_only(tmp_path / "checkpoint")))
    engine = load_or_build(checkpoint, registry=Registry(str(tmp_path)))
    encoder = OnnxCpuEncoder(engine.directory, num_threads=1)
    images = encoder.encode_images(np.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))
    assert images.shape == (2, engine.manifest.embedding_dim)
    with pytest.raises(EngineError, match="has no text tower"):
        encoder.encode_texts(["a red circle"])


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
def test_damaged_engine_is_refused(
    engine_dir: Path, tmp_path: Path, name: str, damage: str
) -> None:
    path = shutil.copytree(engine_dir, tmp_path / "copy") / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "cut": whole[: len(whole) // 2], "other": b"x" * 99}[damage]
        )
    with pytest.raises(EngineError) as caught:
        OnnxCpuEncoder(path.parent, num_threads=1)
    assert str(path) in str(caught.value)
    assert "the next run builds it anew" in str(caught.value)


def test_folder_without_an_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no engine there"):
        OnnxCpuEncoder(tmp_path, num_threads=1)
