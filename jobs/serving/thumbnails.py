"""Small pictures of a catalog's items: found by key, decoded within limits, kept for a while.

Knows nothing of HTTP. The catalog's keys are read in a thread, which takes a while for a large one;
until then there is no picture, and `state` says so.
"""

import io
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from PIL import Image

from engine.errors import ClipmillError
from engine.images import ImageLimits, ImageRejected, rgb_image
from pipelines.catalog_rows import CatalogRows
from pipelines.fetching.fetch import FetchFailure
from pipelines.snapshots import CatalogRecord

MAX_SIDE_PIXELS = 256
MAX_CACHE_BYTES = 64 * 2**20
RETRY_SECONDS = 5.0
MAX_RETRY_SECONDS = 300.0
"""Between two tries to read a catalog that cannot be read: at first, and at most."""
NUM_THREADS = 4
"""That read and decode: they wait for the catalog's disk most of their time."""
_JPEG_QUALITY = 82
_logger = logging.getLogger("clipmill.serve")

State = Literal["none", "reading", "ready", "failed"]
Key = str | int


class NoThumbnailError(Exception):
    """An item has no picture; the text says why."""


class Thumbnails:
    """The pictures of the catalog of the snapshot that answers."""

    def __init__(
        self,
        *,
        limits: ImageLimits | None = None,
        open_rows: Callable[[CatalogRecord], CatalogRows] = CatalogRows,
    ) -> None:
        """Know no catalog yet.

        Args:
            limits: Of the pictures in the catalog; those of embedding, if None.
            open_rows: Reads a catalog's keys.
        """
        self._limits = limits or ImageLimits()
        self._open_rows = open_rows
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="catalog")
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="thumbnail")
        self._lock = threading.Lock()
        self._record: CatalogRecord | None = None
        self._is_replaced = threading.Event()
        self._rows: CatalogRows | None = None
        self._cache: OrderedDict[Key, bytes] = OrderedDict()
        self._cached_bytes = 0
        self.state: State = "none"
        """Whether there are pictures (yet)."""
        self.failure: str | None = None
        """Why the catalog cannot be read, if it cannot."""

    def follow(self, record: CatalogRecord) -> None:
        """Show another catalog; the one before is shown until that one's keys are read."""
        if record == self._record:
            return
        self._is_replaced.set()  # nobody tries to read the one before again
        self._is_replaced = threading.Event()
        with self._lock:
            self._record = record
            if not record.columns["image"]:
                self._rows, self.state = None, "none"
                return
            if self._rows is None:
                self.state = "reading"
        self._reader.submit(self._read, record, self._is_replaced)

    def close(self) -> None:
        """End the threads."""
        self._is_replaced.set()
        for threads in (self._reader, self.threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def jpeg_of(self, key: Key) -> bytes:
        """The picture of an item, a JPEG of at most 256 pixels a side; to be called in a thread.

        Raises:
            NoThumbnailError: It has none, or none that can be shown.
        """
        rows = self._rows
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        if rows is None:
            raise NoThumbnailError("there are no pictures to show")
        jpeg = self._make(rows, key)
        with self._lock:
            if rows is self._rows and key not in self._cache:
                self._cache[key] = jpeg
                self._cached_bytes += len(jpeg)
                while self._cached_bytes > MAX_CACHE_BYTES:
                    self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return jpeg

    def _read(self, record: CatalogRecord, is_replaced: threading.Event) -> None:
        """Read a catalog's keys, again and again until it is done or another one is followed."""
        pause = RETRY_SECONDS
        while not self._is_read(record) and not is_replaced.wait(pause):
            pause = min(2 * pause, MAX_RETRY_SECONDS)

    def _is_read(self, record: CatalogRecord) -> bool:
        """Whether a catalog's keys are read, or wanted no more."""
        try:
            rows = self._open_rows(record)
        # No search needs the catalog; whatever is wrong with it, answers go on without pictures.
        except Exception as error:
            if str(error) != self.failure:  # said once, however often it is tried
                if not isinstance(error, ClipmillError):
                    _logger.exception("catalog %s cannot be read", record.uri)
                _logger.warning("no thumbnails: %s", error)
            with self._lock:
                if record is not self._record:
                    return True
                self.failure = str(error)
                if self._rows is None:
                    self.state = "failed"
            return False
        with self._lock:
            if record is not self._record:
                return True
            self._rows = rows
            self._cache.clear()
            self._cached_bytes = 0
            self.failure = None
            self.state = "ready" if rows.has_images else "none"
        return True

    def _make(self, rows: CatalogRows, key: Key) -> bytes:
        try:
            encoded = rows.image_of(key, max_bytes=self._limits.max_image_bytes)
        except ClipmillError as error:
            raise NoThumbnailError(f"its row cannot be read: {error}") from error
        if encoded is None:
            raise NoThumbnailError("the catalog has no image of it")
        if isinstance(encoded, FetchFailure):
            raise NoThumbnailError(f"its image could not be fetched: {encoded.detail}")
        try:
            image = rgb_image(encoded, limits=self._limits)
        except ImageRejected as error:
            raise NoThumbnailError(f"its image cannot be shown: {error}") from error
        image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return buffer.getvalue()
