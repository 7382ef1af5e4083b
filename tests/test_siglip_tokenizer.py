"""SigLIP's tokenizer as one file against transformers' own, which runs sentencepiece."""

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerBase, SiglipTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from engine.errors import CheckpointError
from engine.families.siglip_tokenizer import siglip_tokenizer
from tests.checkpoints import SPIECE_PATH

# What transformers' SiglipTokenizer gives for SPIECE_PATH, cut at 16 tokens.
KNOWN: dict[str, list[int]] = {
    "": [1],
    "  ": [1],
    "!?": [1],
    "a red circle": [6, 5, 53, 9, 42, 1],
    "A RED, Circle on the\tgreen-square.": [6, 5, 53, 9, 42, 7, 4, 22, 3, 30, 3, 3, 4, 44, 139, 1],
    "  two squares ": [5, 16, 46, 54, 39, 44, 1],
    "\u03a3\u03a0\u0399\u03a4\u0399\u039f\u03a5 \u039f\u0394\u039f\u03a3. \u03a3\u03a4\u039f": [
        5,
        66,
        107,
        59,
        58,
        59,
        57,
        109,
        5,
        57,
        103,
        57,
        50,
        5,
        66,
        1,
    ],
    "\ufb01ve \u2460 \xbd\u3000\uff46\uff55\uff4c\uff4c": [
        5,
        23,
        51,
        62,
        3,
        5,
        83,
        5,
        83,
        2,
        84,
        5,
        23,
        35,
        13,
        1,
    ],
    "e\u0302\u0301 i\u0308": [5, 120, 5, 95, 1],
    "\u2581two\x85\u2581\x1csquares": [5, 16, 46, 54, 39, 44, 1],
    "\u65e5\u8d64\u3044\u5186 \U0001f4a1": [5, 2, 131, 122, 127, 5, 2, 1],
    "the circles' red, red, red, red, red": [22, 3, 42, 44, 5, 53, 9, 5, 53, 9, 5, 53, 9, 5, 53, 1],
}
SIGNS = [
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789     \t\n.,!?-_'\"()<>&/\\[]^`{|}~",
    *"\u03a3\u03c3\u03c2\u03b1\u03b2\u03b3\u0391\u0393\u00e9\u00c9\u00fc\u00df\u0418\u0439\u043a",
    *"\u8d64\u3044\u5186\u00bd\u2460\u200b\u00a0\u3000\u2581\uff41\ufb01\u00ad\x07\x1c\x85\U0001f4a1",
    *("e\u0301", "e\u0302\u0301", "A\u030a", "\u1100\u1161\u11a8"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(SPIECE_PATH, tmp_path / "spiece.model")
    return tmp_path


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    with warnings.catch_warnings():
        # It warns where a text itself ends in the end-of-text token.
        warnings.simplefilter("ignore", UserWarning)
        return tokenizer(text, truncation=True, max_length=16)["input_ids"]


@pytest.mark.parametrize("text", list(KNOWN))
def test_known_ids(folder: Path, text: str) -> None:
    assert ids(siglip_tokenizer(folder, config={}), text) == KNOWN[text]


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}], ids=str)
def test_ids_are_those_of_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    words = [text for text in KNOWN if text.isascii()] + [
        "\u03bf\u03b4\u03cc\u03c2",
        "\u8d64\u3044",
    ]
    with (tmp_path / "spiece.model").open("wb") as file:
        # As SigLIP's was: Unigram, normalized by the default nmt_nfkc.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words * 20),
            model_writer=file,
            vocab_size=64,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    theirs = SiglipTokenizer(str(tmp_path / "spiece.model"), **settings)
    ours = siglip_tokenizer(tmp_path, config=settings)
    generator = random.Random(0)
    texts = ["".join(generator.choices(SIGNS, k=generator.randint(1, 60))) for _ in range(2000)]
    different = [text for text in [*KNOWN, *texts] if ids(ours, text) != ids(theirs, text)]
    assert different == []
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_settings_of_the_config(folder: Path) -> None:
    config = {
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": "<pad>",
        "model_max_length": 7,
        "added_tokens_decoder": {"0": {"content": "<pad>"}, "1": {"content": "</s>"}},
    }
    tokenizer = siglip_tokenizer(folder, config=config)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.model_max_length == 7
    assert siglip_tokenizer(folder, config={}).model_max_length == 64


def change_model(folder: Path, change: Callable[[Any], None]) -> None:
    proto = import_protobuf().ModelProto()
    proto.ParseFromString((folder / "spiece.model").read_bytes())
    change(proto)
    (folder / "spiece.model").write_bytes(proto.SerializeToString())


def test_markers_for_other_models_are_left_out(folder: Path) -> None:
    def change(proto: Any) -> None:
        for number in range(3):
            proto.pieces.add(piece=f"\u2581<extra_id_{number}>", score=0.0, type=4)

    change_model(folder, change)
    tokenizer = siglip_tokenizer(folder, config={})
    assert tokenizer.backend_tokenizer.get_vocab_size() == 144
    text = "a red circle"
    assert ids(tokenizer, text) == KNOWN[text]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.trainer_spec, "model_type", 2), "is no unigram model"),
        (
            lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True),
            "puts spaces at the end of words",
        ),
        (
            lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", False),
            "keeps repeated spaces",
        ),
        (
            lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False),
            "does not mark spaces",
        ),
        (
            lambda proto: proto.normalizer_spec.ClearField("precompiled_charsmap"),
            "does not normalize by nmt_nfkc",
        ),
        (lambda proto: proto.pieces.add(piece="made", score=0, type=4), r"user-defined.* \(made\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_of_models_are_refused(
    folder: Path, change: Callable[[Any], None], message: str
) -> None:
    change_model(folder, change)
    with pytest.raises(CheckpointError, match=f"{message}.*PreTrainedTokenizerFast"):
        siglip_tokenizer(folder, config={})


def test_added_tokens_are_refused(folder: Path) -> None:
    config = {"added_tokens_decoder": {"144": {"content": "<image>"}}}
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: tokens were added.*<image>"):
        siglip_tokenizer(folder, config=config)


def test_the_model_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"spiece.model is missing: .*bring it"):
        siglip_tokenizer(tmp_path, config={})


@pytest.mark.parametrize("num_bytes", [0, 500, -1])
def test_the_model_is_cut_short(folder: Path, num_bytes: int) -> None:
    path = folder / "spiece.model"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=r"has no pieces|not a whole SentencePiece model"):
        siglip_tokenizer(folder, config={})
