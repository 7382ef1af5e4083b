"""From image files and texts to embeddings: every family against transformers' own pipeline."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import transformers

from engine.errors import ClipmillError
from jobs.bench import main
from tests.catalogs import write_rows
from tests.checkpoints import (
    dinov2_config,
    gemma_tokenizer,
    roberta_config,
    roberta_tokenizer,
    save_dinov2,
    save_dual_encoder,
    save_image_only,
    save_siglip,
    save_vit,
)
from tests.image_files import jpeg, photo, png

TEXTS = ["a red circle", "Two squares, on THE green square!", "three", "circles " * 30, "a b c d"]
SIZES = [(60, 40), (41, 97), (32, 32), (300, 200), (20, 25)]


def save_multilingual(directory: Path) -> Path:
    tokenizer = roberta_tokenizer()
    return save_dual_encoder(
        directory, image=dinov2_config(), text=roberta_config(tokenizer), tokenizer=tokenizer
    )


SAVED: Mapping[str, Callable[[Path], Path]] = {
    "siglip2": lambda directory: save_siglip(directory, tokenizer=gemma_tokenizer()),
    "dinov2": lambda directory: save_dinov2(directory, image_size=72),
    "vit": save_vit,
    "clip-image-only": save_image_only,
    "multilingual": save_multilingual,
}


@pytest.fixture(scope="module")
def catalog_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "key": number,
            "image": (jpeg if number % 2 else png)(photo(*size, seed=number)),
            "text": text,
        }
        for number, (size, text) in enumerate(zip(SIZES, TEXTS, strict=True))
    ]
    return write_rows(tmp_path_factory.mktemp("catalog"), rows)


def measured(directory: Path, catalog_dir: Path, capsys) -> list[dict[str, float]]:
    engines_dir = directory / "engines"
    options = ["--checkpoint", str(directory), "--catalog", str(catalog_dir), "--rows", "5"]
    assert main(["agreement", *options, "--engines", str(engines_dir), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", list(SAVED))
def test_embeddings_are_those_of_transformers(
    tmp_path: Path, catalog_dir: Path, name: str, capsys
) -> None:
    results = measured(SAVED[name](tmp_path), catalog_dir, capsys)
    has_texts = name in ("siglip2", "multilingual")
    assert [result["modality"] for result in results] == ["image", "text"][: 1 + has_texts]
    for result in results:
        assert result["num_rows"] == 5
        assert 0.999999 <= result["minimum"] <= 1.000001


def test_embeddings_with_the_tokenizer_of_siglip(tmp_path: Path, catalog_dir: Path, capsys) -> None:
    image, text = measured(save_siglip(tmp_path), catalog_dir, capsys)
    assert min(image["minimum"], text["minimum"]) >= 0.999999


def test_a_tokenizer_that_transformers_cannot_run(
    tmp_path: Path, catalog_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def without_sentencepiece(*_: object, **__: object) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", without_sentencepiece)
    message = "tokenizer cannot be loaded: SiglipTokenizer requires the SentencePiece library"
    with pytest.raises(ClipmillError, match=message):
        measured(save_siglip(tmp_path), catalog_dir, capsys)
