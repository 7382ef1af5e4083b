"""SigLIP's own tokenizer, from the SentencePiece model that comes with a checkpoint.

Knows neither towers nor sentencepiece: the rules of transformers' `SiglipTokenizer`, which has no
`tokenizer.json` of its own, written as one.

The ids are those of `SiglipTokenizer`, with two exceptions that captions have no use for: the word
after a special token written out in a text (`</s>`, `<unk>`) starts with a space here, and a
combining mark after a character that SentencePiece rewrites is dropped with it.
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    processors,
)
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from engine.errors import CheckpointError

MODEL_FILE = "spiece.model"
_SPACE = "\u2581"  # stands for a space within pieces
_UNIGRAM, _USER_DEFINED, _UNUSED = 1, 4, 5  # as sentencepiece_model.proto numbers them
_MAX_LENGTH = 64  # tokens; the default of SiglipTokenizer
_WAY_OUT = "save the checkpoint with a PreTrainedTokenizerFast that gives the same ids"

# str.lower() writes a capital sigma at the end of a word in another way, which the tokenizers
# library does not. A word may go on after the characters in the second class.
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_IGNORABLE = r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'.:\u00b7\u2018\u2019\u2024\u2027]"
_FINAL_SIGMA = Regex(
    f"(?<={_CASED}|{_CASED}{_IGNORABLE}|{_CASED}{_IGNORABLE}{{2}})\u03a3(?!{_IGNORABLE}*{_CASED})"
)
_PUNCTUATION = Regex("[" + "".join(f"\\{sign}" for sign in string.punctuation) + "]")
_WHITESPACE = Regex(r"[\s\x1c-\x1f\x85]+")  # what it is to Python's re


def siglip_tokenizer(directory: Path, *, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a checkpoint.

    Args:
        directory: Where `spiece.model` lies.
        config: The parsed `tokenizer_config.json`.

    Raises:
        CheckpointError: `spiece.model` is missing, malformed, or unlike those of SigLIP.
    """
    path = directory / MODEL_FILE
    proto = _read(path)
    _check(proto, path=path)
    pieces = list(proto.pieces)
    while pieces[-1].type == _USER_DEFINED:
        pieces.pop()  # markers for T5, to which text towers have no embeddings
    tokenizer = Tokenizer(
        models.Unigram(
            [(piece.piece, piece.score) for piece in pieces],
            unk_id=proto.trainer_spec.unk_id,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    lowering = [normalizers.Replace(_FINAL_SIGMA, "\u03c2"), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(_SPACE, " "),
            *(lowering if config.get("do_lower_case", True) else []),
            normalizers.Replace(_PUNCTUATION, ""),
            normalizers.Replace(_WHITESPACE, " "),
            # The library's charsmap, unlike SentencePiece, does not compose longer sequences.
            normalizers.NFC(),
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" +"), " "),
            normalizers.Strip(),
            normalizers.Prepend(_SPACE),
            normalizers.Replace(" ", _SPACE),
        ]
    )
    special = {
        role: _special_token(config.get(f"{role}_token") or default)
        for role, default in (("eos", "</s>"), ("unk", "<unk>"), ("pad", "</s>"))
    }
    added = {token["content"] for token in config.get("added_tokens_decoder", {}).values()}
    if added - {token.content for token in special.values()}:
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: tokens were added to SigLIP's "
            f"({', '.join(sorted(added))}), which is not supported; {_WAY_OUT}"
        )
    tokenizer.add_special_tokens(list(special.values()))
    eos = special["eos"].content
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.get("model_max_length", _MAX_LENGTH),
        padding_side=config.get("padding_side", "right"),
        truncation_side=config.get("truncation_side", "right"),
        **{f"{role}_token": token for role, token in special.items()},
    )


def _read(path: Path) -> Any:
    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: SigLIP's tokenizer is made from it; bring it from the model that "
            "this one was trained from"
        ) from None
    except DecodeError as error:
        raise CheckpointError(f"{path}: not a whole SentencePiece model; fetch it again") from error
    return proto


def _check(proto: Any, *, path: Path) -> None:
    """Raise CheckpointError if the model has a feature that the rules above leave out."""
    odd_pieces = [
        piece.piece
        for piece in proto.pieces
        # Others are never met: no punctuation is left in a text.
        if piece.type in (_USER_DEFINED, _UNUSED) and not set(piece.piece) & set(string.punctuation)
    ]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    is_nmt_nfkc = bool(charsmap) and (
        normalizers.Precompiled(charsmap).normalize_str(f"{_SPACE}e\u0301") == " \u00e9"
    )
    faults = {
        "has no pieces": not proto.pieces,
        "is no unigram model": proto.trainer_spec.model_type != _UNIGRAM,
        "puts spaces at the end of words": proto.trainer_spec.treat_whitespace_as_suffix,
        "keeps repeated spaces": not proto.normalizer_spec.remove_extra_whitespaces,
        "does not mark spaces": not proto.normalizer_spec.escape_whitespaces,
        "does not normalize by nmt_nfkc": not is_nmt_nfkc,
        f"has user-defined or unused pieces ({', '.join(odd_pieces[:3])})": bool(odd_pieces),
    }
    found = [fault for fault, is_found in faults.items() if is_found]
    if found:
        raise CheckpointError(f"{path}: {'; '.join(found)}, which is not supported; {_WAY_OUT}")


def _special_token(value: str | Mapping[str, Any]) -> AddedToken:
    content = value if isinstance(value, str) else value["content"]
    return AddedToken(content, lstrip=True, rstrip=True, normalized=False, special=True)
