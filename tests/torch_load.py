"""Loads an engine with random weights in the torch backend, and prints what it took, as JSON.

PYTHONPATH=. python3 -m tests.torch_load B/32
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from engine.backends.torch_fp8 import TorchEncoder
from engine.families.backbone import TokenRules
from engine.manifest import TOKENIZER_FILE, Manifest, TextInput
from engine.model import Model
from engine.preprocess import Preprocessing
from tests.full_size_towers import (
    EOS_ID,
    IMAGE_SIZE,
    MAX_TOKENS,
    MEAN,
    NUM_IDS,
    SIZES,
    STD,
    blurred_pixels,
    captions,
    image_towers,
    text_towers,
)
from tests.max_calibration import quantize

DEMO_CHECKPOINT_DIR = Path(__file__).parents[1] / "jobs" / "demo" / "checkpoint"
PREPROCESSING = Preprocessing(
    height=IMAGE_SIZE,
    width=IMAGE_SIZE,
    resize=IMAGE_SIZE,
    crop=(IMAGE_SIZE, IMAGE_SIZE),
    resample=3,
    mean=MEAN,
    std=STD,
)


def quantized_model(name: str) -> Model:
    """The towers of a CLIP size in FP8, made on the card and moved to the CPU."""
    device = torch.device("cuda", 0)
    image, _ = image_towers(SIZES[name], device=device)
    text, _ = text_towers(SIZES[name], device=device)
    quantize(image, blurred_pixels(1, seed=0, device=device))
    quantize(text, captions(1, seed=0).to(device))
    return Model(
        image_tower=image.to_dtype(torch.float16).cpu(),
        preprocessing=PREPROCESSING,
        text_tower=text.to_dtype(torch.float16).cpu(),
        token_rules=TokenRules(max_tokens=MAX_TOKENS, vocab_size=NUM_IDS),
        embedding_dim=SIZES[name].embedding_dim,
    )


def write_engine(directory: Path, *, model: Model) -> None:
    """All of an engine but its checkpoint; the tokenizer is another's."""
    tokenizer = (DEMO_CHECKPOINT_DIR / TOKENIZER_FILE).read_bytes()
    (directory / TOKENIZER_FILE).write_bytes(tokenizer)
    Manifest(
        engine_id="fp8-random",
        checkpoint="random",
        revision=None,
        checkpoint_digest="",
        precision="fp8",
        embedding_dim=model.embedding_dim,
        preprocessing=PREPROCESSING,
        text=TextInput(max_tokens=MAX_TOKENS, pad_token_id=EOS_ID),
        files={},
        versions={},
    ).write(directory)


def main() -> None:
    """Load an engine in a process that has compiled no kernel yet."""
    model = quantized_model(sys.argv[1])
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        write_engine(Path(folder), model=model)
        started = time.monotonic()
        encoder = TorchEncoder(Path(folder), load_towers=lambda directory, preprocessing: model)
        seconds = time.monotonic() - started
    found = {"seconds": round(seconds, 2), "GiB": round(encoder.device_memory_bytes / 2**30, 3)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
