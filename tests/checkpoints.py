"""Small checkpoints for tests, with random weights, saved by transformers itself.

Knows nothing of how Clipmill reads them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GemmaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from jobs.demo.run import CHECKPOINT_DIR

IMAGE_SIZE = 32
PATCH_SIZE = 8
EMBEDDING_DIM = 24
WIDTH = 32
MAX_TOKENS = 16
# Ids above the tokenizer's own, so that its end-of-text token is not the largest id of all.
NUM_SPARE_IDS = 8
# 144 pieces, trained with sentencepiece on captions of the demo and a few words in other scripts.
SPIECE_PATH = Path(__file__).parent / "data" / "siglip.spiece.model"

_DEPTH: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES: dict[str, Any] = {**_DEPTH, "intermediate_size": 48}
_IMAGE: dict[str, Any] = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
_SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


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
    image = {**_SIZES, "hidden_act": act, **_IMAGE}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=EMBEDDING_DIM)
    model = _randomized(CLIPModel(config), seed=seed).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    _save_image_processor(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, directory / name)
    return directory


def save_dual_encoder(
    directory: Path,
    *,
    image: PreTrainedConfig | None = None,
    text: PreTrainedConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Path:
    """A `VisionTextDualEncoderModel`, of CLIP's image half and BERT unless others are given."""
    tokenizer = tokenizer or bert_tokenizer()
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        image or CLIPVisionConfig(**_SIZES, **_IMAGE),
        text
        or BertConfig(
            **_SIZES,
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        ),
        projection_dim=EMBEDDING_DIM,
    )
    _randomized(VisionTextDualEncoderModel(config), seed=seed).save_pretrained(directory)
    _save_image_processor(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_siglip(
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A `SiglipModel`, as SigLIP 2's with a Gemma tokenizer, or else with SigLIP's own."""
    config = SiglipConfig(
        text_config={
            **_SIZES,
            "vocab_size": 144 if tokenizer is None else len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": None,
            "eos_token_id": 1,
            **changes,
        },
        vision_config={**_SIZES, **_IMAGE},
    )
    _randomized(SiglipModel(config), seed=seed).save_pretrained(directory)
    SiglipImageProcessorPil(size=_SQUARE).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        return directory
    shutil.copy(SPIECE_PATH, directory / "spiece.model")
    settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": MAX_TOKENS}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def save_siglip_image_only(directory: Path, *, seed: int = 0) -> Path:
    """A `SiglipVisionModel`."""
    model = SiglipVisionModel(SiglipVisionConfig(**_SIZES, **_IMAGE))
    _randomized(model, seed=seed).save_pretrained(directory)
    SiglipImageProcessorPil(size=_SQUARE).save_pretrained(directory)
    return directory


def dinov2_config(*, num_registers: int = 0, **changes: Any) -> PreTrainedConfig:
    """DINOv2's, with registers or without."""
    sizes = {**_DEPTH, **_IMAGE, "layer_norm_eps": 1e-5, **changes}
    if num_registers:
        return Dinov2WithRegistersConfig(**sizes, num_register_tokens=num_registers)
    return Dinov2Config(**sizes)


def save_dinov2(
    directory: Path,
    *,
    height: int = IMAGE_SIZE,
    width: int = IMAGE_SIZE,
    num_registers: int = 0,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A `Dinov2Model` or `Dinov2WithRegistersModel`, with a crop of its own size."""
    config = dinov2_config(num_registers=num_registers, **changes)
    model = Dinov2WithRegistersModel(config) if num_registers else Dinov2Model(config)
    _randomized(model, seed=seed).save_pretrained(directory)
    BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": height, "width": width}
    ).save_pretrained(directory)
    return directory


def vit_config(**changes: Any) -> PreTrainedConfig:
    """A plain ViT's."""
    return ViTConfig(**{**_SIZES, **_IMAGE, **changes})


def save_vit(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A `ViTModel` with its pooler."""
    _randomized(ViTModel(vit_config(**changes)), seed=seed).save_pretrained(directory)
    ViTImageProcessorPil(size=_SQUARE).save_pretrained(directory)
    return directory


def roberta_config(
    tokenizer: PreTrainedTokenizerBase, *, family: type[PreTrainedConfig] = XLMRobertaConfig
) -> PreTrainedConfig:
    """RoBERTa's or one of its relatives', for texts of at most `MAX_TOKENS`."""
    return family(
        **_SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS + tokenizer.pad_token_id + 1,
        type_vocab_size=1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def save_image_only(directory: Path, *, seed: int = 0) -> Path:
    """A `CLIPVisionModelWithProjection`."""
    config = CLIPVisionConfig(**_SIZES, **_IMAGE, projection_dim=EMBEDDING_DIM)
    _randomized(CLIPVisionModelWithProjection(config), seed=seed).save_pretrained(directory)
    _save_image_processor(directory)
    return directory


def bert_tokenizer() -> PreTrainedTokenizerBase:
    """WordPiece of single letters and a few words."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def roberta_tokenizer() -> PreTrainedTokenizerBase:
    """XLM-RoBERTa's Unigram, of single letters and a few words."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -2.0) for word in ("\u2581red", "\u2581circle", "\u2581square", "\u2581on")]
    pieces += [(letter, -4.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz0123456789"]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=512)


def gemma_tokenizer(
    family: type[PreTrainedTokenizerBase] = GemmaTokenizer, *, padding_side: str = "right"
) -> PreTrainedTokenizerBase:
    """Gemma's BPE with byte fallback, trained on a few words, set as SigLIP 2's checkpoints do."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.train_from_iterator(
        ["a red circle on the green square", "two squares and three circles"],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
            show_progress=False,
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return family(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        add_bos_token=False,
        add_eos_token=True,
        padding_side=padding_side,
        model_input_names=["input_ids"],
    )


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
