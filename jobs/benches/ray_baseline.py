"""What Ray Data's documentation shows, tuned: Pillow, transformers' processor and model.

Tuned are the blocks, which have a batch's rows, the pools of processes, which are full from the
start, and what holds them back. Knows nothing of engines. Run as a program: `python -m
jobs.benches.ray_baseline CHECKPOINT CATALOG OUT` embeds `image`, and `text` if it is there, of a
Parquet catalog and prints how long that took, as JSON.
"""

import io
import json
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy, DataContext
from transformers import AutoImageProcessor

from engine.checkpoint import find_checkpoint
from jobs.benches.baselines import image_embeddings, load_tokenizer, load_transformers
from jobs.cluster import ray_cluster
from jobs.stopping import ended_by_sigterm
from pipelines import schema
from pipelines.arrow_files import parquet_columns, read_parquet

CPU_BATCH_ROWS, GPU_BATCH_ROWS = 32, 256
MAX_TOKENS = 77
TOKEN_COLUMNS = ("input_ids", "attention_mask")
ENCODED_AT = "encoded_at_seconds"


class Preprocess:
    """One row: decoded, resized and tokenized if it has text, as floats and ids."""

    def __init__(self, checkpoint: str) -> None:
        """Load the processor; the tokenizer comes with the first text."""
        self._checkpoint = find_checkpoint(checkpoint)
        self._processor = AutoImageProcessor.from_pretrained(
            str(self._checkpoint.directory), backend="pil", trust_remote_code=False
        )
        self._tokenizer: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`image` and `text` -> `pixel_values` float32 [3, H, W] and `input_ids` int64 [T]."""
        image = Image.open(io.BytesIO(row[schema.IMAGE])).convert("RGB")
        pixels = self._processor(images=image, return_tensors="np")["pixel_values"][0]
        made = {schema.KEY: row[schema.KEY], "pixel_values": pixels}
        if schema.TEXT in row:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._checkpoint)
            max_tokens = min(MAX_TOKENS, self._tokenizer.model_max_length)
            tokens = self._tokenizer(
                row[schema.TEXT], padding="max_length", truncation=True, max_length=max_tokens
            )
            made |= {name: np.asarray(tokens[name]) for name in TOKEN_COLUMNS}
        return made


class Embed:
    """Batches -> embeddings, with the model as it comes: fp16 on a GPU, float32 on CPUs."""

    def __init__(self, checkpoint: str, device: str, num_threads: int) -> None:
        """Load the model, which on CPUs runs on so many threads."""
        dtype = torch.float16 if device == "cuda" else torch.float32
        if device == "cpu":
            torch.set_num_threads(num_threads)  # Ray leaves one
        self._device, self._dtype = device, dtype
        self._model = load_transformers(find_checkpoint(checkpoint), dtype=dtype).to(device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Columns as `Preprocess` gives them, stacked -> `image` and `text` float32 [N, D].

        With them comes when that was done, in seconds since 1970.
        """
        with torch.inference_mode():
            pixels = self._moved(batch["pixel_values"]).to(self._dtype)
            found = {schema.IMAGE: image_embeddings(self._model, pixels)}
            if TOKEN_COLUMNS[0] in batch:
                tokens = [self._moved(batch[name]) for name in TOKEN_COLUMNS]
                found[schema.TEXT] = self._model.get_text_features(*tokens).pooler_output
        unit = torch.nn.functional.normalize
        embeddings = {
            name: unit(vectors.float(), dim=-1).cpu().numpy() for name, vectors in found.items()
        }
        encoded_at = np.full(len(pixels), time.time())
        return {schema.KEY: batch[schema.KEY], **embeddings, ENCODED_AT: encoded_at}

    def _moved(self, column: Any) -> torch.Tensor:
        return torch.as_tensor(column).to(self._device)


def embed_with_transformers(checkpoint: str, *, catalog_uri: str, out_uri: str) -> float:
    """Embed a catalog into Parquet files; returns seconds from first read to last write."""
    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources["CPU"])
    device = "cuda" if num_gpus else "cpu"
    num_models = num_gpus or max(1, num_cpus // 2)
    batch_rows = GPU_BATCH_ROWS if num_gpus else CPU_BATCH_ROWS
    started = time.perf_counter()
    rows = ray.data.read_parquet(catalog_uri)
    # As they are read, blocks have thousands of rows, and each is one process's work; and a pool
    # that grows takes minutes to have as many processes as there are cores.
    rows.repartition(target_num_rows_per_block=batch_rows).map(
        cast("Any", Preprocess),
        fn_constructor_args=(checkpoint,),
        num_cpus=0.25,  # so that reading and writing find CPUs beside a process for each
        compute=ActorPoolStrategy(size=max(1, num_cpus - num_models)),
    ).map_batches(
        Embed,
        fn_constructor_args=(checkpoint, device, max(1, num_cpus // num_models)),
        batch_size=batch_rows,
        num_cpus=0.5,
        num_gpus=1 if num_gpus else 0,
        compute=ActorPoolStrategy(size=num_models),
    ).write_parquet(out_uri)
    return time.perf_counter() - started


def encoding_samples(out_dir: Path) -> list[tuple[float, int]]:
    """Of what was embedded: after each batch, seconds since the first and contents until then."""
    files = list(out_dir.glob("*.parquet"))
    num_modalities = len({schema.IMAGE, schema.TEXT} & set(parquet_columns(files[0]).names))
    encoded_at = np.concatenate(
        [read_parquet(file, columns=[ENCODED_AT])[ENCODED_AT].to_numpy() for file in files]
    )
    moments, num_rows = np.unique(encoded_at, return_counts=True)
    num_contents = num_modalities * num_rows.cumsum()
    return list(zip((moments - moments[0]).tolist(), num_contents.tolist(), strict=True))


def main() -> None:
    """Run as a program."""
    checkpoint, catalog_uri, out_uri = sys.argv[1:]
    context = DataContext.get_current()
    # As they come, one or two of 15 processes decoded at a time for an H200; without, all.
    context.op_resource_reservation_enabled = False
    context.downstream_capacity_backpressure_ratio = None
    # Ray prints of its own, on stdout.
    with redirect_stdout(sys.stderr), ended_by_sigterm(), ray_cluster(None):
        seconds = embed_with_transformers(checkpoint, catalog_uri=catalog_uri, out_uri=out_uri)
    print(json.dumps({"seconds": seconds, "samples": encoding_samples(Path(out_uri))}))


if __name__ == "__main__":
    main()
