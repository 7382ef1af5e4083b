"""Whole runs on a real Ray: every key once, reasons for the rest, nothing done twice."""

import collections
import dataclasses
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import GateError
from engine.promotion import promote, rollback
from engine.registry import Registry
from pipelines.catalog import CatalogConfig
from pipelines.cluster.placement import Placement
from pipelines.cluster.resources import Resources
from pipelines.counts import Counts
from pipelines.decode import RowLimits
from pipelines.embedding import EmbedConfig, EmbedResult, embed
from pipelines.engines import EngineChoice
from pipelines.errors import (
    CatalogError,
    PipelineError,
    PlacementError,
    StoreError,
    TooManyRejectsError,
)
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.runs.report import make_report
from pipelines.schema import REASONS
from tests import image_files
from tests.calibrated_engines import CalibratedEngines, put_sabotaged_engine
from tests.catalogs import (
    scene_rows,
    stored_embeddings,
    stored_rows,
    stored_snapshot,
    write_rows,
)
from tests.object_store import s3_bucket

ROOT = Path(__file__).resolve().parent.parent

# Tests serve pictures from this machine; what nobody allowed is refused.
FETCH = FetchPolicy(allow=("127.0.0.1", "file:"))


@pytest.fixture
def run(checkpoint_dir: Path, engines_dir: Path, local_ray: None):
    def run_embed(
        catalog_dir: Path,
        store_dir: Path,
        *,
        checkpoint: Path = checkpoint_dir,
        columns: dict | None = None,
        **options,
    ) -> EmbedResult:
        return embed(
            EmbedConfig(
                catalog=CatalogConfig(uri=str(catalog_dir), **(columns or {})),
                store_uri=str(store_dir),
                engine=EngineChoice(checkpoint=str(checkpoint), engines_uri=str(engines_dir)),
                **{"limits": RowLimits(fetch=FETCH), **options},
            )
        )

    return run_embed


@pytest.fixture(scope="module")
def web_server() -> Iterator[str]:
    """Serves one picture at /picture.jpg and nothing else."""
    content = image_files.jpeg()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/picture.jpg"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()
            if found:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_kind_of_row_is_embedded_or_rejected_with_its_reason(
    run, tmp_path: Path, web_server: str
):
    good = {
        "jpeg": image_files.jpeg(),
        "png": image_files.png(),
        "webp": image_files.webp(),
        "bmp": image_files.bmp(),
        "tiff": image_files.tiff(),
        "gif-animated": image_files.animated_gif(),
        "jpeg-cmyk": image_files.cmyk_jpeg(),
        "jpeg-rotated": image_files.exif_rotated_jpeg(6),
        "png-16-bit": image_files.png16((40_000,)),
        "png-palette": image_files.palette_png_with_transparency(),
    }
    bad = {
        "null-image": (None, "null_image"),
        "zero-bytes": (b"", "empty_image"),
        "truncated": (image_files.truncated_jpeg(), "truncated_image"),
        "text-file": (image_files.text_file(), "not_an_image"),
        "bomb": (image_files.png_bomb(), "image_too_large"),
    }
    bad_texts = {
        "null-text": (None, "null_text"),
        "empty-text": ("", "empty_text"),
        "blank-text": (" \n", "empty_text"),
        "long-text": ("a small red circle " * 6_000, "text_too_long"),
    }
    picture = image_files.jpeg()

    def row(key: str | None, content: bytes | None = picture, *, path=None, text="a circle"):
        return {"key": key, "image": {"bytes": content, "path": path}, "text": text}

    rows = [row(key, content) for key, content in good.items()]
    rows += [row(key, content) for key, (content, _) in bad.items()]
    rows += [row(key, text=text) for key, (text, _) in bad_texts.items()]
    rows += [
        row("fetched", None, path=f"{web_server}/picture.jpg"),
        row("not-found", None, path=f"{web_server}/nothing.jpg"),
        row("unreachable", None, path="http://127.0.0.1:9/picture.jpg"),
        row("no-file", None, path=str(tmp_path / "nothing.jpg")),
        row("refused", None, path="http://127.0.0.2:9/picture.jpg"),
        row(None),
        row("jpeg", image_files.png(image_files.flat((0, 0, 255)))),
        row("null-struct"),
    ]
    rows[-1]["image"] = None
    catalog_dir = write_rows(tmp_path / "catalog", rows, num_files=3)
    limits = RowLimits(max_reject_share=1.0, fetch=FETCH)
    result = run(catalog_dir, tmp_path / "store", limits=limits)

    expected = {(key, "image"): reason for key, (_, reason) in bad.items()}
    expected |= {(key, "text"): reason for key, (_, reason) in bad_texts.items()}
    expected |= {
        ("not-found", "image"): "fetch_failed",
        ("unreachable", "image"): "fetch_failed",
        ("no-file", "image"): "fetch_failed",
        ("refused", "image"): "fetch_refused",
        ("null-struct", "image"): "null_image",
        (None, None): "null_key",
        ("jpeg", None): "duplicate_key",
    }
    rejects = stored_rows(tmp_path / "store", kind="rejects")
    assert {(row["key"], row["modality"]): row["reason"] for row in rejects} == expected
    assert len(rejects) == len(expected)
    assert {row["reason"] for row in rejects} <= REASONS
    assert result.rejects_by_reason == collections.Counter(expected.values())

    keys = {row["key"] for row in rows if row["key"] is not None}
    for modality in ("image", "text"):
        embedded = set(stored_embeddings(tmp_path / "store", modality=modality))
        rejected = {key for key, of in expected if of == modality}
        assert embedded | rejected == keys
        assert not embedded & rejected
    # The first row of a key counts: the red picture, not the blue one after it.
    images = stored_embeddings(tmp_path / "store", modality="image")
    assert images["jpeg"] @ images["fetched"] > 0.999
    duplicate = next(row for row in rejects if row["reason"] == "duplicate_key")
    assert duplicate["detail"] == f"first in {catalog_dir / 'part-0.parquet'} row 0"
    assert np.allclose([np.linalg.norm(vector) for vector in images.values()], 1, atol=1e-5)


def test_nights_embed_only_what_changed(run, tmp_path: Path):
    rows = scene_rows(60)
    catalog_dir, store_dir = tmp_path / "catalog", tmp_path / "store"
    first = run(write_rows(catalog_dir, rows, num_files=2), store_dir)
    assert first.num_embedded == {"image": 60, "text": 60}
    before = stored_embeddings(store_dir, modality="image")

    again = run(catalog_dir, store_dir)
    assert not again.committed
    assert again.num_embedded == {"image": 0, "text": 0}
    assert again.snapshot == first.snapshot

    # Upstream rewrites and re-splits everything; two rows differ, one is gone, one is new.
    changed = [dict(row) for row in rows]
    changed[3]["image"] = rows[4]["image"]
    changed[5]["text"] = "three yellow triangles on a white background"
    gone = changed.pop(10)
    changed.append({**gone, "key": "new"})
    third = run(write_rows(catalog_dir, changed[::-1], num_files=3), store_dir)
    # All but one text is there already, under another key.
    assert third.num_embedded == {"image": 0, "text": 1}
    assert third.num_copied == {"image": 2, "text": 1}
    assert third.snapshot.number == 2
    assert third.snapshot.parent == 1
    after = stored_embeddings(store_dir, modality="image")
    assert set(after) == {row["key"] for row in changed}
    assert np.array_equal(after["k0003"], before["k0004"])
    assert np.array_equal(after["k0020"], before["k0020"])
    # The snapshot before is untouched.
    assert [Path(store_dir, file.path).exists() for file in first.snapshot.files] == [True] * 2


def test_a_failed_fetch_is_tried_again_when_asked_for(run, tmp_path: Path):
    late, there = tmp_path / "late.png", tmp_path / "there.png"
    there.write_bytes(image_files.png())
    rows = [{"key": path.stem, "image": str(path)} for path in (late, there)]
    catalog_dir, store_dir = write_rows(tmp_path / "catalog", rows), tmp_path / "store"
    assert run(catalog_dir, store_dir).rejects_by_reason == {"fetch_failed": 1}
    late.write_bytes(image_files.png(image_files.flat((0, 0, 255))))
    assert not run(catalog_dir, store_dir).committed
    night = run(catalog_dir, store_dir, retry=("fetch_failed",))
    assert night.num_embedded == {"image": 1}
    assert night.rejects_by_reason == {}
    assert not run(catalog_dir, store_dir).committed
    with pytest.raises(ValueError, match=r"retry=\['bad_luck'\]: no such reasons"):
        run(catalog_dir, store_dir, retry=("bad_luck",))
    assert set(stored_embeddings(store_dir, modality="image")) == {"late", "there"}


def test_what_is_tried_again_is_not_settled_by_an_earlier_try(run, tmp_path: Path):
    picture = tmp_path / "picture.png"
    rows = [{"key": "a", "image": str(picture)}]
    catalog_dir, store_dir = write_rows(tmp_path / "catalog", rows), tmp_path / "store"
    limits = RowLimits(max_reject_share=1.0, fetch=FETCH)
    assert run(catalog_dir, store_dir, limits=limits).rejects_by_reason == {"fetch_failed": 1}
    picture.write_bytes(b"not an image")
    night = run(catalog_dir, store_dir, limits=limits, retry=("fetch_failed",))
    assert night.rejects_by_reason == {"not_an_image": 1}
    picture.write_bytes(image_files.png())
    # The first reject, of another reason, is still where unfinished runs leave theirs.
    night = run(catalog_dir, store_dir, limits=limits, retry=("not_an_image",))
    assert night.rejects_by_reason == {}
    assert set(stored_embeddings(store_dir, modality="image")) == {"a"}


def test_a_duplicate_steps_in_when_the_first_row_of_its_key_goes(run, tmp_path: Path):
    rows = scene_rows(3)
    twin = {**rows[1], "key": "k0000"}
    catalog_dir, store_dir = tmp_path / "catalog", tmp_path / "store"
    run(write_rows(catalog_dir, [*rows[:2], twin, rows[2]], num_files=2), store_dir)
    (catalog_dir / "part-0.parquet").unlink()
    night = run(catalog_dir, store_dir)
    assert night.num_copied == {"image": 1, "text": 1}
    assert night.num_embedded == {"image": 0, "text": 0}
    images = stored_embeddings(store_dir, modality="image")
    assert set(images) == {"k0000", "k0002"}
    assert not stored_rows(store_dir, kind="rejects")
    lone = tmp_path / "lone"
    run(write_rows(tmp_path / "other", [rows[1]]), lone)
    assert np.allclose(
        images["k0000"], stored_embeddings(lone, modality="image")["k0001"], atol=1e-6
    )


def test_integer_keys_uris_carried_columns_and_half_floats(run, tmp_path: Path, web_server: str):
    rows = [
        {"id": row, "url": f"{web_server}/picture.jpg", "price": 1.5 * row, "v": f"v{row}"}
        for row in range(5)
    ]
    columns = {
        "key_column": "id",
        "image_column": "url",
        "version_column": "v",
        "carry_columns": ("price",),
    }
    catalog_dir, store_dir = write_rows(tmp_path / "catalog", rows), tmp_path / "store"
    run(catalog_dir, store_dir, columns=columns, dtype="float16")
    stored = sorted(stored_rows(store_dir), key=lambda row: row["key"])
    assert [row["key"] for row in stored] == list(range(5))
    assert [row["price"] for row in stored] == [1.5 * row for row in range(5)]
    table = pq.read_table(store_dir / stored_snapshot(store_dir).files[0].path)
    assert table.schema.field("embedding").type.value_type == pa.float16()
    rows[2]["v"] = "v2-new"
    write_rows(catalog_dir, rows)
    night = run(catalog_dir, store_dir, columns=columns, dtype="float16")
    assert night.num_embedded == {"image": 1}


def test_too_many_rejects_stop_the_run_and_keep_its_work(run, tmp_path: Path):
    rows = scene_rows(60)
    for row in rows[:40]:
        row["image"] = b"not an image"
    catalog_dir, store_dir = write_rows(tmp_path / "catalog", rows), tmp_path / "store"
    with pytest.raises(TooManyRejectsError) as stopped:
        run(catalog_dir, store_dir)
    assert "40 of 120 rows rejected: more than 10.0%" in str(stopped.value)
    assert "\n  not_an_image, such as: " in str(stopped.value)
    assert "`embed --retry not_an_image`" in str(stopped.value)
    assert not (store_dir / "snapshots").exists()
    saved = [pq.read_table(path) for path in (store_dir / "rejects").rglob("*.parquet")]
    assert sum(table.num_rows for table in saved) == 40
    # Nothing is left to do, and what stopped it is still there.
    with pytest.raises(TooManyRejectsError, match=r"40 of 120 rows rejected: more than 10\.0%"):
        run(catalog_dir, store_dir)
    with pytest.raises(TooManyRejectsError, match="40 of 120"):
        run(catalog_dir, store_dir, retry=("not_an_image",))
    assert not (store_dir / "snapshots").exists()
    accepted = run(catalog_dir, store_dir, limits=RowLimits(max_reject_share=0.5))
    assert accepted.num_embedded == {"image": 0, "text": 0}
    assert accepted.snapshot.num_rows("embeddings") == 80
    assert accepted.rejects_by_reason == {"not_an_image": 40}
    # Those that were let pass may fail again, and nothing has changed then.
    again = run(catalog_dir, store_dir, retry=("not_an_image",))
    assert again.counts.keys["image"].num_retried == 40
    assert again.num_embedded == {"image": 0, "text": 0}
    assert not again.committed


def test_a_plan_that_is_refused_embeds_nothing(tmp_path, checkpoint_dir, engines_dir, local_ray):
    config = EmbedConfig(
        catalog=CatalogConfig(uri=str(write_rows(tmp_path / "catalog", scene_rows(20)))),
        store_uri=str(tmp_path / "store"),
        engine=EngineChoice(checkpoint=str(checkpoint_dir), engines_uri=str(engines_dir)),
    )
    looked_at = []

    def refuse(counts: Counts, embedding_dim: int) -> None:
        looked_at.append((counts.num_keys, embedding_dim))
        raise PipelineError("refused")

    with pytest.raises(PipelineError, match="refused"):
        embed(config, check_plan=refuse)
    result = embed(config)
    assert looked_at == [(20, result.snapshot.embedding_dim)]
    assert result.counts.keys["image"].num_staged == 0
    # Nothing is left to look at.
    assert not embed(config, check_plan=refuse).committed


def test_a_store_keeps_to_one_model(run, tmp_path: Path, checkpoint_dir: Path):
    catalog_dir, store_dir = write_rows(tmp_path / "catalog", scene_rows(4)), tmp_path / "store"
    first = run(catalog_dir, store_dir)
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = other / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"resample": 3', '"resample": 2'))
    with pytest.raises(StoreError, match=r"holds embeddings of engine .*name another --store"):
        run(catalog_dir, store_dir, checkpoint=other)
    with pytest.raises(StoreError, match="float32 embeddings, float16 was asked for"):
        run(catalog_dir, store_dir, dtype="float16")
    with pytest.raises(StoreError, match="the catalog has"):
        run(catalog_dir, store_dir, columns={"text_column": "none"})
    priced = write_rows(tmp_path / "priced", [{**row, "price": 1} for row in scene_rows(4)])
    with pytest.raises(StoreError, match="carried columns None, price were asked for"):
        run(priced, store_dir, columns={"carry_columns": ("price",)})
    assert stored_snapshot(store_dir) == first.snapshot


def test_a_cluster_without_room_for_the_stages_is_an_error_and_no_wait(run, tmp_path: Path):
    catalog_dir = write_rows(tmp_path / "catalog", scene_rows(2))
    with pytest.raises(ValueError, match=r"num_encoders=500, .* use fewer encoders"):
        run(catalog_dir, tmp_path / "store", resources=Resources(num_encoders=500))


def test_an_encoder_without_a_place_is_told_of_and_ends_the_run(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    # As where an autoscaler may start nodes, and starts none that is large enough.
    monkeypatch.setattr("pipelines.cluster.resources.can_grow", lambda: True)
    monkeypatch.setattr("pipelines.cluster.cluster_state.LOOK_SECONDS", 0.5)
    catalog_dir = write_rows(tmp_path / "catalog", scene_rows(8))
    resources = Resources(
        encoder_cpus=500.0, placement=Placement(warn_seconds=1.0, fail_seconds=8.0)
    )
    with pytest.raises(PlacementError, match=r"an encoder has waited \d+ s for 500 CPU; no node "):
        run(catalog_dir, tmp_path / "store", resources=resources)
    assert "there is no autoscaler; add a node that has as much" in caplog.text


def test_an_empty_catalog_or_an_unwritable_store_stops_before_any_work(run, tmp_path: Path):
    schema = pa.schema({"key": pa.string(), "text": pa.string()})
    empty = write_rows(tmp_path / "empty", [], schema=schema)
    with pytest.raises(CatalogError, match="none has a row"):
        run(empty, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    catalog_dir = write_rows(tmp_path / "catalog", scene_rows(2))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StoreError, match="cannot be written"):
        run(catalog_dir, blocked / "store")


def test_a_file_that_breaks_under_the_run_stops_it_and_a_whole_one_lets_it_finish(
    run, tmp_path: Path
):
    rows = scene_rows(40)
    catalog_dir, store_dir = tmp_path / "catalog", tmp_path / "store"
    write_rows(catalog_dir, rows, num_files=2)
    broken = catalog_dir / "part-1.parquet"
    whole = broken.read_bytes()
    images = pq.read_metadata(broken).row_group(0).column(1)  # the footer stays readable
    start = images.data_page_offset
    broken.write_bytes(whole[:start] + b"\xff" * 1_000 + whole[start + 1_000 :])
    with pytest.raises(CatalogError, match=r"part-1\.parquet: row group \d+ cannot be read"):
        run(catalog_dir, store_dir)
    assert not (store_dir / "snapshots").exists()
    broken.write_bytes(whole)
    assert run(catalog_dir, store_dir).snapshot.num_rows("embeddings") == 80


def test_engines_may_be_kept_on_an_object_store(
    tmp_path: Path, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    catalog_dir = write_rows(tmp_path / "catalog", scene_rows(4))
    with s3_bucket() as bucket:
        command = [sys.executable, "-m", "jobs.embed", "--catalog", str(catalog_dir)]
        command += ["--store", str(tmp_path / "store"), "--checkpoint", str(checkpoint_dir)]
        command += ["--engines", f"{bucket}/engines"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-of-another-node"))
        engine_id = stored_snapshot(tmp_path / "store").engine.engine_id
        copied = Registry(f"{bucket}/engines").find(engine_id)
    assert len(stored_rows(tmp_path / "store")) == 8
    assert copied is not None
    built = next((tmp_path / "cache").rglob("image.onnx"))
    assert built.parent.name == copied.directory.name == engine_id
    assert built.read_bytes() == (copied.directory / "image.onnx").read_bytes()


# Engines that were promoted


@dataclass(frozen=True, kw_only=True)
class ThreeStores:
    """One catalog by engine A, by engine B, and by what was current after a rollback."""

    engines: CalibratedEngines
    registry: Registry
    catalog_dir: Path
    store_dirs: tuple[Path, Path, Path]
    results: tuple[EmbedResult, ...] = ()

    def embed(self, store_dir: Path, **choice) -> EmbedResult:
        """With the checkpoint's current engine, unless another is named."""
        if "engine_id" not in choice:
            choice["checkpoint"] = str(self.engines.checkpoint_dir)
        return embed(
            EmbedConfig(
                catalog=CatalogConfig(uri=str(self.catalog_dir)),
                store_uri=str(store_dir),
                engine=EngineChoice(engines_uri=self.registry.uri, **choice),
            )
        )


@pytest.fixture(scope="module")
def three_stores(
    calibrated_engines: CalibratedEngines,
    local_ray: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> ThreeStores:
    folder = tmp_path_factory.mktemp("rollback")
    registry = Registry(str(folder / "engines"))
    shutil.copytree(calibrated_engines.engines_dir, registry.local.directory)
    made = ThreeStores(
        engines=calibrated_engines,
        registry=registry,
        catalog_dir=write_rows(folder / "catalog", scene_rows(60), num_files=3),
        store_dirs=(folder / "1", folder / "2", folder / "3"),
    )
    first, second, third = made.store_dirs
    promote(registry, calibrated_engines.first_id)
    results = [made.embed(first)]
    promote(registry, calibrated_engines.second_id)
    results.append(made.embed(second))
    rollback(registry, calibrated_engines.digest)
    results.append(made.embed(third))
    return dataclasses.replace(made, results=tuple(results))


def test_the_promoted_engine_and_its_backend_are_on_record(three_stores: ThreeStores):
    engines = three_stores.engines
    expected = (engines.first_id, engines.second_id, engines.first_id)
    for engine_id, store_dir, result in zip(
        expected, three_stores.store_dirs, three_stores.results, strict=True
    ):
        rows = stored_rows(store_dir)
        assert len(rows) == 120
        assert {row["engine_id"] for row in rows} == {engine_id}
        snapshot = stored_snapshot(store_dir)
        assert snapshot.engine.engine_id == engine_id
        assert snapshot.engine.checkpoint == str(engines.checkpoint_dir)
        assert snapshot.backend == "onnxruntime"
        report = make_report(result, catalog_uri="catalog", store_uri=str(store_dir))
        assert (report.engine_id, report.backend) == (engine_id, "onnxruntime")


def by_row(store_dir: Path) -> dict[tuple[str, str], bytes]:
    """Key and modality -> the embedding's bytes."""
    return {
        (row["key"], row["modality"]): np.array(row["embedding"], dtype=np.float32).tobytes()
        for row in stored_rows(store_dir)
    }


def test_a_rollback_brings_the_same_bytes_back(three_stores: ThreeStores):
    first, second, third = map(by_row, three_stores.store_dirs)
    assert len(first) == 120
    assert third == first
    assert second.keys() == first.keys()
    differ = [row for row in first if second[row] != first[row]]
    assert len(differ) > 100, "the engines are not the same"
    for row in first:
        ours, other = (np.frombuffer(rows[row], dtype=np.float32) for rows in (first, second))
        assert ours @ other > 0.98, "of one checkpoint"


def test_a_store_keeps_to_one_engine(three_stores: ThreeStores):
    engines, store_dir = three_stores.engines, three_stores.store_dirs[0]
    before = stored_snapshot(store_dir)
    with pytest.raises(StoreError) as caught:
        three_stores.embed(store_dir, engine_id=engines.second_id)
    for part in (
        f"holds embeddings of engine {engines.first_id} ({engines.checkpoint_dir}), ",
        f"gives {engines.second_id}. They never mix: name another --store",
        "or embed with what this one was made with (--engine ID)",
    ):
        assert part in str(caught.value)
    assert stored_snapshot(store_dir) == before
    # As the message says, whatever is current: here, nothing is left to do.
    again = three_stores.embed(store_dir, engine_id=engines.first_id)
    assert not again.committed
    assert again.num_embedded == {"image": 0, "text": 0}


def test_an_engine_that_failed_its_gate_is_refused_before_any_work(
    three_stores: ThreeStores, tmp_path: Path
):
    engine_id = put_sabotaged_engine(
        three_stores.engines, engines_dir=three_stores.registry.local.directory, folder=tmp_path
    )
    done = three_stores.engines.build(three_stores.registry.local.directory, "--precision", "fp16")
    assert done.code == 1
    with pytest.raises(
        GateError, match=rf"engine {engine_id} failed its gate .* neither promoted nor used"
    ):
        three_stores.embed(tmp_path / "store", engine_id=engine_id)
    with pytest.raises(GateError, match=r"no fp16 engine of .* is promoted; fp8-.*engine build"):
        three_stores.embed(tmp_path / "store", precision="fp16")
    assert not (tmp_path / "store").exists()


def test_a_catalog_whose_keys_are_all_null_empties_no_store(run, tmp_path: Path) -> None:
    rows = scene_rows(3)
    catalog_dir, store_dir = write_rows(tmp_path / "catalog", rows), tmp_path / "store"
    run(catalog_dir, store_dir)
    for path in catalog_dir.iterdir():
        table = pq.read_table(path)
        keys = pa.nulls(table.num_rows, pa.string())
        pq.write_table(table.set_column(table.column_names.index("key"), "key", keys), path)
    with pytest.raises(CatalogError, match=r"none of its 3 rows has a key.*--key-column"):
        run(catalog_dir, store_dir)
    assert stored_snapshot(store_dir).number == 1


def test_a_catalog_is_the_same_however_its_path_is_written(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog_dir, store_dir = write_rows(tmp_path / "catalog", scene_rows(3)), tmp_path / "store"
    monkeypatch.chdir(tmp_path)
    assert run(Path("catalog"), store_dir).committed
    assert stored_snapshot(store_dir).catalog.uri == str(catalog_dir)
    assert not run(catalog_dir, store_dir).committed


@pytest.mark.parametrize("store_uri", ["/data/photos", "/data/photos/vectors"])
def test_a_store_in_its_catalog_is_refused(store_uri: str) -> None:
    with pytest.raises(ValueError, match=r"lies in the catalog /data/photos, .* beside it"):
        EmbedConfig(
            catalog=CatalogConfig(uri="/data/photos"),
            store_uri=store_uri,
            engine=EngineChoice(checkpoint="any"),
        )
