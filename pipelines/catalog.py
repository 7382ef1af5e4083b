"""Opens a catalog: lists its Parquet files and checks their schemas before any work.

Knows nothing of what is done with the rows, nor of earlier runs.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from engine.publishing.file_systems import (
    file_system_errors,
    find_files,
    open_file_system,
    open_parts,
)
from pipelines import schema
from pipelines.arrow_files import open_parquet
from pipelines.catalog_columns import (
    ImageLayout,
    SchemaCheck,
    any_type,
    image_layout,
    key_type,
    text_type,
    version_kind,
)
from pipelines.errors import CatalogError
from pipelines.schema import MODALITIES, Modality

NO_COLUMN = "none"
# What file systems call that which changes with a file's content: hashes, then times of writing.
# Stores hold the first one found: in another order all files would count as changed.
_STAMPS = (
    *("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "Last-Modified"),
    *("modificationTime", "modify", "last_modified", "last_write_time", "updated", "created"),
)
FOOTER_THREADS = 16  # footers are small; the wait is the object store's


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogConfig:
    """Which catalog, and what its columns are called."""

    uri: str
    """A Parquet file, or a folder of them, at any fsspec URI."""
    key_column: str = "key"
    """String or integer, unique; the item's own id."""
    image_column: str | None = None
    """Binary, struct{bytes, path} or a URI string. None: `image`, if there is one; "none": no
    images."""
    text_column: str | None = None
    """String. None: `text`, if there is one; "none": no texts."""
    version_column: str | None = None
    """If named, a row counts as changed when this changes, and its content is not read to see."""
    carry_columns: tuple[str, ...] = ()
    """Columns passed through to the embeddings under their own names."""

    def __post_init__(self) -> None:
        """Check what can be checked without the catalog."""
        if not self.uri:
            raise ValueError("catalog uri is empty; name a Parquet file or folder")
        for name in self.carry_columns:
            if name in schema.RESERVED:
                raise ValueError(
                    f"carry column {name!r}: embeddings or the stages before them have columns "
                    f"named {', '.join(sorted(schema.RESERVED))} of their own; carry a copy under "
                    "another name"
                )
        if len(set(self.carry_columns)) != len(self.carry_columns):
            raise ValueError(f"carry columns {list(self.carry_columns)}: named twice")


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogFile:
    """One Parquet file, as its footer and its file system describe it."""

    path: str
    """As the file system knows it."""
    identity: str
    """Changes whenever the content does: size with the store's ETag or the modification time."""
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    num_bytes: int
    """Size of the file."""

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_groups)


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """A catalog whose schema is known to be right."""

    config: CatalogConfig
    """As it was asked for."""
    fs: Any
    """The fsspec file system of the files."""
    root: str
    """The folder (or file) as the file system knows it."""
    files: tuple[CatalogFile, ...]
    """In the order of their paths."""
    key_type: pa.DataType
    """string or int64."""
    image_column: str | None
    """None if the rows have no image."""
    image_layout: ImageLayout | None
    """None if the rows have no image."""
    text_column: str | None
    """None if the rows have no text."""
    carried: tuple[pa.Field, ...]
    """Fields of the columns that are passed through."""

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(file.num_rows for file in self.files)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What a row holds."""
        columns = {"image": self.image_column, "text": self.text_column}
        return tuple(modality for modality in MODALITIES if columns[modality] is not None)


def open_catalog(config: CatalogConfig) -> Catalog:
    """List a catalog's files, read their footers and check their columns.

    Raises:
        CatalogError: The catalog cannot be read, has no files, or its columns have faults; all
            faults are named at once, with the columns that are there.
    """
    fs, root = _file_system(config.uri)
    infos = _list_files(config.uri, fs=fs, root=root)
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        footers = list(threads.map(lambda info: _read_footer(fs, info["name"]), infos))
    files = tuple(
        CatalogFile(
            path=info["name"],
            identity=_identity(info, fs=fs),
            row_groups=footer.row_groups,
            num_bytes=info["size"],
        )
        for info, footer in zip(infos, footers, strict=True)
    )
    schemas = {info["name"]: footer.columns for info, footer in zip(infos, footers, strict=True)}
    check = SchemaCheck(schemas)
    key = check.column("key", config.key_column, key_type, "a string or an integer")
    image_column = _named_or_default(config.image_column, "image", schemas)
    text_column = _named_or_default(config.text_column, "text", schemas)
    layout = image_column and check.column(
        "image", image_column, image_layout, "binary, struct{bytes, path} or a URI string"
    )
    if text_column:
        check.column("text", text_column, text_type, "a string")
    if config.version_column:
        check.column("version", config.version_column, version_kind, "a string, number or time")
    if image_column is None and text_column is None:
        check.fault("no column 'image' or 'text'; name yours with --image-column, --text-column")
    carried = [check.column("carried", name, any_type, "") for name in config.carry_columns]
    check.finish(config.uri)
    return Catalog(
        config=config,
        fs=fs,
        root=root,
        files=files,
        key_type=key,
        image_column=image_column,
        image_layout=layout or None,
        text_column=text_column,
        carried=tuple(
            pa.field(name, kind) for name, kind in zip(config.carry_columns, carried, strict=True)
        ),
    )


def check_has_rows(catalog: Catalog) -> None:
    """Raise CatalogError for a catalog of files without rows."""
    if not catalog.num_rows:
        raise CatalogError(
            f"catalog {catalog.config.uri}: {len(catalog.files)} Parquet files, none has a row"
        )


def check_has_keys(catalog: Catalog, *, num_keys: int) -> None:
    """Raise CatalogError for a catalog whose rows have no key."""
    if not num_keys:
        raise CatalogError(
            f"catalog {catalog.config.uri}: none of its {catalog.num_rows} rows has a key, column "
            f"{catalog.config.key_column!r} is null in all; name another with --key-column"
        )


def _file_system(uri: str) -> tuple[Any, str]:
    try:
        return open_file_system(uri)
    except (ValueError, ImportError) as error:
        raise CatalogError(f"catalog {uri}: {error}") from error


def _list_files(uri: str, *, fs: Any, root: str) -> list[dict[str, Any]]:
    def described(path: str) -> dict[str, Any]:
        # Over HTTP a listing has not even sizes.
        info = found[path] if _stamp(found[path]) is not None else fs.info(path)
        return {**info, "name": path}

    try:
        found = find_files(fs, root)
        # Names that begin with _ or . are other programs' markers and unfinished files.
        paths = [
            path
            for path in sorted(found)
            if path.endswith((".parquet", ".pq"))
            and not any(part[:1] in "_." for part in path[len(root) :].split("/") if part)
        ]
        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            infos = list(threads.map(described, paths))
    except file_system_errors() as error:
        raise CatalogError(f"catalog {uri}: cannot be listed: {error}") from error
    if not infos:
        raise CatalogError(f"catalog {uri}: no .parquet file there")
    return infos


def _stamp(info: dict[str, Any]) -> Any:
    return next((info[name] for name in _STAMPS if info.get(name) is not None), None)


def _identity(info: dict[str, Any], *, fs: Any) -> str:
    stamp = _stamp(info)
    if stamp is None:
        protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        raise CatalogError(
            f"{info['name']}: its file system ({protocol}) tells neither an ETag nor when the file "
            "was written, so that nobody can tell whether it was changed; copy the catalog to a "
            "disk or an object store"
        )
    return f"{info['size']}-{stamp}"


class _Footer(NamedTuple):
    """What stays of a footer: of statistics, each column of each row group has a kilobyte."""

    row_groups: tuple[int, ...]
    columns: pa.Schema


def _read_footer(fs: Any, path: str) -> _Footer:
    try:
        with open_parts(fs, path) as file:
            parquet = open_parquet(file)
            footer = parquet.metadata
            return _Footer(
                row_groups=tuple(
                    footer.row_group(group).num_rows for group in range(footer.num_row_groups)
                ),
                # Not `footer.schema`: the two would keep each other until garbage is collected.
                columns=parquet.schema_arrow,
            )
    except (pa.ArrowException, *file_system_errors()) as error:
        raise CatalogError(
            f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}); write it again or "
            "remove it"
        ) from error


def _named_or_default(named: str | None, default: str, schemas: dict[str, pa.Schema]) -> str | None:
    if named is not None:
        return None if named == NO_COLUMN else named
    return default if any(default in names.names for names in schemas.values()) else None
