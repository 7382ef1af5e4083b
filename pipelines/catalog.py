"""Opens a catalog: lists its Parquet files and checks their schemas before any work.

Knows nothing of what is done with the rows, nor of earlier runs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.publishing.file_systems import file_system_errors, open_file_system, open_parts
from pipelines import schema
from pipelines.errors import CatalogError
from pipelines.schema import MODALITIES, Modality

NO_COLUMN = "none"
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
                    f"carry column {name!r}: the name is one of the embeddings' own columns; "
                    "rename it in the catalog"
                )
        if len(set(self.carry_columns)) != len(self.carry_columns):
            raise ValueError(f"carry columns {list(self.carry_columns)}: named twice")


class ImageLayout(StrEnum):
    """How a catalog holds its images."""

    BYTES = "bytes"
    STRUCT = "struct"
    URI = "uri"


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
            identity=_identity(info),
            row_groups=tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups)),
            num_bytes=info["size"],
        )
        for info, footer in zip(infos, footers, strict=True)
    )
    schemas = {
        info["name"]: footer.schema.to_arrow_schema()
        for info, footer in zip(infos, footers, strict=True)
    }
    check = _SchemaCheck(schemas)
    key_type = check.column("key", config.key_column, _key_type, "a string or an integer")
    image_column = _named_or_default(config.image_column, "image", schemas)
    text_column = _named_or_default(config.text_column, "text", schemas)
    image_layout = image_column and check.column(
        "image", image_column, _image_layout, "binary, struct{bytes, path} or a URI string"
    )
    if text_column:
        check.column("text", text_column, _text_type, "a string")
    if config.version_column:
        check.column("version", config.version_column, _scalar_type, "a string, number or time")
    if image_column is None and text_column is None:
        check.fault("no column 'image' or 'text'; name yours with --image-column, --text-column")
    carried = [check.column("carried", name, _any_type, "") for name in config.carry_columns]
    check.finish(config.uri)
    return Catalog(
        config=config,
        fs=fs,
        root=root,
        files=files,
        key_type=key_type,
        image_column=image_column,
        image_layout=image_layout or None,
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


def _file_system(uri: str) -> tuple[Any, str]:
    try:
        return open_file_system(uri)
    except (ValueError, ImportError) as error:
        raise CatalogError(f"catalog {uri}: {error}") from error


def _list_files(uri: str, *, fs: Any, root: str) -> list[dict[str, Any]]:
    try:
        found = fs.find(root, detail=True)
    except file_system_errors() as error:
        raise CatalogError(f"catalog {uri}: cannot be listed: {error}") from error
    # Names that begin with _ or . are other programs' markers and unfinished files.
    infos = [
        info
        for path, info in sorted(found.items())
        if path.endswith((".parquet", ".pq"))
        and not any(part[:1] in "_." for part in path[len(root) :].split("/") if part)
    ]
    if not infos:
        raise CatalogError(f"catalog {uri}: no .parquet file there")
    return infos


def _identity(info: dict[str, Any]) -> str:
    stamp = next(
        (
            info[name]
            for name in ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "created")
            if info.get(name) is not None
        ),
        "",
    )
    return f"{info['size']}-{stamp}"


def _read_footer(fs: Any, path: str) -> pq.FileMetaData:
    try:
        with open_parts(fs, path) as file:
            return pq.read_metadata(file)
    except (pa.ArrowException, *file_system_errors()) as error:
        raise CatalogError(
            f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}); write it again or "
            "remove it"
        ) from error


def _named_or_default(named: str | None, default: str, schemas: dict[str, pa.Schema]) -> str | None:
    if named is not None:
        return None if named == NO_COLUMN else named
    return default if any(default in names.names for names in schemas.values()) else None


class _SchemaCheck:
    """Collects the faults of all columns in all files."""

    def __init__(self, schemas: dict[str, pa.Schema]) -> None:
        self._schemas = schemas
        self._faults: list[str] = []

    def fault(self, text: str) -> None:
        self._faults.append(text)

    def column(
        self, role: str, name: str, normalize: Callable[[pa.DataType], Any], expected: str
    ) -> Any:
        """The normalized type of a column, or None with a fault noted."""
        missing: list[str] = []
        repeated: list[str] = []
        wrong: dict[pa.DataType, list[str]] = defaultdict(list)
        kinds: dict[Any, list[str]] = defaultdict(list)
        for path, columns in self._schemas.items():
            if name not in columns.names:
                missing.append(path)
                continue
            if columns.names.count(name) > 1:
                repeated.append(path)
                continue
            type_ = columns.field(name).type
            normalized = normalize(type_)
            (wrong[type_] if normalized is None else kinds[normalized]).append(path)
        if missing:
            self.fault(f"{role} column {name!r} is missing in {_some(missing)}")
        if repeated:
            self.fault(f"{role} column {name!r} is there more than once in {_some(repeated)}")
        for type_, paths in wrong.items():
            self.fault(f"{role} column {name!r} must be {expected}, is {type_} in {_some(paths)}")
        if len(kinds) > 1:
            each = ", ".join(f"{kind} in {_some(paths)}" for kind, paths in kinds.items())
            self.fault(f"{role} column {name!r} differs between files: {each}")
        return next(iter(kinds), None)

    def finish(self, uri: str) -> None:
        """Raise CatalogError with all faults, if there are any."""
        if not self._faults:
            return
        columns = sorted(
            {f"{field.name} ({field.type})" for names in self._schemas.values() for field in names}
        )
        faults = "".join(f"\n  - {fault}" for fault in self._faults)
        raise CatalogError(f"catalog {uri}:{faults}\ncolumns there: {', '.join(columns)}")


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _is_any(type_: pa.DataType, checks: Iterable[Callable[[pa.DataType], bool]]) -> bool:
    return any(check(type_) for check in checks)


_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


def _key_type(type_: pa.DataType) -> pa.DataType | None:
    type_ = _plain(type_)
    if _is_any(type_, _STRINGS):
        return pa.string()
    # Larger than int64 holds; such keys are better strings.
    return pa.int64() if pa.types.is_integer(type_) and type_ != pa.uint64() else None


def _text_type(type_: pa.DataType) -> pa.DataType | None:
    return pa.string() if _is_any(_plain(type_), _STRINGS) else None


def _image_layout(type_: pa.DataType) -> ImageLayout | None:
    if pa.types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        has_bytes = "bytes" in fields and _is_any(fields["bytes"], _BINARIES)
        return ImageLayout.STRUCT if has_bytes else None
    type_ = _plain(type_)
    if _is_any(type_, _BINARIES):
        return ImageLayout.BYTES
    return ImageLayout.URI if _is_any(type_, _STRINGS) else None


def _scalar_type(type_: pa.DataType) -> pa.DataType | None:
    type_ = _plain(type_)
    scalar = (*_STRINGS, pa.types.is_integer, pa.types.is_floating, pa.types.is_temporal)
    return type_ if _is_any(type_, scalar) else None


def _any_type(type_: pa.DataType) -> pa.DataType:
    return type_
