"""Tests of pipelines/arrow_files.py: files whose types or values are pickles of Ray Data."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUSTING = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
)


def test_no_pickle_of_a_file_is_loaded_even_where_all_files_are_trusted(tmp_path: Path):
    """By Ray's word, in the environment; pyarrow alone, with Ray Data there, springs each trap."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.trusting", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **dict.fromkeys(TRUSTING, "1")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["controls"] == ["type", "value", "arrow value"]
    assert found["sprung"] == []
    assert set(found["refusals"]) == {"parquet", "table", "columns", "arrow", "stream", "catalog"}
    for name, said in found["refusals"].items():
        assert "a column's type is described by a pickle" in said, name
    assert found["values"] == ["bytes"] * 3
