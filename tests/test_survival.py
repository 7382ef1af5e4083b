"""Runs on a real Ray whose workers die: of rows, of nothing in particular, of their engine."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.catalog import CatalogConfig
from pipelines.decode import RowLimits
from pipelines.embedding import EmbedConfig, EmbedResult, embed
from pipelines.engines import EngineChoice
from pipelines.errors import WorkerDeathError
from pipelines.stages import Resources
from tests.catalogs import scene_rows, stored_embeddings, stored_rows, write_rows
from tests.deadly_stages import DeadEncodeStage, DeadlyEncodeStage, deadly_decode_batch

Run = Callable[[], EmbedResult]
NUM_ROWS = 48


@pytest.fixture
def prepared(
    tmp_path: Path,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
):
    """Takes changes of rows, by number; gives a run of all rows with stages that die."""
    monkeypatch.setattr("pipelines.stages.EncodeStage", DeadlyEncodeStage)
    monkeypatch.setattr("pipelines.stages.decode_batch", deadly_decode_batch)

    def prepare(changes: Mapping[int, Mapping[str, Any]]) -> Run:
        rows = scene_rows(NUM_ROWS)
        for number, change in changes.items():
            rows[number].update(change)
        config = EmbedConfig(
            catalog=CatalogConfig(uri=str(write_rows(tmp_path / "catalog", rows))),
            store_uri=str(tmp_path / "store"),
            engine=EngineChoice(checkpoint=str(checkpoint_dir), engines_uri=str(engines_dir)),
            limits=RowLimits(max_reject_share=1.0),
            resources=Resources(num_encoders=1),
        )
        return lambda: embed(config)

    return prepare


def check_every_key_once(store_dir: Path, *, rejects: Mapping[tuple[str, str], tuple[str, str]]):
    """Args: store_dir; rejects: key and modality -> stage and detail, all of them poison."""
    found = stored_rows(store_dir, kind="rejects")
    assert {(row["key"], row["modality"]): (row["stage"], row["detail"]) for row in found} == (
        rejects
    )
    assert {row["reason"] for row in found} <= {"poison"}
    places = [(row["key"], row["modality"]) for row in [*found, *stored_rows(store_dir)]]
    expected = {(f"k{n:04d}", of) for n in range(NUM_ROWS) for of in ("image", "text")}
    assert set(places) == expected
    assert len(places) == len(expected)


def test_rows_that_kill_encoders_are_poison_and_nothing_else_is(prepared, tmp_path: Path):
    run = prepared({5: {"text": "die"}, 7: {"text": "exit"}})
    result = run()
    assert result.rejects_by_reason == {"poison": 2}
    encode = "a process that encoded it alone"
    check_every_key_once(
        tmp_path / "store",
        rejects={
            ("k0005", "text"): ("encode", f"{encode} was killed by SIGKILL"),
            ("k0007", "text"): ("encode", f"{encode} ended with 7"),
        },
    )
    # Those beside them are what they would be without them.
    twin = stored_embeddings(tmp_path / "store", modality="text")["k0006"]
    assert np.linalg.norm(twin) == pytest.approx(1, abs=1e-5)
    # A reject like others: it is not tried again.
    assert not run().committed


def test_images_that_kill_decoders_are_poison_and_their_texts_are_not(prepared, tmp_path: Path):
    run = prepared({3: {"image": b"die"}, 40: {"image": b"exit"}})
    assert run().rejects_by_reason == {"poison": 2}
    decode = "a process that decoded it alone"
    check_every_key_once(
        tmp_path / "store",
        rejects={
            ("k0003", "image"): ("decode", f"{decode} was killed by SIGKILL"),
            ("k0040", "image"): ("decode", f"{decode} ended with 7"),
        },
    )


def test_deaths_that_happen_once_reject_nothing(prepared, tmp_path: Path):
    image, text = f"once {tmp_path / 'image'}", f"once {tmp_path / 'text'}"
    # The image is none, once it is decoded.
    result = prepared({3: {"image": image.encode()}, 20: {"text": text}})()
    assert (tmp_path / "image").exists()
    assert (tmp_path / "text").exists()
    assert result.rejects_by_reason == {"not_an_image": 1}
    assert result.num_embedded == {"image": NUM_ROWS - 1, "text": NUM_ROWS}


def test_a_gpu_that_is_lost_at_a_row_again_and_again_is_that_rows_fault(prepared, tmp_path: Path):
    prepared({5: {"text": "lose"}})()
    detail = "a process that encoded it alone lost the GPU: no such address on this card"
    check_every_key_once(tmp_path / "store", rejects={("k0005", "text"): ("encode", detail)})


def test_an_encoder_that_never_starts_ends_the_run(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = prepared({})
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.stages.EncodeStage", DeadEncodeStage)
        with pytest.raises(
            WorkerDeathError, match="the encoder cannot be started: its process was killed by SIGK"
        ):
            run()
    assert not (tmp_path / "store/snapshots").exists()
    assert run().committed
