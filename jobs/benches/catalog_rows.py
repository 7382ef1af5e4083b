"""Reads the rows of a catalog that a benchmark works on.

Knows nothing of what is measured.
"""

from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa

from pipelines.catalog import CatalogConfig, check_has_rows, open_catalog
from pipelines.errors import CatalogError
from pipelines.reading import CatalogDatasource, all_rows
from pipelines.schema import Modality


def first_rows(catalog_uri: str, *, modalities: Sequence[Modality], num_rows: int) -> pa.Table:
    """The first rows that have all of some modalities.

    Args:
        catalog_uri: With their bytes, not URIs.
        modalities: Columns of the result: image large_binary, text binary.
        num_rows: At most.

    Raises:
        CatalogError: The catalog lacks such a column or such rows.
    """
    catalog = open_catalog(CatalogConfig(uri=catalog_uri))
    check_has_rows(catalog)
    pieces = all_rows(catalog, paths=[file.path for file in catalog.files])
    absent = [name for name in modalities if name not in catalog.modalities]
    if absent:
        raise CatalogError(f"catalog {catalog_uri}: has no {' or '.join(absent)} column")
    source = CatalogDatasource(catalog, pieces=pieces, content=modalities)
    tables: list[pa.Table] = []
    for read in source.get_read_tasks(1):
        # Images that would have to be fetched are null too.
        tables += [table.select(modalities).drop_null() for table in cast("Any", read())]
        if sum(table.num_rows for table in tables) >= num_rows:
            break
    if not any(table.num_rows for table in tables):
        raise CatalogError(f"catalog {catalog_uri}: no row has {' and '.join(modalities)} bytes")
    return pa.concat_tables(tables).slice(0, num_rows)
