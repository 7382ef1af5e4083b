"""Whole engines through the torch backend: on a GPU, and what is refused without one."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from engine.backends.torch_fp8 import TorchEncoder
from engine.errors import DeviceError, DeviceMemoryError, EngineError
from engine.families.backbone import TokenRules
from engine.manifest import TOKENIZER_FILE, Manifest, Precision, TextInput
from engine.model import Model
from engine.preprocess import Preprocessing
from tests.max_calibration import quantize
from tests.random_towers import (
    EMBEDDING_DIM,
    EOS_ID,
    IMAGE_SIZE,
    MAX_TOKENS,
    NUM_IDS,
    PAD_ID,
    clip_text_tower,
    image_tower,
    pixels,
    token_ids,
)

PREPROCESSING = Preprocessing(
    height=IMAGE_SIZE,
    width=IMAGE_SIZE,
    resize=(IMAGE_SIZE, IMAGE_SIZE),
    crop=None,
    resample=3,
    mean=(0.5, 0.4, 0.3),
    std=(0.25, 0.2, 0.3),
)
TEXT = TextInput(max_tokens=MAX_TOKENS, pad_token_id=PAD_ID)
# The lowest cosine to the float32 towers that the roundings of an engine explain.
LOWEST_COSINE: dict[Precision, float] = {"fp16": 0.9999, "fp8": 0.99}


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine's folder, what it holds, and the float32 towers that it was made of."""

    directory: Path
    model: Model
    reference: Model

    def load(self, directory: Path, *, preprocessing: Preprocessing) -> Model:
        assert directory == self.directory
        return copy.deepcopy(self.model)


def write_manifest(directory: Path, *, precision: Precision, text: TextInput | None = TEXT) -> None:
    Manifest(
        engine_id=f"{precision}-0123456789abcdef",
        checkpoint="random",
        revision=None,
        checkpoint_digest="0" * 64,
        precision=precision,
        embedding_dim=EMBEDDING_DIM,
        preprocessing=PREPROCESSING,
        text=text,
        files={},
        versions={},
    ).write(directory)


def write_tokenizer(directory: Path) -> None:
    """Words `2` to `62` are their own ids; a text ends in `EOS_ID`, and is cut at `MAX_TOKENS`."""
    vocab = {str(number): number for number in range(EOS_ID + 1)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = str(EOS_ID)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, EOS_ID)]
    )
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.save(str(directory / TOKENIZER_FILE))


def build(directory: Path, *, precision: Precision) -> Built:
    write_manifest(directory, precision=precision)
    write_tokenizer(directory)
    reference = Model(
        image_tower=image_tower(),
        preprocessing=PREPROCESSING,
        text_tower=clip_text_tower(),
        token_rules=TokenRules(
            max_tokens=MAX_TOKENS, vocab_size=NUM_IDS, special_token_ids={"eos": EOS_ID}
        ),
        embedding_dim=EMBEDDING_DIM,
    )
    model = copy.deepcopy(reference)
    assert model.text_tower is not None
    if precision == "fp8":
        quantize(model.image_tower, pixels(16))
        quantize(model.text_tower, token_ids(16, 40))
    model.image_tower.to_dtype(torch.float16)
    model.text_tower.to_dtype(torch.float16)
    return Built(directory=directory, model=model, reference=reference)


def texts(num_texts: int) -> list[str]:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 100, num_texts)  # some are cut
    return [" ".join(map(str, random.integers(2, EOS_ID, length))) for length in lengths]


def reference_text_embeddings(built: Built, given: list[str]) -> NDArray[np.float32]:
    tower = built.reference.text_tower
    assert tower is not None
    rows = [[*map(int, text.split()[: MAX_TOKENS - 1]), EOS_ID] for text in given]
    with torch.inference_mode():
        found = [tower(torch.tensor([ids], dtype=torch.int32)) for ids in rows]
    return torch.cat(found).numpy()


def assert_agree(found: NDArray[np.float32], expected: NDArray[np.float32], lowest: float) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    assert (found * expected).sum(axis=1).min() > lowest


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_an_engine_gives_the_embeddings_of_its_towers(tmp_path: Path, precision: Precision) -> None:
    built = build(tmp_path, precision=precision)
    encoder = TorchEncoder(tmp_path, load_towers=built.load, max_rows=16)
    assert encoder.manifest.precision == precision
    assert 2**20 < encoder.device_memory_bytes < 2**30
    # Whole batches and a short one.
    images = pixels(37, seed=5)
    with torch.inference_mode():
        expected: Tensor = built.reference.image_tower(images)
    found = encoder.encode_images(images.numpy())
    assert_agree(found, expected.numpy(), LOWEST_COSINE[precision])
    np.testing.assert_array_equal(encoder.encode_images(images.numpy()), found)
    np.testing.assert_array_equal(encoder.encode_images(images.to("cuda")), found)
    given = texts(41)
    expected_texts = reference_text_embeddings(built, given)
    found = encoder.encode_texts(given)
    assert_agree(found, expected_texts, LOWEST_COSINE[precision])
    np.testing.assert_array_equal(encoder.encode_texts(given), found)


@pytest.mark.gpu
def test_both_towers_at_once_from_the_first_batch_on(tmp_path: Path) -> None:
    # Each size and length is captured as it is met, beside the other tower's.
    built = build(tmp_path, precision="fp8")
    encoder = TorchEncoder(tmp_path, load_towers=built.load, max_rows=16)
    assert encoder.max_calls == 2
    images = pixels(16, seed=5).numpy()
    given = texts(60)
    sizes = [1, 3, 4, 7, 16] * 4
    with ThreadPoolExecutor(2) as threads:
        found = threads.submit(lambda: [encoder.encode_images(images[:size]) for size in sizes])
        found_texts = [encoder.encode_texts(given[:size]) for size in sizes]
    for size, embeddings, text_embeddings in zip(sizes, found.result(), found_texts, strict=True):
        np.testing.assert_array_equal(embeddings, encoder.encode_images(images[:size]))
        np.testing.assert_array_equal(text_embeddings, encoder.encode_texts(given[:size]))


@pytest.mark.gpu
def test_the_rest_of_a_batch_does_not_matter(tmp_path: Path) -> None:
    built = build(tmp_path, precision="fp8")
    encoder = TorchEncoder(tmp_path, load_towers=built.load, max_rows=16)
    images = pixels(16).numpy()
    others = pixels(16, seed=9).numpy()
    others[3] = images[3]
    np.testing.assert_array_equal(
        encoder.encode_images(others)[3], encoder.encode_images(images)[3]
    )


@pytest.mark.gpu
def test_no_rows(tmp_path: Path) -> None:
    built = build(tmp_path, precision="fp8")
    encoder = TorchEncoder(tmp_path, load_towers=built.load, max_rows=4)
    assert encoder.encode_images(pixels(0).numpy()).shape == (0, EMBEDDING_DIM)
    assert encoder.encode_texts([]).shape == (0, EMBEDDING_DIM)


@pytest.mark.gpu
def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    built = build(tmp_path, precision="fp8")
    with pytest.raises(DeviceMemoryError, match="use smaller batches"):
        TorchEncoder(tmp_path, load_towers=built.load, max_rows=2**28)


def never_loaded(directory: Path, *, preprocessing: Preprocessing) -> Model:
    raise AssertionError("towers are read only for a card that can run them")


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_no_card(tmp_path: Path, precision: Precision) -> None:
    write_manifest(tmp_path, precision=precision)
    with pytest.raises(DeviceError, match="sees no CUDA GPU 99"):
        TorchEncoder(tmp_path, load_towers=never_loaded, device_index=99)


def test_fp32_engines_are_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, precision="fp32")
    with pytest.raises(EngineError, match=r"fp32-\w+ is fp32, .*--backend onnxruntime"):
        TorchEncoder(tmp_path, load_towers=never_loaded)


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no engine there"):
        TorchEncoder(tmp_path, load_towers=never_loaded)


def test_batches_of_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_rows is 0, must be at least 1"):
        TorchEncoder(tmp_path, load_towers=never_loaded, max_rows=0)
