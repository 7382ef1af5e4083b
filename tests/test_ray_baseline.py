"""The pipeline that Clipmill is timed against does the same work: its embeddings say so."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.images import ImageLimits
from engine.preprocess import decode_pixels
from engine.registry import Registry
from jobs.benches.ray_baseline import CPU_BATCH_ROWS, embed_with_transformers, encoding_samples
from tests.catalogs import scene_rows, write_rows


def test_every_row_has_the_embeddings_of_the_engine(
    tmp_path: Path, checkpoint_dir: Path, engines_dir: Path, local_ray: None
) -> None:
    rows = scene_rows(3 * CPU_BATCH_ROWS)  # a block for each process, or Ray warns
    catalog_dir = write_rows(tmp_path / "catalog", rows, num_files=2)
    seconds = embed_with_transformers(
        str(checkpoint_dir), catalog_uri=str(catalog_dir), out_uri=str(tmp_path / "out")
    )
    samples = encoding_samples(tmp_path / "out")
    assert samples[0] == (0, 2 * CPU_BATCH_ROWS)  # an image and a text each
    assert 0 < samples[-1][0] < seconds
    assert samples[-1][1] == 2 * len(rows)
    found = {row["key"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert found.keys() == {row["key"] for row in rows}
    engine = load_or_build(
        find_checkpoint(str(checkpoint_dir)), registry=Registry(str(engines_dir))
    )
    encoder = OnnxCpuEncoder(engine.directory, num_threads=1)
    pixels = np.stack(
        [
            decode_pixels(
                row["image"], preprocessing=engine.manifest.preprocessing, limits=ImageLimits()
            )
            for row in rows
        ]
    )
    for column, expected in (
        ("image", encoder.encode_images(pixels)),
        ("text", encoder.encode_texts([row["text"] for row in rows])),
    ):
        stored = np.array([found[row["key"]][column] for row in rows], dtype=np.float32)
        assert np.einsum("nd,nd->n", stored, expected).min() > 0.9999
