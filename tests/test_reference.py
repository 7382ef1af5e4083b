"""The reference encoder beside the same towers called by hand."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.errors import EngineError
from engine.manifest import Manifest, read_manifest
from engine.model import Model
from engine.reference import ROWS_PER_CALL, ReferenceEncoder
from jobs.demo.run import CHECKPOINT_DIR
from tests.quantized import QuantizedDemo, embed, write_demo_engine

NUM_ROWS = 2 * ROWS_PER_CALL + 3


@pytest.fixture(scope="module")
def model(quantized_demo: QuantizedDemo) -> Model:
    return copy.deepcopy(quantized_demo.model)


@pytest.fixture(scope="module")
def engine_dir(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    write_demo_engine(
        folder, model, image=model.image_tower, text=model.text_tower, precision="fp32"
    )
    return folder


def reference(model: Model, *, engine_dir: Path, manifest: Manifest) -> ReferenceEncoder:
    return ReferenceEncoder(model, engine_dir=engine_dir, manifest=manifest, device="cpu")


def test_it_embeds_as_the_towers_do(
    quantized_demo: QuantizedDemo, model: Model, engine_dir: Path
) -> None:
    engine = OnnxCpuEncoder(engine_dir, num_threads=1)
    encoder = reference(model, engine_dir=engine_dir, manifest=engine.manifest)
    pixels = quantized_demo.pixels[:NUM_ROWS].copy()
    pixels.setflags(write=False)  # as those from Arrow are
    images = encoder.encode_images(pixels)
    assert images.dtype == np.float32
    expected = embed(model.image_tower, torch.tensor(pixels))
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(images, engine.encode_images(pixels), rtol=0, atol=1e-5)

    texts = [text[: 5 + row] for row, text in enumerate(quantized_demo.texts[:NUM_ROWS])]
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT_DIR))
    token_ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"].int()
    assert model.text_tower is not None
    embedded = encoder.encode_texts(texts)
    np.testing.assert_allclose(embedded, embed(model.text_tower, token_ids), rtol=0, atol=1e-6)


def test_an_image_only_checkpoint_has_no_texts(model: Model, engine_dir: Path) -> None:
    manifest = OnnxCpuEncoder(engine_dir, num_threads=1).manifest
    encoder = reference(
        dataclasses.replace(model, text_tower=None, token_rules=None),
        engine_dir=engine_dir,
        manifest=dataclasses.replace(manifest, text=None),
    )
    assert encoder.encode_images(np.zeros((2, 64, 64, 3), dtype=np.uint8)).shape == (2, 128)
    with pytest.raises(EngineError, match="has no text tower"):
        encoder.encode_texts(["a red circle"])


def test_convolutions_are_in_full_float32(model: Model, engine_dir: Path) -> None:
    seen: list[bool] = []
    hook = model.image_tower.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    encoder = reference(model, engine_dir=engine_dir, manifest=read_manifest(engine_dir))
    encoder.encode_images(np.zeros((1, 64, 64, 3), dtype=np.uint8))
    hook.remove()
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
