"""Samples drawn from real catalogs: whose rows they are, how they are spread, what is refused."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.checkpoint import find_checkpoint
from engine.images import ImageLimits
from engine.preprocess import Preprocessing, decode_pixels
from engine.preprocessor_config import preprocessing_from_config
from engine.sample import Sample
from jobs.demo.run import CHECKPOINT_DIR
from pipelines.catalog import CatalogConfig
from pipelines.decode import RowLimits
from pipelines.errors import CatalogError
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.sampling import MAX_ROW_GROUPS, MIN_HELD_OUT_ROWS, SampleConfig, draw_samples
from pipelines.schema import MODALITIES, Modality
from tests.catalogs import scene_rows, write_rows

NUM_SCENES = 240
NUM_ROWS, NUM_HELD_OUT = 100, 70

Progress = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def preprocessing() -> Preprocessing:
    config = find_checkpoint(str(CHECKPOINT_DIR)).preprocessor_config
    return preprocessing_from_config(config)


@pytest.fixture(scope="module")
def scenes() -> list[dict[str, Any]]:
    return scene_rows(NUM_SCENES)


@pytest.fixture(scope="module")
def scene_catalog(tmp_path_factory: pytest.TempPathFactory, scenes: list[dict[str, Any]]) -> Path:
    return write_rows(tmp_path_factory.mktemp("scenes"), scenes, num_files=3)


def draw(
    catalog: Path | CatalogConfig,
    preprocessing: Preprocessing,
    *,
    modalities: Sequence[Modality] = MODALITIES,
    progress: Progress | None = None,
    **other: Any,
) -> tuple[Sample, Sample]:
    settings = {
        "catalog": CatalogConfig(uri=str(catalog)) if isinstance(catalog, Path) else catalog,
        "num_rows": NUM_ROWS,
        "num_held_out": NUM_HELD_OUT,
    }
    steps: Progress = [] if progress is None else progress
    return draw_samples(
        SampleConfig(**{**settings, **other}),
        preprocessing=preprocessing,
        modalities=modalities,
        on_progress=lambda *step: steps.append(step),
    )


def texts_of(*samples: Sample) -> list[str]:
    return [text for sample in samples for text in sample.texts or ()]


def write_texts(folder: Path, sizes: Sequence[int], *, groups_per_file: int = 50) -> Path:
    """A catalog of texts with row groups of these sizes; each text is `group:row of all`."""
    folder.mkdir()
    layout = pa.schema([("key", pa.int64()), ("text", pa.string())])
    row = 0
    for first in range(0, len(sizes), groups_per_file):
        with pq.ParquetWriter(folder / f"part-{first:05}.parquet", layout) as writer:
            for group, size in enumerate(sizes[first : first + groups_per_file], start=first):
                keys = list(range(row, row + size))
                texts = [f"{group}:{key}" for key in keys]
                writer.write_table(pa.table({"key": keys, "text": texts}, schema=layout))
                row += size
    return folder


def groups_and_rows(*samples: Sample) -> tuple[list[int], list[int]]:
    pairs = [text.split(":") for text in texts_of(*samples)]
    return [int(group) for group, _ in pairs], [int(row) for _, row in pairs]


def test_rows_are_the_catalogs_own_and_in_one_sample_only(
    scene_catalog: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing
) -> None:
    calibration, held_out = draw(scene_catalog, preprocessing)
    assert (calibration.num_rows, held_out.num_rows) == (NUM_ROWS, NUM_HELD_OUT)
    images = {row["text"]: row["image"] for row in scenes}
    assert len(images) == NUM_SCENES
    texts = texts_of(calibration, held_out)
    assert len(set(texts)) == len(texts)
    for sample in (calibration, held_out):
        assert sample.uri == str(scene_catalog)
        assert sample.labels is None
        assert sample.pixels is not None
        assert sample.pixels.dtype == np.uint8
        for text, pixels in zip(sample.texts or (), sample.pixels, strict=True):
            expected = decode_pixels(
                images[text], preprocessing=preprocessing, limits=ImageLimits()
            )
            assert np.array_equal(pixels, expected)


def test_a_seed_draws_the_same_rows_again_and_another_seed_others(
    scene_catalog: Path, preprocessing: Preprocessing
) -> None:
    first, again = (draw(scene_catalog, preprocessing, seed=3) for _ in range(2))
    assert [sample.digest for sample in again] == [sample.digest for sample in first]
    assert texts_of(*again) == texts_of(*first)
    other = draw(scene_catalog, preprocessing, seed=4)
    # By chance 100 of 240 rows share 42.
    for ours, theirs in zip(other, first, strict=True):
        assert len(set(texts_of(ours)) & set(texts_of(theirs))) < 0.7 * ours.num_rows


def test_both_samples_are_drawn_from_all_over(tmp_path: Path, preprocessing: Preprocessing) -> None:
    sizes = [40] * 50  # 2,000 rows in 50 row groups of 5 files
    catalog = write_texts(tmp_path / "catalog", sizes, groups_per_file=10)
    samples = draw(catalog, preprocessing, modalities=("text",), num_rows=200, num_held_out=100)
    for sample in samples:
        groups, rows = groups_and_rows(sample)
        per_file = Counter(group // 10 for group in groups)
        assert set(per_file) == set(range(5))
        assert max(per_file.values()) < 3 * min(per_file.values())
        assert len(set(groups)) > 30
        assert abs(np.mean(rows) - 1000) < 150  # their standard deviation is 577 / sqrt(100)
        assert abs(np.mean([row % 40 for row in rows]) - 19.5) < 4
        assert rows != sorted(rows)


def test_of_many_row_groups_some_are_read(tmp_path: Path, preprocessing: Preprocessing) -> None:
    catalog = write_texts(tmp_path / "catalog", [20] * 300)
    samples = draw(catalog, preprocessing, modalities=("text",), num_rows=200, num_held_out=100)
    assert [sample.num_rows for sample in samples] == [200, 100]
    groups, rows = groups_and_rows(*samples)
    assert len(set(rows)) == 300
    assert MAX_ROW_GROUPS / 2 < len(set(groups)) <= MAX_ROW_GROUPS
    assert set(np.array(groups) // 50) == set(range(6))  # of each file
    assert abs(np.mean(groups) - 150) < 40
    # Calibration and held-out rows come from the same row groups.
    assert len(set(groups_and_rows(samples[0])[0]) & set(groups_and_rows(samples[1])[0])) > 20


def test_a_row_of_a_small_row_group_is_as_likely_as_any_other(
    tmp_path: Path, preprocessing: Preprocessing
) -> None:
    # A tenth of the rows are in small row groups, half of the others in one that is large.
    sizes = [4] * 100 + [20] * 90 + [1800]
    catalog = write_texts(tmp_path / "catalog", sizes)
    shares = []
    for seed in range(6):
        groups, _ = groups_and_rows(
            *draw(
                catalog,
                preprocessing,
                modalities=("text",),
                num_rows=200,
                num_held_out=100,
                seed=seed,
            )
        )
        shares.append([np.mean(np.array(groups) < 100), np.mean(np.array(groups) == 190)])
    small, large = np.mean(shares, axis=0)
    assert 0.05 < small < 0.15
    assert 0.37 < large < 0.53


@pytest.mark.parametrize("size", [1, 3])
def test_many_tiny_row_groups_give_enough_rows(
    tmp_path: Path, preprocessing: Preprocessing, size: int
) -> None:
    catalog = write_texts(tmp_path / "catalog", [size, 0] * 250, groups_per_file=100)
    samples = draw(catalog, preprocessing, modalities=("text",))
    assert [sample.num_rows for sample in samples] == [NUM_ROWS, NUM_HELD_OUT]
    _, rows = groups_and_rows(*samples)
    assert len(set(rows)) == NUM_ROWS + NUM_HELD_OUT
    assert max(rows) > 0.8 * 250 * size


def test_the_whole_of_a_small_catalog(tmp_path: Path, preprocessing: Preprocessing) -> None:
    catalog = write_texts(tmp_path / "catalog", [90, 80])
    samples = draw(catalog, preprocessing, modalities=("text",))
    assert sorted(groups_and_rows(*samples)[1]) == list(range(NUM_ROWS + NUM_HELD_OUT))
    fewer = draw(catalog, preprocessing, modalities=("text",), num_held_out=256)
    assert [sample.num_rows for sample in fewer] == [NUM_ROWS, NUM_HELD_OUT]


def test_rows_without_all_that_the_engine_takes_are_left_out(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing
) -> None:
    rows = [dict(row, kind="scene") for row in scenes]
    faults: Sequence[Mapping[str, Any]] = (
        {"image": b"not an image"},
        {"image": None},
        {"image": b""},
        {"text": ""},
        {"text": " \n"},
        {"text": None},
        {"text": "x" * 60_000},
    )
    for number, row in enumerate(rows):
        if number % 8 == 0:
            row.update(faults[number // 8 % len(faults)])
    good = {row["text"]: row["image"] for number, row in enumerate(rows) if number % 8}
    catalog = write_rows(tmp_path / "catalog", rows, num_files=3)
    samples = draw(catalog, preprocessing, label_column="kind")
    assert [sample.num_rows for sample in samples] == [NUM_ROWS, NUM_HELD_OUT]
    assert set(texts_of(*samples)) <= set(good)
    for sample in samples:
        assert sample.pixels is not None
        expected = decode_pixels(
            good[texts_of(sample)[7]], preprocessing=preprocessing, limits=ImageLimits()
        )
        assert np.array_equal(sample.pixels[7], expected)


@pytest.mark.parametrize("kind", [pa.int32(), pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_labels_are_those_of_the_rows(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing, kind: pa.DataType
) -> None:
    # Classes differ from file to file, so that each has a dictionary of its own.
    rows = [dict(row, kind=number // 50) for number, row in enumerate(scenes)]
    for row in rows:
        row["kind"] = row["kind"] if kind == pa.int32() else str(row["kind"])
    layout = pa.schema(
        [("key", pa.string()), ("image", pa.binary()), ("text", pa.string()), ("kind", kind)]
    )
    catalog = write_rows(tmp_path / "catalog", rows, num_files=3, schema=layout)
    own = {row["text"]: str(row["kind"]) for row in rows}
    for sample in draw(catalog, preprocessing, label_column="kind"):
        assert sample.labels == tuple(own[text] for text in sample.texts or ())
        assert set(sample.labels) == {"0", "1", "2", "3", "4"}


def test_rows_need_not_have_a_label(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing
) -> None:
    rows = [dict(row, kind="red" if number % 9 == 0 else None) for number, row in enumerate(scenes)]
    own = {row["text"]: row["kind"] for row in rows}
    catalog = write_rows(tmp_path / "catalog", rows)
    for sample in draw(catalog, preprocessing, label_column="kind"):
        assert sample.labels == tuple(own[text] for text in sample.texts or ())
        assert set(sample.labels) == {"red", None}


@pytest.mark.parametrize("size", [20, 2000])
def test_further_rows_are_drawn_until_enough_are_usable(
    tmp_path: Path, preprocessing: Preprocessing, size: int
) -> None:
    # A row in 32 has a text: twice the rows that are needed hold eleven.
    num_rows = 8000
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    keys = list(range(num_rows))
    texts = [str(key) if key % 32 == 0 else None for key in keys]
    pq.write_table(
        pa.table({"key": keys, "text": pa.array(texts, pa.string())}),
        catalog / "part.parquet",
        row_group_size=size,
    )
    progress: Progress = []
    samples = draw(catalog, preprocessing, modalities=("text",), progress=progress)
    assert [sample.num_rows for sample in samples] == [NUM_ROWS, NUM_HELD_OUT]
    rows = [int(text) for text in texts_of(*samples)]
    assert len(set(rows)) == NUM_ROWS + NUM_HELD_OUT
    assert set(rows) <= set(range(0, num_rows, 32))
    assert abs(np.mean(rows) - num_rows / 2) < 700
    assert rows != sorted(rows)
    again = draw(catalog, preprocessing, modalities=("text",))
    assert texts_of(*again) == texts_of(*samples)
    # Each round reads rows that none before has read, and says so.
    read = {stage: done for stage, done, _ in progress}
    assert len(read) > 2
    assert sum(read.values()) <= num_rows
    with pytest.raises(CatalogError, match=r"250 usable rows of 8000; 300 to calibrate"):
        draw(catalog, preprocessing, modalities=("text",), num_rows=300)


def test_images_alone(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing
) -> None:
    rows = [{"key": number, "image": row["image"]} for number, row in enumerate(scenes)]
    catalog = write_rows(tmp_path / "catalog", rows, num_files=2)
    for sample in draw(catalog, preprocessing, modalities=("image",)):
        assert sample.texts is None
        assert sample.pixels is not None
        assert sample.pixels.shape == (sample.num_rows, 64, 64, 3)
        assert len(np.unique(sample.pixels, axis=0)) == sample.num_rows


def test_a_text_is_no_fault_where_the_engine_takes_images_alone(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing
) -> None:
    catalog = write_rows(tmp_path / "catalog", [dict(row, text="") for row in scenes])
    assert draw(catalog, preprocessing, modalities=("image",))[1].texts is None


@pytest.mark.parametrize("layout", ["uri", "struct"])
def test_images_that_lie_elsewhere(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing, layout: str
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number, row in enumerate(scenes):
        path = folder / f"{number}.png"
        path.write_bytes(row["image"])
        image = str(path) if layout == "uri" else {"bytes": None, "path": str(path)}
        rows.append({"key": number, "image": image, "text": row["text"]})
    (folder / "7.png").unlink()
    kind = (
        pa.string() if layout == "uri" else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table_schema = pa.schema([("key", pa.int64()), ("image", kind), ("text", pa.string())])
    catalog = write_rows(tmp_path / "catalog", rows, schema=table_schema)
    images = {row["text"]: row["image"] for row in scenes}
    limits = RowLimits(fetch=FetchPolicy(allow=(str(folder),)))
    samples = draw(catalog, preprocessing, limits=limits)
    assert scenes[7]["text"] not in texts_of(*samples)
    assert samples[0].pixels is not None
    expected = decode_pixels(
        images[texts_of(samples[0])[0]], preprocessing=preprocessing, limits=ImageLimits()
    )
    assert np.array_equal(samples[0].pixels[0], expected)


def test_other_column_names(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing
) -> None:
    rows = [{"id": r["key"], "photo": r["image"], "title": r["text"], "text": 1} for r in scenes]
    catalog = write_rows(tmp_path / "catalog", rows)
    config = CatalogConfig(
        uri=str(catalog), key_column="id", image_column="photo", text_column="title"
    )
    calibration, _ = draw(config, preprocessing)
    assert set(texts_of(calibration)) <= {row["title"] for row in rows}


def test_progress_counts_the_rows_read(scene_catalog: Path, preprocessing: Preprocessing) -> None:
    progress: Progress = []
    draw(scene_catalog, preprocessing, progress=progress)
    stages, done, totals = zip(*progress, strict=True)
    assert set(stages) == {"sample"}
    assert len(set(totals)) == 1
    assert done[0] == 0
    assert done[-1] == totals[0] == 240  # all there are: twice the 170 asked for would be more
    assert list(done) == sorted(set(done))


def test_too_few_usable_rows(
    tmp_path: Path, scenes: list[dict[str, Any]], preprocessing: Preprocessing
) -> None:
    rows = scenes[: NUM_ROWS + MIN_HELD_OUT_ROWS]
    catalog = write_rows(tmp_path / "catalog", rows)
    assert draw(catalog, preprocessing)[1].num_rows == MIN_HELD_OUT_ROWS
    broken = [dict(rows[0], image=b"x"), *rows[1:]]
    write_rows(catalog, broken)
    with pytest.raises(CatalogError) as caught:
        draw(catalog, preprocessing)
    text = str(caught.value)
    assert text.startswith(f"catalog {catalog}: 163 usable rows of 164; 100 to cal")
    assert "at least 64 to judge are needed, each with image and text. Name a larger" in text


def test_none_to_calibrate_with(scene_catalog: Path, preprocessing: Preprocessing) -> None:
    calibration, held_out = draw(scene_catalog, preprocessing, num_rows=0)
    assert (calibration.num_rows, held_out.num_rows) == (0, NUM_HELD_OUT)


def test_no_usable_row(tmp_path: Path, preprocessing: Preprocessing) -> None:
    rows = [{"key": number, "image": b"x", "text": "x"} for number in range(200)]
    with pytest.raises(CatalogError, match="0 usable rows of 200;"):
        draw(write_rows(tmp_path / "catalog", rows), preprocessing)


@pytest.mark.parametrize(("there", "missing"), [("image", "text"), ("text", "image")])
def test_a_column_that_the_engine_takes_is_missing(
    tmp_path: Path,
    scenes: list[dict[str, Any]],
    preprocessing: Preprocessing,
    there: str,
    missing: str,
) -> None:
    rows = [{"key": row["key"], there: row[there]} for row in scenes]
    catalog = write_rows(tmp_path / "catalog", rows)
    with pytest.raises(CatalogError, match=rf"has no {missing} column.* --{missing}-column"):
        draw(catalog, preprocessing)


def test_no_such_label_column(scene_catalog: Path, preprocessing: Preprocessing) -> None:
    with pytest.raises(CatalogError, match=r"column 'kind' is missing .*\ncolumns there: image"):
        draw(scene_catalog, preprocessing, label_column="kind")


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"num_rows": -1}, "num_rows=-1: expected at least 0"),
        ({"num_held_out": 63}, "num_held_out=63: expected at least 64"),
    ],
)
def test_settings_out_of_bounds(setting: Mapping[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SampleConfig(catalog=CatalogConfig(uri="catalog"), **setting)
