"""Texts as padded batches of token ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import EngineError
from engine.manifest import TextInput
from engine.tokenization import Tokenizer
from tests.checkpoints import bert_tokenizer

PAD, CLS, SEP = 0, 2, 3
TEXTS = ["red circle", "on the green square a", "", "square"]
ROWS = [
    [CLS, 5, 7, SEP],
    [CLS, 11, 12, 6, 8, 10, SEP],
    [CLS, SEP],
    [CLS, 8, SEP],
]


def tokenizer(folder: Path, *, max_tokens: int = 16, **settings: Any) -> Tokenizer:
    backend = bert_tokenizer().backend_tokenizer
    backend.enable_truncation(max_tokens)
    backend.save(str(folder / "tokenizer.json"))
    text = TextInput(max_tokens=max_tokens, pad_token_id=PAD, **settings)
    return Tokenizer(folder / "tokenizer.json", text=text)


def padded(rows: list[list[int]], *, length: int) -> list[list[int]]:
    return [row + [PAD] * (length - len(row)) for row in rows]


def test_texts_of_like_length_share_a_batch(tmp_path: Path) -> None:
    first, second = tokenizer(tmp_path).batches(TEXTS, max_rows=2, length_step=1)
    assert first[0].tolist() == [2, 3]
    assert first[1].tolist() == padded([ROWS[2], ROWS[3]], length=3)
    assert second[0].tolist() == [0, 1]
    assert second[1].tolist() == padded([ROWS[0], ROWS[1]], length=7)
    assert first[1].dtype == second[1].dtype == np.int32


@pytest.mark.parametrize(("step", "length"), [(1, 7), (4, 8), (8, 8), (5, 10), (64, 16)])
def test_lengths_are_multiples_of_a_step_or_the_longest(
    tmp_path: Path, step: int, length: int
) -> None:
    ((numbers, ids),) = tokenizer(tmp_path).batches(TEXTS, max_rows=9, length_step=step)
    assert numbers.tolist() == [2, 3, 0, 1]
    assert ids.tolist() == padded([ROWS[number] for number in numbers], length=length)


def test_every_row_is_filled_where_the_model_was_trained_so(tmp_path: Path) -> None:
    filling = tokenizer(tmp_path, pads_to_max=True)
    for _, ids in filling.batches(TEXTS, max_rows=1, length_step=1):
        assert ids.shape == (1, 16)
    ((numbers, ids),) = filling.batches(TEXTS, max_rows=9, length_step=4)
    assert ids.tolist() == padded([ROWS[number] for number in numbers], length=16)


@pytest.mark.parametrize("pads_to_max", [False, True])
def test_long_texts_are_cut(tmp_path: Path, pads_to_max: bool) -> None:
    cutting = tokenizer(tmp_path, max_tokens=5, pads_to_max=pads_to_max)
    ((_, ids),) = cutting.batches(["red " * 50], max_rows=4, length_step=8)
    assert ids.tolist() == [[CLS, 5, 5, 5, SEP]]


def test_no_texts_are_no_batches(tmp_path: Path) -> None:
    assert list(tokenizer(tmp_path).batches([], max_rows=4, length_step=1)) == []


@pytest.mark.parametrize("content", [None, "", "{}"], ids=["missing", "empty", "no-tokenizer"])
def test_damaged_file(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EngineError, match=r"tokenizer.json: cannot be loaded .*builds it anew"):
        Tokenizer(path, text=TextInput(max_tokens=16, pad_token_id=PAD))


def test_texts_that_lose_their_ends_are_told(tmp_path: Path) -> None:
    cutting = tokenizer(tmp_path, max_tokens=5)
    texts = ["red red red", "red red red red", "", "red " * 500]
    assert cutting.are_cut(texts) == [False, True, False, True]
    assert cutting.are_cut([]) == []
