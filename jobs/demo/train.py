"""Trains the demo's small CLIP on drawn scenes: `python -m jobs.demo.train --out DIR`.

It does not know how the rest of the project loads or runs the checkpoint: transformers does both
here, so that `--evaluate DIR` is a measurement from outside.
"""

import argparse
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from jobs.demo.scenes import PLACES, SIZES, Scene, scenes

SEED = 0
NUM_EVALUATED = 2000
# The split goes by the captions' text, so this seed only picks which held-out scenes are drawn.
EVALUATION_SEED = 1

IMAGE_PIXELS = 64
PATCH_PIXELS = 16
MAX_TOKENS = 32
WIDTH = 128
NUM_HEADS = 4
NUM_VISION_LAYERS = 4
NUM_TEXT_LAYERS = 2

# Channel statistics and bound on the temperature: preprocessor_config.json of
# openai/clip-vit-base-patch32, and Radford et al. 2021 (arXiv 2103.00020), section 2.5.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100.0)

DEFAULT_NUM_STEPS = 2000
NUM_SCENES = 40_000  # drawn once beforehand; drawing afresh every step would cost more
BATCH_SIZE = 128
PEAK_LR = 1e-3
NUM_WARMUP_STEPS = 100
DECAY_SHARE = 0.25  # of the steps, the last ones; the rate is level between warm-up and decay
WEIGHT_DECAY = 0.05
WORD_PAIR_WEIGHT = 0.3
SHORTENED_SHARE = 0.4  # of the scenes; see `shorten`

_STEPS_PER_LINE = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Drawn and tokenised scenes."""

    pixels: torch.Tensor
    """uint8 [N, 3, 64, 64], RGB, CHW."""

    token_ids: torch.Tensor
    """int64 [N, T], captions, some shortened, padded with the end token to the longest one."""

    has_word_pair: torch.Tensor
    """bool [N, P], which of all pairs of adjacent tokens the full caption has."""


def build_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """Learn a byte-level BPE in CLIP's manner in which each word of the captions is one token.

    Any other text falls back to smaller tokens and at last to bytes.
    """
    clip_rules = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = clip_rules.normalizer
    learner.pre_tokenizer = clip_rules.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The size is no bound here: learning ends when every word is one token.
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges: list[Any] = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build an untrained CLIPModel for the tokenizer's vocabulary."""
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": NUM_HEADS,
        "projection_dim": WIDTH,
        "hidden_act": "quick_gelu",
    }
    text_config = tower | {
        "num_hidden_layers": NUM_TEXT_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = tower | {
        "num_hidden_layers": NUM_VISION_LAYERS,
        "image_size": IMAGE_PIXELS,
        "patch_size": PATCH_PIXELS,
    }
    return CLIPModel(
        CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=WIDTH)
    )


def shorten(caption: str, *, rng: np.random.Generator) -> str:
    """Leave out background, sizes or place, each every other time, as people do who search.

    What comes out of a training caption is never a held-out caption: those leave out nothing.
    """
    if rng.random() < 0.5:
        caption = caption.rsplit(" on a ", 1)[0]
    if rng.random() < 0.5:
        caption = re.sub(rf"\b({'|'.join(SIZES)}) ", "", caption)
    if rng.random() < 0.5:
        caption = re.sub(rf" ({'|'.join(PLACES)})\b", "", caption)
    return caption


def draw_pool(drawn: Sequence[Scene], *, tokenizer: CLIPTokenizer) -> Pool:
    """Draw and tokenise scenes; the resize is the one that the image processor does."""
    side = (IMAGE_PIXELS, IMAGE_PIXELS)
    pixels = np.empty((len(drawn), *side, 3), dtype=np.uint8)
    for row, scene in enumerate(drawn):
        pixels[row] = np.asarray(scene.draw().resize(side, Image.Resampling.BICUBIC))
    captions = [scene.caption for scene in drawn]
    rng = np.random.default_rng(SEED)
    shortened = [
        shorten(caption, rng=rng) if rng.random() < SHORTENED_SHARE else caption
        for caption in captions
    ]
    full_ids, token_ids = (
        tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        for texts in (captions, shortened)
    )
    adjacent = full_ids[:, :-1] * len(tokenizer) + full_ids[:, 1:]
    known_pairs, pair_ids = adjacent.unique(return_inverse=True)
    has_word_pair = torch.zeros(len(drawn), len(known_pairs), dtype=torch.bool)
    return Pool(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        token_ids=token_ids,
        has_word_pair=has_word_pair.scatter_(1, pair_ids, value=True),
    )


def batches(pool: Pool) -> Iterator[torch.Tensor]:
    """Yield row numbers, int64 [BATCH_SIZE], newly shuffled every epoch, without end."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(pool.pixels), generator=generator)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            yield order[start : start + BATCH_SIZE]


def contrastive_loss(logits: torch.Tensor, *, token_ids: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy, in which equal captions share the target.

    Args:
        logits: float32 [B, B], images by texts, scaled by the temperature.
        token_ids: int64 [B, T] of the texts.
    """
    same = (token_ids[:, None] == token_ids[None]).all(dim=-1).float()
    targets = same / same.sum(dim=-1, keepdim=True)
    by_image = functional.cross_entropy(logits, targets)
    by_text = functional.cross_entropy(logits.T, targets)
    return (by_image + by_text) / 2


def train(out_dir: Path, *, num_steps: int) -> None:
    """Train from nothing and write the checkpoint.

    Beside the contrastive loss there is an auxiliary one that goes away after training: a linear
    head reads from the image embedding which pairs of adjacent words the caption has ("small red",
    "red circle"). That teaches shapes, and what belongs to what, not by contrast alone.
    """
    # One thread keeps sums in one order, so that a seed gives one result on one kind of machine.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    drawn = list(itertools.islice(scenes(SEED, split="train"), NUM_SCENES))
    tokenizer = build_tokenizer([scene.caption for scene in drawn])
    model = build_model(tokenizer)
    pool = draw_pool(drawn, tokenizer=tokenizer)
    print(
        f"{model.num_parameters()} parameters, {len(tokenizer)} tokens, {len(drawn)} scenes",
        file=sys.stderr,
    )
    word_pair_head = nn.Linear(WIDTH, pool.has_word_pair.shape[1])
    with torch.no_grad():
        shares = pool.has_word_pair.sum(dim=0) / len(drawn)
        word_pair_head.bias.copy_(torch.logit(shares, eps=1e-4))
    plain = [weight for weight in model.parameters() if weight.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in model.parameters() if weight.ndim >= 2]},
        {"params": [*plain, *word_pair_head.parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    mean, std = (torch.tensor(stats).view(1, 3, 1, 1) for stats in (IMAGE_MEAN, IMAGE_STD))
    started = time.monotonic()
    for step, rows in enumerate(itertools.islice(batches(pool), num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * lr_share(step, num_steps=num_steps)
        pixels = (pool.pixels[rows].float() / 255 - mean) / std
        token_ids = pool.token_ids[rows]
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        text = model.text_projection(model.text_model(input_ids=token_ids).pooler_output)
        scaled = functional.normalize(image, dim=-1) * model.logit_scale.exp()
        logits = scaled @ functional.normalize(text, dim=-1).T
        contrastive = contrastive_loss(logits, token_ids=token_ids)
        word_pairs = functional.binary_cross_entropy_with_logits(
            word_pair_head(image), pool.has_word_pair[rows].float(), reduction="sum"
        ) / len(rows)
        optimizer.zero_grad()
        torch.autograd.backward(contrastive + WORD_PAIR_WEIGHT * word_pairs)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if (step + 1) % _STEPS_PER_LINE == 0:
            print(
                f"step {step + 1}/{num_steps}  {time.monotonic() - started:.0f} s  "
                f"contrastive {contrastive.item():.3f}  word pairs {word_pairs.item():.3f}",
                file=sys.stderr,
            )
    save(model, tokenizer=tokenizer, out_dir=out_dir)


def lr_share(step: int, *, num_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, level, linear decay to nothing."""
    warmup = (step + 1) / NUM_WARMUP_STEPS
    decay = (num_steps - step) / (DECAY_SHARE * num_steps)
    return min(1.0, warmup, decay)


def save(model: CLIPModel, *, tokenizer: CLIPTokenizer, out_dir: Path) -> None:
    """Write model, tokenizer and image processor in transformers' layout."""
    # The file would otherwise carry the padding that the last call asked for.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(out_dir)
    model.save_pretrained(out_dir)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PIXELS},
        crop_size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    ).save_pretrained(out_dir)


def evaluate(checkpoint_dir: Path) -> dict[int, float]:
    """Measure text-to-image recall over NUM_EVALUATED held-out scenes with transformers alone.

    Returns:
        For each depth, the share of captions whose own picture is among that many best ones.
    """
    model = CLIPModel.from_pretrained(checkpoint_dir)
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint_dir)
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint_dir)
    heldout = list(itertools.islice(scenes(EVALUATION_SEED, split="heldout"), NUM_EVALUATED))
    image_parts, text_parts = [], []
    with torch.inference_mode():
        for start in range(0, NUM_EVALUATED, 100):
            part = heldout[start : start + 100]
            pixels = processor([scene.draw() for scene in part], return_tensors="pt")
            tokens = tokenizer(
                [scene.caption for scene in part], padding="max_length", return_tensors="pt"
            )
            image_parts.append(model.get_image_features(**pixels).pooler_output)
            text_parts.append(model.get_text_features(**tokens).pooler_output)
    images = functional.normalize(torch.cat(image_parts), dim=-1)
    texts = functional.normalize(torch.cat(text_parts), dim=-1)
    scores = texts @ images.T
    ranks = (scores > scores.diagonal()[:, None]).sum(dim=-1)
    return {depth: (ranks < depth).float().mean().item() for depth in (1, 5, 10)}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Trains or evaluates the demo's small CLIP.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="train, and write to this folder")
    task.add_argument("--evaluate", type=Path, metavar="DIR", help="print recall of a checkpoint")
    parser.add_argument("--steps", type=int, default=DEFAULT_NUM_STEPS, help="training steps")
    arguments = parser.parse_args()
    if arguments.out is not None:
        train(arguments.out, num_steps=arguments.steps)
        return
    for depth, recall in evaluate(arguments.evaluate).items():
        print(f"recall@{depth} {recall:.4f}")


if __name__ == "__main__":
    main()
