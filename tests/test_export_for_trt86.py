"""The folder for the check on a GPU machine, as ONNX Runtime sees it."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.manifest import read_manifest, verify_files
from tests import export_for_trt86


def test_the_folder_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_for_trt86, "MAX_PIXELS_BYTES", 200_000)
    folder = tmp_path / "folder"
    export_for_trt86.main("demo", folder)
    engine_dir = folder / "engine"
    manifest = read_manifest(engine_dir)
    verify_files(manifest.files, directory=engine_dir)
    assert manifest.precision == "fp16"
    for name in ("image.onnx", "text.onnx"):
        model = onnx.load(engine_dir / name)
        assert model.opset_import[0].version == 17
        assert "Gelu" not in {node.op_type for node in model.graph.node}
    encoder = OnnxCpuEncoder(engine_dir, num_threads=1)
    texts = json.loads((folder / "texts.json").read_text())
    for found, expected in (
        (encoder.encode_images(np.load(folder / "pixels.npy")), np.load(folder / "images.npy")),
        (encoder.encode_texts(texts), np.load(folder / "texts.npy")),
    ):
        assert len(found) == 16
        assert np.einsum("nd,nd->n", found, expected).min() > 0.999
