"""Draws rows of a catalog at random: one sample to calibrate an engine with, one to judge it by.

Knows nothing of engines but the pixels that they take.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.preprocess import Preprocessing
from engine.progress import OnProgress
from engine.redaction import public_uri
from engine.sample import Sample
from pipelines import schema
from pipelines.binary_columns import pixel_array
from pipelines.catalog import Catalog, CatalogConfig, check_has_rows, open_catalog
from pipelines.decode import RowLimits, decode_batch
from pipelines.errors import CatalogError
from pipelines.reading import CatalogDatasource, RowGroupRows
from pipelines.schema import Modality

# A row group is read whole for each row that is wanted of it: rows come from about this many,
# themselves drawn at random, and from more only where these have too few.
MAX_ROW_GROUPS = 64
# Twice as many rows are drawn as needed, since some cannot be decoded or lack a text. Where that is
# too few, twice as many again, and so on, but never more at once than numbers fit well in memory.
SPARE_SHARE = 1.0
MAX_ROUND_ROWS = 500_000
MIN_HELD_OUT_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which rows to draw."""

    catalog: CatalogConfig
    """Where from."""
    num_rows: int = 512
    """To calibrate with; none for an engine that is not calibrated."""
    num_held_out: int = 256
    """To judge by; fewer where the catalog has no more, but at least 64."""
    label_column: str | None = None
    """A column that names each row's class, for zero-shot accuracy; rows need not have one."""
    seed: int = 0
    """The same seed draws the same rows of the same files."""
    limits: RowLimits = field(default_factory=RowLimits)
    """What a row may cost."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_rows < 0:
            raise ValueError(f"num_rows={self.num_rows}: expected at least 0")
        if self.num_held_out < MIN_HELD_OUT_ROWS:
            raise ValueError(
                f"num_held_out={self.num_held_out}: expected at least {MIN_HELD_OUT_ROWS}"
            )


def draw_samples(
    config: SampleConfig,
    *,
    preprocessing: Preprocessing,
    modalities: Sequence[Modality],
    on_progress: OnProgress,
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
    draw = _Draw(catalog, seed=config.seed)
    # At most twice the rows needed are held, each with a random number: the lowest stay.
    rows, order = pa.table({}), np.empty(0)
    num_round_rows = int(needed * (1 + SPARE_SHARE)) + 1
    for number in count(1):
        stage = "sample" if number == 1 else f"sample further rows ({number})"
        pieces = draw.further(num_round_rows, rng=rng)
        num_drawn = sum(len(piece.rows) for piece in pieces if piece.rows is not None)
        num_read = 0
        for table in _tables(catalog, pieces, modalities=modalities):
            on_progress(stage, num_read, num_drawn)
            usable = _usable(
                table, config=config, preprocessing=preprocessing, modalities=modalities
            )
            rows = pa.concat_tables([rows, usable]) if rows.num_rows else usable
            order = np.append(order, rng.random(usable.num_rows))
            if rows.num_rows > 2 * needed:
                rows, order = _lowest(rows, order, num_rows=needed)
            num_read += table.num_rows
        on_progress(stage, num_read, num_drawn)
        if rows.num_rows >= needed or draw.is_exhausted:
            break
        num_round_rows = min(2 * num_round_rows, MAX_ROUND_ROWS)
    if rows.num_rows < config.num_rows + MIN_HELD_OUT_ROWS:
        raise CatalogError(
            f"catalog {config.catalog.uri}: {rows.num_rows} usable rows of {draw.num_rows}; "
            f"{config.num_rows} to calibrate and at least {MIN_HELD_OUT_ROWS} to judge are "
            f"needed, each with {' and '.join(modalities)}. Name a larger catalog, or one with "
            "fewer rejects"
        )
    rows, _ = _lowest(rows, order, num_rows=needed)
    calibration = rows.slice(0, config.num_rows)
    held_out = rows.slice(config.num_rows)
    return (
        _sample(calibration, config=config, preprocessing=preprocessing),
        _sample(held_out, config=config, preprocessing=preprocessing),
    )


def _lowest(
    rows: pa.Table, order: NDArray[np.float64], *, num_rows: int
) -> tuple[pa.Table, NDArray[np.float64]]:
    """The rows with the lowest numbers, in the order of those."""
    places = np.argsort(order, kind="stable")[:num_rows]
    return rows.take(places), order[places]


def _open(config: SampleConfig, *, modalities: Sequence[Modality]) -> Catalog:
    labels = () if config.label_column is None else (config.label_column,)
    catalog = open_catalog(replace(config.catalog, version_column=None, carry_columns=labels))
    check_has_rows(catalog)
    missing = [name for name in modalities if name not in catalog.modalities]
    if missing:
        raise CatalogError(
            f"catalog {config.catalog.uri} has no {' and no '.join(missing)} column, but the "
            f"checkpoint has such a tower, which is calibrated too; name the column with "
            f"{' '.join(f'--{name}-column' for name in missing)}, or calibrate with a catalog that "
            "has one"
        )
    return catalog


class _Draw:
    """Draws rows of a catalog at random, none twice."""

    def __init__(self, catalog: Catalog, *, seed: int) -> None:
        self._seed = seed
        self._modalities = catalog.modalities
        self._groups = [
            (file.path, number, first_row)
            for file in catalog.files
            for number, first_row in zip(
                range(len(file.row_groups)), accumulate(file.row_groups, initial=0), strict=False
            )
        ]
        self._sizes = np.array([size for file in catalog.files for size in file.row_groups], int)
        self._num_drawn = np.zeros_like(self._sizes)

    @property
    def num_rows(self) -> int:
        """Rows drawn so far."""
        return int(self._num_drawn.sum())

    @property
    def is_exhausted(self) -> bool:
        """Whether every row of the catalog was drawn."""
        return self.num_rows == int(self._sizes.sum())

    def further(self, num_rows: int, *, rng: np.random.Generator) -> list[RowGroupRows]:
        """At least so many rows, or all that are left, each as likely as any other."""
        counts = _rows_per_group(self._sizes - self._num_drawn, num_rows=num_rows, rng=rng)
        pieces = []
        for place in np.flatnonzero(counts).tolist():
            path, number, first_row = self._groups[place]
            # A row group's rows have one random order, of which each draw takes the next part.
            shuffled = np.random.default_rng([self._seed, place]).permutation(self._sizes[place])
            drawn = self._num_drawn[place]
            pieces.append(
                RowGroupRows(
                    path=path,
                    row_group=number,
                    first_row=first_row,
                    rows=first_row + np.sort(shuffled[drawn : drawn + counts[place]]),
                    wanted={name: np.ones(counts[place], np.bool_) for name in self._modalities},
                )
            )
        self._num_drawn += counts
        return pieces


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
    """Of a table's rows those that have all modalities: `pixels`, `text`, and the label column."""
    labels = [] if config.label_column is None else [config.label_column]
    found: dict[str, Any] = {}
    # Texts first, which cost nothing: images of rows without one need not be decoded.
    for modality in sorted(modalities, reverse=True):
        decoded = decode_batch(
            table,
            modalities=(modality,),
            preprocessing=preprocessing,
            limits=config.limits.beside(config.catalog.uri),
            carry_columns=(),
        )
        good = decoded[schema.REASON].is_null()
        table = table.filter(good)
        found = {name: column.filter(good) for name, column in found.items()}
        column = schema.PIXELS if modality == "image" else schema.TEXT
        found[column] = decoded[column].filter(good)
    return pa.table({**{name: table[name] for name in labels}, **found})


def _sample(rows: pa.Table, *, config: SampleConfig, preprocessing: Preprocessing) -> Sample:
    shape = (preprocessing.height, preprocessing.width, 3)
    label = config.label_column
    return Sample(
        uri=public_uri(config.catalog.uri),
        pixels=(
            pixel_array(rows[schema.PIXELS], shape=shape)
            if schema.PIXELS in rows.column_names
            else None
        ),
        texts=tuple(rows[schema.TEXT].to_pylist()) if schema.TEXT in rows.column_names else None,
        labels=(
            None
            if label is None
            else tuple(None if name is None else str(name) for name in rows[label].to_pylist())
        ),
    )
