"""Makes what tests/trt86_check.py needs on a GPU machine that has no torch.

    python -m tests.export_for_trt86 demo OUT            the demo checkpoint
    python -m tests.export_for_trt86 CHECKPOINT_DIR OUT  a checkpoint that uses quick_gelu
    python -m tests.export_for_trt86 vit-b32 OUT         ViT-B/32 in size, with random weights

OUT gets `engine/` (an fp16 engine whose graphs TensorRT 8.6 can parse), `pixels.npy`, `texts.json`,
and the embeddings of both by the float32 towers in torch, `images.npy` and `texts.npy`. The demo
takes 7 MB, ViT-B/32 31 MB: all of its layers have the same weights, which the exporter stores once.

TensorRT 8.6 parses opset 17, which has LayerNormalization but no Gelu as one node.
"""

import dataclasses
import io
import json
import shutil
import sys
import tempfile
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from engine import export
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.images import ImageLimits
from engine.manifest import IMAGE_ONNX, TEXT_ONNX, TOKENIZER_FILE, Manifest, file_digest
from engine.model import load_model
from engine.preprocess import decode_pixels
from engine.registry import Registry
from engine.tokenization import Tokenizer
from jobs.demo.run import CHECKPOINT_DIR
from jobs.demo.scenes import scenes

OPSET = 17
MAX_PIXELS_BYTES = 4_000_000


def main(checkpoint: str, out: Path) -> None:
    """Fill a folder, which must not exist."""
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        if checkpoint == "vit-b32":
            directory = save_random_vit_b32(Path(scratch) / "checkpoint")
        else:
            directory = CHECKPOINT_DIR if checkpoint == "demo" else Path(checkpoint)
        found = find_checkpoint(str(directory))
        engine = load_or_build(found, registry=Registry(str(Path(scratch) / "engines")))
        fp32 = engine.manifest
        model = load_model(found)
        assert model.text_tower is not None

        size = fp32.preprocessing.height * fp32.preprocessing.width * 3
        drawn = list(islice(scenes(86, split="heldout"), min(600, MAX_PIXELS_BYTES // size)))
        pixels = np.stack([pixels_of(scene, fp32) for scene in drawn])
        texts = [" ".join(scene.caption.split()[: 1 + n % 40]) for n, scene in enumerate(drawn)]
        np.save(out / "pixels.npy", pixels)
        (out / "texts.json").write_text(json.dumps(texts))

        tokenizer_path = engine.directory / TOKENIZER_FILE
        assert fp32.text is not None
        tokenizer = Tokenizer(tokenizer_path, text=fp32.text)
        np.save(out / "images.npy", embed_images(model.image_tower, pixels))
        np.save(out / "texts.npy", embed_texts(model.text_tower, tokenizer, texts))

        engine_dir = out / "engine"
        engine_dir.mkdir()
        shutil.copy(tokenizer_path, engine_dir)
        with mock.patch.object(export, "OPSET", OPSET):
            export.export_image_tower(
                model.image_tower.to_dtype(torch.float16),
                height=fp32.preprocessing.height,
                width=fp32.preprocessing.width,
                path=engine_dir / IMAGE_ONNX,
            )
            export.export_text_tower(
                model.text_tower.to_dtype(torch.float16), path=engine_dir / TEXT_ONNX
            )
        dataclasses.replace(
            fp32,
            engine_id=f"fp16-{fp32.engine_id.removeprefix('fp32-')}",
            precision="fp16",
            files={path.name: file_digest(path) for path in sorted(engine_dir.iterdir())},
        ).write(engine_dir)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    sys.stdout.write(f"{out}: {len(drawn)} images and texts, {total / 1e6:.1f} MB\n")


def pixels_of(scene, manifest: Manifest) -> np.ndarray:
    buffer = io.BytesIO()
    scene.draw().save(buffer, "PNG")
    return decode_pixels(
        buffer.getvalue(), preprocessing=manifest.preprocessing, limits=ImageLimits()
    )


@torch.inference_mode()
def embed_images(tower, pixels: np.ndarray) -> np.ndarray:
    parts = [tower(torch.from_numpy(pixels[n : n + 16])) for n in range(0, len(pixels), 16)]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def embed_texts(tower, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    embeddings = []
    for text in texts:  # one by one, so that no padding could have an influence
        ((_, token_ids),) = tokenizer.batches([text], max_rows=1, length_step=1)
        embeddings.append(tower(torch.from_numpy(token_ids)))
    return torch.cat(embeddings).numpy()


def save_random_vit_b32(directory: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT_DIR))
    text = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "hidden_act": "quick_gelu",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, projection_dim=512)  # images as in CLIP's ViT-B/32
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for tower in (model.vision_model, model.text_model):
        first, *others = tower.encoder.layers
        for layer in others:
            layer.load_state_dict(first.state_dict())
    model.save_pretrained(directory)
    CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    ).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, directory)
    return directory


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
