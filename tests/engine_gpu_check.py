"""Builds fp8 engines on a GPU and runs them there by the torch backend.

    PYTHONPATH=. python3 tests/engine_gpu_check.py CHECKPOINT PHOTOS [CHECKPOINT PHOTOS ...]

PHOTOS is a folder of Parquet files with `image` bytes and `text`. Needs nvidia-modelopt, a CUDA
build of torch and Triton; neither Ray nor FAISS. Prints a log, and as the last line a JSON object.
"""

import dataclasses
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from engine.accuracy import Thresholds
from engine.backends.torch_fp8 import TorchEncoder
from engine.build import build_unquantized
from engine.build_fp8 import build_fp8
from engine.checkpoint import find_checkpoint
from engine.gate import run_gate
from engine.images import ImageLimits
from engine.model import Model, load_model
from engine.preprocess import decode_pixels
from engine.reference import ReferenceEncoder
from engine.sample import Sample

NUM_ROWS = 512
BATCH_SIZES = (1, 8, 64, 256)
ALL_FP8 = Thresholds(min_cosine_p1=0, min_cosine_min=0, min_neighbour_overlap=0)


def photos(folder: Path, model: Model) -> Sample:
    """All rows of a folder, decoded."""
    tables = [pq.read_table(path, columns=["image", "text"]) for path in sorted(folder.iterdir())]
    images = [image for table in tables for image in table["image"].to_pylist()]
    decode = partial(decode_pixels, preprocessing=model.preprocessing, limits=ImageLimits())
    with ThreadPoolExecutor(16) as threads:
        pixels = np.stack(list(threads.map(decode, images)))
    texts = tuple(text for table in tables for text in table["text"].to_pylist())
    return Sample(uri=str(folder), pixels=pixels, texts=texts if model.text_tower else None)


def rows_of(sample: Sample, rows: Any) -> Sample:
    """Some of a sample's rows."""
    assert sample.pixels is not None
    texts = None if sample.texts is None else tuple(sample.texts[row] for row in rows)
    return Sample(uri=sample.uri, pixels=sample.pixels[rows], texts=texts)


def check(name: str, folder: Path) -> dict[str, Any]:
    """Build with the default thresholds and with none; judge both on all photos."""
    checkpoint = find_checkpoint(name)
    model = load_model(checkpoint)
    sample = photos(folder, model)
    drawn = np.random.default_rng(0).permutation(sample.num_rows)[:NUM_ROWS]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        fp16_dir = Path(scratch) / "fp16"
        fp16_dir.mkdir()
        build_unquantized(checkpoint, fp16_dir, precision="fp16")
        baseline = TorchEncoder(fp16_dir)
        for which, thresholds in (("default", Thresholds()), ("all in FP8", ALL_FP8)):
            directory = Path(scratch) / which
            directory.mkdir()
            started = time.monotonic()
            manifest = build_fp8(
                checkpoint,
                model,
                directory,
                sample=rows_of(sample, drawn),
                thresholds=thresholds,
                device="cuda",
                on_progress=lambda stage, done, total: None,
            )
            built = time.monotonic()
            encoder = TorchEncoder(directory)
            loaded = time.monotonic()
            report = run_gate(
                encoder,
                ReferenceEncoder(model, engine_dir=directory, manifest=manifest, device="cuda"),
                sample,
                thresholds=Thresholds(),
                backend="torch",
                device=torch.cuda.get_device_name(),
                baselines={"fp16 torch": baseline} if which == "default" else {},
                batch_sizes=BATCH_SIZES,
                on_progress=lambda stage, done, total: None,
            )
            assert manifest.quantization is not None
            found[which] = {
                "build seconds": round(built - started, 1),
                "load seconds": round(loaded - built, 2),
                "kept": manifest.quantization.kept_in_words(),
                "agreements": {
                    modality: dataclasses.asdict(agreement)
                    for modality, agreement in report.agreements.items()
                },
                "recalls": [dataclasses.asdict(recall) for recall in report.recalls],
                "rows/s": {
                    f"{speed.encoder} {speed.modality} {speed.batch_rows}": round(
                        speed.rows_per_second
                    )
                    for speed in report.speeds
                },
                "memory MiB": {
                    which: round(num_bytes / 2**20)
                    for which, num_bytes in report.memory_bytes.items()
                },
                "faults": report.faults,
            }
            sys.stdout.write(f"{name} {which}: {json.dumps(found[which], indent=1)}\n")
            sys.stdout.flush()
            del encoder
            torch.cuda.empty_cache()
    return found


def main() -> None:
    """Check every pair of checkpoint and photos."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    attempts: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (name, partial(check, name, Path(folder)))
        for name, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    ]
    for name, attempt in attempts:
        try:
            results[name] = attempt()
        except Exception:
            results[name] = traceback.format_exc()
            sys.stdout.write(results[name])
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
