"""Contents of binary columns: nulls, slices, chunks, and that nothing is copied."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.binary_columns import binary_views, contents, only, pixel_array

SHAPE = (2, 2, 3)


def test_pixels_of_a_column_with_nulls_and_an_offset_come_without_a_copy():
    pictures = [np.full(SHAPE, value, np.uint8) for value in (1, 2, 3)]
    column = pa.chunked_array(
        [
            pa.array(
                [b"x" * 12, *(part for picture in pictures for part in (picture.tobytes(), None))],
                pa.large_binary(),
            )
        ]
    ).slice(1)
    found = pixel_array(column, shape=SHAPE)
    assert np.array_equal(found, np.stack(pictures))
    address = column.chunk(0).buffers()[2].address
    assert found.__array_interface__["data"][0] == address + 12


ROWS = [b"first", None, b"", b"fourth", b"fifth" * 9]


def column(rows: list[bytes | None]) -> pa.Array:
    return pa.array(rows, pa.large_binary())


@pytest.mark.parametrize(
    "rows",
    [
        column(ROWS),
        pa.chunked_array([column(ROWS[:2]), column([]), column(ROWS[2:])]),
        column([b"before", *ROWS, b"after"]).slice(1, len(ROWS)),
    ],
    ids=["one array", "chunks", "a slice"],
)
def test_views_are_the_rows(rows):
    views = binary_views(rows)
    assert [view if view is None else bytes(view) for view in views] == ROWS


@pytest.mark.parametrize("rows", [[], [None, None], [b"", None]], ids=str)
def test_rows_without_a_byte(rows):
    views = binary_views(column(rows))
    assert [view if view is None else bytes(view) for view in views] == rows
    assert binary_views(pa.nulls(2, pa.large_binary())) == [None, None]


def test_views_lie_in_the_column_and_keep_it():
    rows = column(ROWS)
    address = rows.buffers()[2].address
    views = binary_views(rows)
    found = np.frombuffer(views[3], np.uint8).__array_interface__["data"][0]
    assert found == address + len(b"first")
    del rows
    assert bytes(views[4]) == ROWS[4]


@pytest.mark.parametrize("first", [0, 1, 9])
def test_some_rows_of_a_column_without_a_copy(first: int):
    before = [b"before"] * first
    whole = column([*before, *ROWS]).slice(first)
    is_kept = np.array([True, False, True, False, True])
    chunks = [whole.slice(0, 3), whole.slice(3, 0), whole.slice(3)]
    for given in (whole, pa.chunked_array(chunks)):
        found = only(given, is_kept)
        found.validate(full=True)
        assert found.to_pylist() == [ROWS[0], None, ROWS[2], None, ROWS[4]]
        parts = found.chunks if isinstance(found, pa.ChunkedArray) else [found]
        assert {part.buffers()[2].address for part in parts} == {whole.buffers()[2].address}
    assert only(whole, np.zeros(5, dtype=bool)).null_count == 5
    for empty in (column([]), pa.chunked_array([], pa.large_binary())):
        assert len(only(empty, np.zeros(0, dtype=bool))) == 0


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_contents_are_where_the_bounds_say(num_chunks: int):
    rows = [b"first", b"", b"third", b"fourth", b"fifth" * 9, b"sixth"]
    array = column([b"before", *rows, b"after"]).slice(1, len(rows))
    kept = np.array([True, True, False, True, False, True])
    flagged = only(array, kept)
    step = len(rows) // num_chunks
    chunks = [flagged.slice(first, step) for first in range(0, len(rows), step)]
    content, bounds = contents(pa.chunked_array(chunks))
    found = [content[first:last].tobytes() for first, last in bounds.tolist()]
    assert found == [row for row, flag in zip(rows, kept, strict=True) if flag]
    assert bool((np.diff(bounds.reshape(-1)) >= 0).all())
    if num_chunks == 1:
        assert content.ctypes.data == array.buffers()[2].address
