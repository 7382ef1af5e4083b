"""Runs on a real Ray whose workers die: of rows, of nothing in particular, of their engine."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from engine.images import ImageLimits
from engine.preprocess import Preprocessing
from pipelines.catalog import CatalogConfig
from pipelines.decode import RowLimits, decode_batch
from pipelines.embedding import EmbedConfig, EmbedResult, embed
from pipelines.engines import EngineChoice
from pipelines.errors import WorkerDeathError
from pipelines.progress import ProgressBoard, StageMeter
from pipelines.resilience import survival
from pipelines.resilience.controls import rows_to_encode
from pipelines.schema import GEOMETRY_TYPE
from pipelines.stages import Resources
from tests import image_files
from tests.catalogs import scene_rows, stored_embeddings, stored_rows, write_rows
from tests.deadly import DEADLY_SIGNAL
from tests.deadly_stages import (
    VECTOR_TYPE,
    BrokenEncodeStage,
    DeadEncodeStage,
    DeadlyEncodeStage,
    LightActor,
    LightStage,
    deadly_decode_batch,
)
from tests.meters import ListMeter
from tests.waiting import wait_until

Run = Callable[[], EmbedResult]
NUM_ROWS = 48
PREPROCESSING = Preprocessing(
    height=8, width=8, resize=8, crop=(8, 8), resample=3, mean=(0, 0, 0), std=(1, 1, 1)
)
ACTOR_OPTIONS = {
    "load": LightStage,
    "control": partial(
        rows_to_encode, modalities=("text",), preprocessing=PREPROCESSING, decoder="cpu"
    ),
    "max_bytes": 2**30,
    "type_": VECTOR_TYPE,
}


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
            ("k0005", "text"): ("encode", f"{encode} was killed by {DEADLY_SIGNAL.name}"),
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
            ("k0003", "image"): ("decode", f"{decode} was killed by {DEADLY_SIGNAL.name}"),
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


def test_an_encoder_that_dies_of_harmless_rows_too_ends_the_run_and_rejects_none(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = prepared({})
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.stages.EncodeStage", BrokenEncodeStage)
        with pytest.raises(
            WorkerDeathError, match="the encoder does not survive rows that are harmless: its proc"
        ):
            run()
    assert not (tmp_path / "store/snapshots").exists()
    assert run().rejects_by_reason == {}


def decoded_texts(texts: Sequence[str], *, encoded: Sequence[bytes | None] | None = None):
    """Rows as the decode stage passes them on."""
    num_rows = len(texts)
    return pa.table(
        {
            "key": [f"k{row}" for row in range(num_rows)],
            "modality": ["text"] * num_rows,
            "pixels": pa.nulls(num_rows, pa.large_binary()),
            "encoded": pa.array(encoded or [None] * num_rows, pa.large_binary()),
            "geometry": pa.nulls(num_rows, GEOMETRY_TYPE),
            "text": texts,
            **{name: pa.nulls(num_rows, pa.string()) for name in ("stage", "reason", "detail")},
        }
    )


def wait_for_deaths(log: Path, actor: Any) -> None:
    """Until a row was the end of two workers, and the next is there."""

    def is_over() -> bool:
        pids = log.read_text().split() if log.exists() else []
        return len(pids) >= 2 and str(ray.get(actor.pid.remote())) not in pids

    wait_until(is_over, every=0.05)


def test_a_batch_does_not_answer_for_what_others_do_to_its_worker(local_ray: None, tmp_path: Path):
    """It is done beside three that kill, one after the other: more deaths than one batch may."""
    board = ProgressBoard.remote()
    meters = {name: StageMeter(board, stage="encode") for name in ("meter", "decode_meter")}
    options = {"num_cpus": 0.5, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 6}
    actor = ray.remote(**options)(LightActor).remote(**ACTOR_OPTIONS, **meters)
    slow = actor.encode.remote(decoded_texts(["slow", "a"]))
    deadly = []
    for number in range(3):
        log = tmp_path / f"deaths{number}"
        deadly.append(actor.encode.remote(decoded_texts([f"die {log}", "b"])))
        wait_for_deaths(log, actor)
    assert ray.get(slow)["reason"].to_pylist() == [None, None]
    for reference in deadly:
        assert ray.get(reference)["reason"].to_pylist() == ["poison", None]
    ray.kill(actor)
    ray.kill(board)


@pytest.mark.parametrize(
    ("memory_bytes", "expected"),
    [
        (8_000_000_000, 2_000_000_000),
        # 2 GiB, and twice 17 bytes for each of 100 million pixels.
        (64_000_000_000, 5_547_483_648),
    ],
)
def test_what_a_row_may_take_is_a_share_of_a_small_machine(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int, expected: int
):
    monkeypatch.setattr(survival, "get_system_memory", lambda: memory_bytes)
    limits = RowLimits(image=ImageLimits(max_image_pixels=100_000_000))
    assert survival.row_bytes_here(limits.max_row_bytes) == expected


@pytest.fixture
def suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a task that was begun again and again, without Ray."""
    monkeypatch.setattr(survival, "is_suspect", lambda: True)
    monkeypatch.setattr(survival, "was_restarted", lambda: False)
    monkeypatch.setattr(survival, "attempted", lambda work, *, meter: nullcontext())


def test_encoded_rows_keep_their_order_and_are_counted_once(suspected: None, tmp_path: Path):
    meter, decode_meter = ListMeter(), ListMeter()
    actor = LightActor(**ACTOR_OPTIONS, meter=meter, decode_meter=decode_meter)  # type: ignore[arg-type]
    texts = [f"die {tmp_path / 'log'}", "a", "b", f"die {tmp_path / 'log'}", "c"]
    table = decoded_texts(texts, encoded=[None, b"x", b"x", None, None])
    done = actor(table)
    assert done["key"].to_pylist() == table["key"].to_pylist()
    assert done["reason"].to_pylist() == ["poison", None, None, "poison", None]
    assert done["embedding"].is_valid().to_pylist() == [False, True, True, False, True]
    assert ([rows for rows, _ in meter.batches], decode_meter.batches) == ([5], [(2, 0)])
    assert meter.added == {("clipmill_encoded_rows_total", "text"): 3}


def test_decoded_rows_keep_their_order(suspected: None, monkeypatch: pytest.MonkeyPatch):
    """Of a small machine, where a row may take less than elsewhere."""
    monkeypatch.setattr(survival, "get_system_memory", lambda: 2**31)
    photo = image_files.png()
    images = [b"die", photo, None, b"fill", photo]
    table = pa.table(
        {
            "key": list(range(5)),
            "image": pa.array(images, pa.large_binary()),
            "image_uri": pa.nulls(5, pa.binary()),
            "text": pa.array([b"a", None, b"c", b"d", b"e"], pa.binary()),
            "source_file": ["a.parquet"] * 5,
            "source_row": list(range(5)),
            "image_wanted": [True, True, True, True, False],
            "text_wanted": [True] * 5,
        }
    )
    options = {
        "modalities": ("image", "text"),
        "preprocessing": PREPROCESSING,
        "limits": RowLimits(),
        "carry_columns": (),
    }
    meter = ListMeter()
    done = survival.decode_task(
        table,
        decode=partial(deadly_decode_batch, **options),
        modalities=("image", "text"),
        carry_columns=(),
        max_bytes=2**30,
        meter=meter,  # type: ignore[arg-type]
    )
    # As of images that are none, but for the reason.
    undisturbed = decode_batch(table, **options)
    same = ["key", "modality", "pixels", "text", "fingerprint", "source_row"]
    assert done.select(same).equals(undisturbed.select(same))
    assert done["reason"].to_pylist() == [
        *("poison", None, "null_image", "poison"),
        *(None, "null_text", None, None, None),
    ]
    detail = done["detail"][3].as_py()
    assert re.search(r"alone took [\d,]+ MiB of memory, above 512$", detail)
    assert [rows for rows, _ in meter.batches] == [9]
