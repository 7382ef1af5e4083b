"""Draws rows of a catalog at random: one sample to calibrate an engine with, one to judge it by.

Knows nothing of engines but the pixels that they take.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.preprocess import Preprocessing
from engine.sample import Sample
from pipelines import schema
from pipelines.catalog import Catalog, CatalogConfig, open_catalog
from pipelines.decode import RowLimits, decode_batch
from pipelines.encode import pixel_array
from pipelines.errors import CatalogError
from pipelines.reading import CatalogDatasource, RowGroupRows
from pipelines.schema import Modality

# A row group is read whole for each row that is wanted of it: rows come from about this many,
# themselves drawn at random, and from more only where these have too few.
MAX_ROW_GROUPS = 64
# Twice as many rows are drawn as needed, since some cannot be decoded or lack a text.
SPARE_SHARE = 1.0
MIN_HELD_OUT_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which rows to draw."""

    catalog: CatalogConfig
    """Where from."""
    num_rows: int = 512
    """To calibrate with."""
    num_held_out: int = 256
    """To judge by; fewer where the catalog has no more, but at least 64."""
    label_column: str | None = None
    """A column that names each row's class, for zero-shot accuracy."""
    seed: int = 0
    """The same seed draws the same rows of the same files."""
    limits: RowLimits = field(default_factory=RowLimits)
    """What a row may cost."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_rows < 1:
            raise ValueError(f"num_rows={self.num_rows}: expected at least 1")
        if self.num_held_out < MIN_HELD_OUT_ROWS:
            raise ValueError(
                f"num_held_out={self.num_held_out}: expected at least {MIN_HELD_OUT_ROWS}"
            )


def draw_samples(
    config: SampleConfig,
    *,
    preprocessing: Preprocessing,
    modalities: Sequence[Modality],
    on_progress: Callable[[str, int, int], None],
) -> tuple[Sample, Sample]:
    """Draw, read and decode rows that have everything the engine takes.

    Args:
        config: Which rows.
        preprocessing: How images become pixels.
        modalities: What the engine takes; a row without one of them is not drawn.
        on_progress: Called with a stage's name, and how many of how many rows are done.

    Returns:
        The sample to calibrate with and the held-out one. They share no row.

    Raises:
        CatalogError: The catalog cannot be read, lacks a column, or has too few usable rows.
    """
    catalog = _open(config, modalities=modalities)
    needed = config.num_rows + config.num_held_out
    rng = np.random.default_rng(config.seed)
    pieces = list(_draw(catalog, num_rows=int(needed * (1 + SPARE_SHARE)) + 1, rng=rng))
    num_drawn = sum(len(piece.rows) for piece in pieces if piece.rows is not None)
    num_read = 0
    parts: list[pa.Table] = []
    for table in _tables(catalog, pieces, modalities=modalities):
        on_progress("sample", num_read, num_drawn)
        parts.append(
            _usable(table, config=config, preprocessing=preprocessing, modalities=modalities)
        )
        num_read += table.num_rows
    on_progress("sample", num_read, num_drawn)
    rows = pa.concat_tables(parts)
    if rows.num_rows < config.num_rows + MIN_HELD_OUT_ROWS:
        raise CatalogError(
            f"catalog {config.catalog.uri}: {rows.num_rows} usable rows of {num_drawn} drawn at "
            f"random; {config.num_rows} to calibrate and at least {MIN_HELD_OUT_ROWS} to judge are "
            f"needed, each with {' and '.join(modalities)}. Name a larger catalog, or one with "
            "fewer rejects"
        )
    shuffled = rows.take(rng.permutation(rows.num_rows))
    calibration = shuffled.slice(0, config.num_rows)
    held_out = shuffled.slice(config.num_rows, config.num_held_out)
    return (
        _sample(calibration, config=config, preprocessing=preprocessing),
        _sample(held_out, config=config, preprocessing=preprocessing),
    )


def _open(config: SampleConfig, *, modalities: Sequence[Modality]) -> Catalog:
    labels = () if config.label_column is None else (config.label_column,)
    chosen = CatalogConfig(
        uri=config.catalog.uri,
        key_column=config.catalog.key_column,
        image_column=config.catalog.image_column,
        text_column=config.catalog.text_column,
        carry_columns=labels,
    )
    catalog = open_catalog(chosen)
    missing = [name for name in modalities if name not in catalog.modalities]
    if missing:
        raise CatalogError(
            f"catalog {config.catalog.uri} has no {' and no '.join(missing)} column, but the "
            f"checkpoint has such a tower, which is calibrated too; name the column with "
            f"{' '.join(f'--{name}-column' for name in missing)}, or calibrate with a catalog that "
            "has one"
        )
    return catalog


def _draw(catalog: Catalog, *, num_rows: int, rng: np.random.Generator) -> Iterator[RowGroupRows]:
    """At least so many rows, or all there are, each as likely as any other."""
    groups = [
        (file.path, number, first_row, size)
        for file in catalog.files
        for number, (first_row, size) in enumerate(
            zip(accumulate(file.row_groups, initial=0), file.row_groups, strict=False)
        )
    ]
    counts = _rows_per_group(
        np.array([size for *_, size in groups], dtype=np.int64), num_rows=num_rows, rng=rng
    )
    for (path, number, first_row, size), count in zip(groups, counts.tolist(), strict=True):
        if count:
            yield RowGroupRows(
                path=path,
                row_group=number,
                first_row=first_row,
                rows=first_row + np.sort(rng.choice(size, count, replace=False)),
                wanted={name: np.ones(count, dtype=np.bool_) for name in catalog.modalities},
            )


def _rows_per_group(
    sizes: NDArray[np.int64], *, num_rows: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """How many rows to draw of each row group."""
    num_rows = min(num_rows, int(sizes.sum()))
    rows = rng.choice(int(sizes.sum()), num_rows, replace=False)
    group_of_row = np.searchsorted(np.cumsum(sizes), rows, side="right")
    # These rows, or the first few of them with others of their row groups in the place of the
    # rest: a group is drawn as often as its size calls for, so that all rows are as likely.
    num_groups = num_rows if len(sizes) <= MAX_ROW_GROUPS else min(MAX_ROW_GROUPS, num_rows)
    while True:
        drawn = np.bincount(group_of_row[:num_groups], minlength=len(sizes))
        counts: NDArray[np.int64] = np.minimum(drawn * -(-num_rows // num_groups), sizes)
        if counts.sum() >= num_rows:
            return counts
        num_groups = min(2 * num_groups, num_rows)  # too small to make up for the rest


def _tables(
    catalog: Catalog, pieces: Sequence[RowGroupRows], *, modalities: Sequence[Modality]
) -> Iterator[pa.Table]:
    source = CatalogDatasource(catalog, pieces=pieces, content=modalities)
    for read in source.get_read_tasks(1):
        yield from read()


def _usable(
    table: pa.Table,
    *,
    config: SampleConfig,
    preprocessing: Preprocessing,
    modalities: Sequence[Modality],
) -> pa.Table:
    """Of a table's rows those that have everything: `pixels`, `text`, and the label column."""
    labels = [] if config.label_column is None else [config.label_column]
    decoded = decode_batch(
        table,
        modalities=modalities,
        preprocessing=preprocessing,
        limits=config.limits,
        carry_columns=(),
    )
    columns = {name: table[name] for name in labels}
    good = pa.array(np.ones(table.num_rows, dtype=np.bool_))
    for name in labels:
        good = pc.and_(good, table[name].is_valid())
    for modality in modalities:
        # The rows of each modality come in the order of the table.
        part = decoded.filter(pc.equal(decoded[schema.MODALITY], modality))
        column = schema.PIXELS if modality == "image" else schema.TEXT
        columns[column] = part[column]
        good = pc.and_(good, part[schema.REASON].is_null())
    return pa.table(columns).filter(good)


def _sample(rows: pa.Table, *, config: SampleConfig, preprocessing: Preprocessing) -> Sample:
    shape = (preprocessing.height, preprocessing.width, 3)
    label = config.label_column
    return Sample(
        uri=config.catalog.uri,
        pixels=(
            pixel_array(rows[schema.PIXELS], shape=shape)
            if schema.PIXELS in rows.column_names
            else None
        ),
        texts=tuple(rows[schema.TEXT].to_pylist()) if schema.TEXT in rows.column_names else None,
        labels=None if label is None else tuple(map(str, rows[label].to_pylist())),
    )
