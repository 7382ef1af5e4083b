"""Exported towers under ONNX Runtime against those in torch; tokenizers against transformers."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Siglip2Tokenizer

from engine.checkpoint import find_checkpoint
from engine.errors import CheckpointError
from engine.export import OPSET, export_image_tower, export_text_tower, export_tokenizer
from engine.families.backbone import TokenRules
from engine.manifest import TextInput
from engine.model import Model, load_model
from tests.checkpoints import (
    EMBEDDING_DIM,
    IMAGE_SIZE,
    MAX_TOKENS,
    gemma_tokenizer,
    roberta_config,
    roberta_tokenizer,
    save_clip,
    save_dual_encoder,
    save_image_only,
    save_siglip,
)

FAMILIES: Mapping[str, Callable[[Path], Path]] = {"clip": save_clip, "dual": save_dual_encoder}

TEXTS = [
    "",
    " ",
    "a red circle",
    "A  RED\tCircle\n on the\r\ngreen",
    "two squares, 3 circles; it's 12:30!",
    "r\u00e9d re\u0301d \u7ea2\u8272\u7684\u5706 \u2615 \U0001f469\u200d\U0001f680 \u0130stanbul",
    "\u200b\ufeff\x00\x07",
    "<|endoftext|> and [SEP] [PAD] in a text",
    "a red circle on the green square " * 20,
    "x" * 500,
]


class Exported:
    """One checkpoint's folder, towers in torch and towers in ONNX."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image_path, self.text_path = directory / "image.onnx", directory / "text.onnx"
        self.model: Model = load_model(find_checkpoint(str(directory)))
        assert self.model.text_tower is not None
        self.text_tower = self.model.text_tower
        export_image_tower(
            self.model.image_tower, height=IMAGE_SIZE, width=IMAGE_SIZE, path=self.image_path
        )
        export_text_tower(self.text_tower, path=self.text_path)


@pytest.fixture(scope="module", params=list(FAMILIES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(FAMILIES[request.param](tmp_path_factory.mktemp(request.param)))


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_same_embeddings(path: Path, tower: torch.nn.Module, rows: np.ndarray) -> None:
    runtime = session(path)
    (embeddings,) = runtime.run(None, {runtime.get_inputs()[0].name: rows})
    with torch.inference_mode():
        expected = tower(torch.from_numpy(rows)).numpy()
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(rows), EMBEDDING_DIM)
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_image_tower_under_onnx(exported: Exported, num_rows: int) -> None:
    shape = (num_rows, IMAGE_SIZE, IMAGE_SIZE, 3)
    pixels = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
    assert_same_embeddings(exported.image_path, exported.model.image_tower, pixels)


@pytest.mark.parametrize("length", [1, 2, 11, MAX_TOKENS])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_text_tower_under_onnx(exported: Exported, num_rows: int, length: int) -> None:
    # Id 0 is BERT's padding.
    ids = np.random.default_rng(6).integers(1, 80, (num_rows, length), dtype=np.int32)
    ids[:: num_rows - 1 or 1, length // 2 + 1 :] = 0
    assert_same_embeddings(exported.text_path, exported.text_tower, ids)


def test_end_of_text_token_is_found_under_onnx(tmp_path: Path) -> None:
    exported = Exported(save_clip(tmp_path))
    eos = AutoTokenizer.from_pretrained(str(tmp_path)).eos_token_id
    ids = np.random.default_rng(7).integers(1, eos, (4, 9), dtype=np.int32)
    ids[[0, 1, 2, 2], [0, 4, 8, 3]] = eos
    ids[3, 2] = eos + 1
    assert_same_embeddings(exported.text_path, exported.text_tower, ids)


def test_legacy_end_of_text_token_under_onnx(tmp_path: Path) -> None:
    exported = Exported(save_clip(tmp_path, eos_token_id=2))
    ids = np.random.default_rng(8).integers(1, 600, (5, 9), dtype=np.int32)
    assert_same_embeddings(exported.text_path, exported.text_tower, ids)


def test_form_of_the_graphs(exported: Exported) -> None:
    (pixels,) = session(exported.image_path).get_inputs()
    assert (pixels.name, pixels.type) == ("pixels", "tensor(uint8)")
    assert pixels.shape == ["batch", IMAGE_SIZE, IMAGE_SIZE, 3]
    (ids,) = session(exported.text_path).get_inputs()
    assert (ids.name, ids.type) == ("token_ids", "tensor(int32)")
    assert ids.shape == ["batch", "length"]
    for path in (exported.image_path, exported.text_path):
        (embeddings,) = session(path).get_outputs()
        assert (embeddings.name, embeddings.type) == ("embeddings", "tensor(float)")
        assert embeddings.shape[0] == "batch"
        graph = onnx.load(path)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", OPSET)]
        assert sum(node.op_type == "LayerNormalization" for node in graph.graph.node) >= 4


def save_multilingual(directory: Path) -> Path:
    tokenizer = roberta_tokenizer()
    return save_dual_encoder(directory, text=roberta_config(tokenizer), tokenizer=tokenizer)


TOKENIZED: Mapping[str, Callable[[Path], Path]] = {
    **FAMILIES,
    "multilingual": save_multilingual,
    "siglip2": lambda folder: save_siglip(folder, tokenizer=gemma_tokenizer()),
    "siglip2-lower-case": lambda folder: save_siglip(
        folder, tokenizer=gemma_tokenizer(Siglip2Tokenizer)
    ),
}


def rules(*, max_tokens: int = MAX_TOKENS, vocab_size: int = 10_000, **others: Any) -> TokenRules:
    return TokenRules(max_tokens=max_tokens, vocab_size=vocab_size, **others)


@pytest.mark.parametrize("name", list(TOKENIZED))
def test_tokenizer_gives_the_ids_of_transformers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "exported.json"
    checkpoint = find_checkpoint(str(TOKENIZED[name](tmp_path)))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for max_tokens in (MAX_TOKENS, 7):
        text = export_tokenizer(checkpoint, rules=rules(max_tokens=max_tokens), path=path)
        assert text == TextInput(max_tokens=max_tokens, pad_token_id=theirs.pad_token_id)
        ours = Tokenizer.from_file(str(path))
        encoded = [encoding.ids for encoding in ours.encode_batch(TEXTS)]
        assert encoded == theirs(TEXTS, truncation=True, max_length=max_tokens)["input_ids"]
        last = {ids[-1] for ids in encoded}
        assert last == {theirs.sep_token_id if theirs.eos_token_id is None else theirs.eos_token_id}
        assert max(len(ids) for ids in encoded) == max_tokens
        assert min(len(ids) for ids in encoded) <= 2


def test_lower_case_is_where_the_tokenizer_asks_for_it(tmp_path: Path) -> None:
    def exported_ids(directory: Path) -> list[int]:
        path = directory / "exported.json"
        export_tokenizer(find_checkpoint(str(directory)), rules=rules(), path=path)
        return Tokenizer.from_file(str(path)).encode("a RED Circle").ids

    lower = exported_ids(TOKENIZED["siglip2-lower-case"](tmp_path / "lower"))
    assert lower != exported_ids(TOKENIZED["siglip2"](tmp_path / "as-it-is"))
    assert lower == exported_ids(TOKENIZED["siglip2-lower-case"](tmp_path / "again"))


def test_siglip_tokenizer_comes_from_its_sentencepiece_model(tmp_path: Path) -> None:
    # Of a folder that names no class, AutoTokenizer expects SiglipTokenizer too.
    for config in ({"tokenizer_class": "SiglipTokenizer"}, {}):
        directory = save_siglip(tmp_path)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        checkpoint = find_checkpoint(str(directory))
        expected = load_model(checkpoint).token_rules
        assert expected is not None
        text = export_tokenizer(checkpoint, rules=expected, path=tmp_path / "exported.json")
        assert text == TextInput(max_tokens=MAX_TOKENS, pad_token_id=1, pads_to_max=True)
        ours = Tokenizer.from_file(str(tmp_path / "exported.json"))
        # As tests/test_siglip_tokenizer.py knows them.
        assert ours.encode("A red, circle!").ids == [6, 5, 53, 9, 42, 1]
        assert len(ours.encode("a red circle " * 9).ids) == MAX_TOKENS


@pytest.mark.parametrize(
    ("family", "first", "offset", "unknown", "last"),
    # fairseq puts special tokens before those of SentencePiece.
    [("XLMRobertaTokenizer", 0, 1, 3, 2), ("CamembertTokenizer", 5, 4, 3, 6)],
)
def test_tokenizer_that_is_a_sentencepiece_model_alone(
    tmp_path: Path, family: str, first: int, offset: int, unknown: int, last: int
) -> None:
    directory = save_multilingual(tmp_path)
    for path in directory.glob("*token*.json"):
        path.unlink()
    assert not find_checkpoint(str(directory)).has_tokenizer
    model = directory / "sentencepiece.bpe.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a red circle on the green square", "two squares"] * 20),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": family}))
    checkpoint = find_checkpoint(str(directory))
    text = export_tokenizer(checkpoint, rules=rules(), path=tmp_path / "exported.json")
    assert text == TextInput(max_tokens=MAX_TOKENS, pad_token_id=1)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    caption = "a red square on \u7ea2"
    expected = [unknown if piece == 0 else piece + offset for piece in pieces.encode(caption)]
    assert unknown in expected
    ours = Tokenizer.from_file(str(tmp_path / "exported.json"))
    assert ours.encode(caption).ids == [first, *expected, last]


def test_tokenizer_has_the_shorter_limit(exported: Exported, tmp_path: Path) -> None:
    directory = shutil.copytree(exported.directory, tmp_path / "copy")
    change_tokenizer_config(directory, model_max_length=5)
    checkpoint = find_checkpoint(str(directory))
    text = export_tokenizer(checkpoint, rules=rules(), path=tmp_path / "t.json")
    assert text.max_tokens == 5
    ids = (
        Tokenizer.from_file(str(tmp_path / "t.json")).encode("a red circle on the green square").ids
    )
    assert len(ids) == 5


def test_tokenizer_that_cuts_at_the_left(exported: Exported, tmp_path: Path) -> None:
    directory = shutil.copytree(exported.directory, tmp_path / "copy")
    change_tokenizer_config(directory, truncation_side="left")
    checkpoint = find_checkpoint(str(directory))
    export_tokenizer(checkpoint, rules=rules(max_tokens=6), path=tmp_path / "t.json")
    text = "a red circle on the green square"
    expected = AutoTokenizer.from_pretrained(str(directory))(text, truncation=True, max_length=6)
    assert Tokenizer.from_file(str(tmp_path / "t.json")).encode(text).ids == expected["input_ids"]


def change_tokenizer_config(directory: Path, **changes: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def error_of(directory: Path, **asked: Any) -> str:
    checkpoint = find_checkpoint(str(directory))
    with pytest.raises(CheckpointError) as caught:
        export_tokenizer(checkpoint, rules=rules(**asked), path=directory / "exported.json")
    assert checkpoint.name in str(caught.value)
    return str(caught.value)


def test_tokenizer_of_another_model(exported: Exported) -> None:
    for role in ("eos", "pad"):
        message = error_of(exported.directory, special_token_ids={role: 12_345})
        assert f"{role}_token_id is 12345 in its config" in message
    relied_on = load_model(find_checkpoint(str(exported.directory))).token_rules
    assert relied_on is not None
    assert set(relied_on.special_token_ids) <= {"eos", "pad"}
    assert relied_on.special_token_ids


def test_tokenizer_with_more_ids_than_the_model(exported: Exported) -> None:
    num_ids = len(AutoTokenizer.from_pretrained(str(exported.directory)))
    message = error_of(exported.directory, vocab_size=num_ids - 1)
    assert f"vocab_size is {num_ids - 1} in its config and {num_ids} in its tokenizer" in message


def test_tokenizer_that_pads_at_the_left(tmp_path: Path) -> None:
    directory = save_siglip(tmp_path, tokenizer=gemma_tokenizer(padding_side="left"))
    assert "set padding_side to right" in error_of(directory, pads_to_max=True)
    # Where padding has no influence, its side has none.
    checkpoint = find_checkpoint(str(directory))
    export_tokenizer(checkpoint, rules=rules(), path=tmp_path / "exported.json")


def test_tokenizer_that_is_no_one_file(exported: Exported, tmp_path: Path) -> None:
    directory = shutil.copytree(exported.directory, tmp_path / "copy")
    change_tokenizer_config(directory, tokenizer_class="CanineTokenizer")
    assert "CanineTokenizer, which cannot be written as a tokenizer.json" in error_of(directory)


def test_tokenizer_is_missing(tmp_path: Path) -> None:
    assert "tokenizer.json is missing" in error_of(save_image_only(tmp_path))


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', '{"model": {"type": "new"}}'])
def test_tokenizer_is_malformed(exported: Exported, tmp_path: Path, content: str) -> None:
    directory = shutil.copytree(exported.directory, tmp_path / "copy")
    (directory / "tokenizer.json").write_text(content)
    assert "malformed tokenizer" in error_of(directory)


def test_tokenizer_without_padding(tmp_path: Path) -> None:
    directory = save_dual_encoder(tmp_path)
    change_tokenizer_config(directory, pad_token=None)
    assert "no padding token" in error_of(directory)
