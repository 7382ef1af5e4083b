"""Small checkpoints for tests, with random weights, saved by transformers itself.

Knows nothing of how Clipmill reads them.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jobs.demo.run import CHECKPOINT_DIR

IMAGE_SIZE = 32
EMBEDDING_DIM = 24
MAX_TOKENS = 16
# Ids above the tokenizer's own, so that its end-of-text token is not the largest id of all.
NUM_SPARE_IDS = 8

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def save_clip(
    directory: Path,
    *,
    act: str = "quick_gelu",
    eos_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """A `CLIPModel` with the demo checkpoint's tokenizer; its own end-of-text id unless named."""
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT_DIR))
    text = {
        **_SIZES,
        "hidden_act": act,
        "vocab_size": len(tokenizer) + NUM_SPARE_IDS,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    image = {**_SIZES, "hidden_act": act, "image_size": IMAGE_SIZE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=EMBEDDING_DIM)
    model = _randomized(CLIPModel(config), seed=seed).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    _save_image_processor(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, directory / name)
    return directory


def save_dual_encoder(directory: Path, *, seed: int = 0) -> Path:
    """A `VisionTextDualEncoderModel` of CLIP's image half and BERT, with a WordPiece tokenizer."""
    tokenizer = wordpiece_tokenizer()
    text = BertConfig(
        **_SIZES,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.token_to_id("[PAD]"),
    )
    image = CLIPVisionConfig(**_SIZES, image_size=IMAGE_SIZE, patch_size=8)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        image, text, projection_dim=EMBEDDING_DIM
    )
    _randomized(VisionTextDualEncoderModel(config), seed=seed).save_pretrained(directory)
    _save_image_processor(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)
    return directory


def save_image_only(directory: Path, *, seed: int = 0) -> Path:
    """A `CLIPVisionModelWithProjection`."""
    config = CLIPVisionConfig(
        **_SIZES, image_size=IMAGE_SIZE, patch_size=8, projection_dim=EMBEDDING_DIM
    )
    _randomized(CLIPVisionModelWithProjection(config), seed=seed).save_pretrained(directory)
    _save_image_processor(directory)
    return directory


def wordpiece_tokenizer() -> Tokenizer:
    """A BERT tokenizer of single letters and a few words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["red", "green", "circle", "square", "##s", "a", "on", "the"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    tokens += [f"##{letter}" for letter in letters]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    return tokenizer


def _save_image_processor(directory: Path) -> None:
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(directory)


def _randomized(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    # Fresh models have biases of 0 and norms of 1, which would hide tensors that change places.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
