"""Holds the snapshot that answers, and takes up a newer one without a pause.

Knows nothing of HTTP or of what is asked. A newer snapshot, a rollback too, is opened in a thread
while the one before goes on answering; that one goes when its last request is done. What cannot be
opened leaves everything as it was, and is tried again.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from engine.errors import ClipmillError
from jobs.serving.metrics import Metrics
from jobs.serving.options import ServiceConfig
from pipelines.errors import StoreError
from pipelines.indexes.manifest import find_index
from pipelines.schema import Modality
from pipelines.search import Searcher
from pipelines.snapshots import Snapshot, snapshot_numbers
from pipelines.store import Store

MAX_PAUSE_SECONDS = 60.0
"""Between two tries to open what cannot be opened."""
_logger = logging.getLogger("clipmill.serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """One snapshot, ready to be asked."""

    snapshot: Snapshot
    """Which."""
    searchers: Mapping[Modality, Searcher]
    """For each of the embeddings that are searched, the default first."""


Opener = Callable[[ServiceConfig], Opened]


def open_current(config: ServiceConfig) -> Opened:
    """Open a store's current snapshot.

    Raises:
        ClipmillError: It has none, it is not indexed, or its engine cannot be had.
    """

    def searcher(modality: Modality | None) -> Searcher:
        return Searcher(config.store_uri, engines_uri=config.engines_uri, modality=modality)

    first = searcher(config.among[0] if config.among else None)
    snapshot = first.snapshot
    others = (config.among or snapshot.modalities)[:]
    searchers = {first.modality: first}
    searchers.update({name: searcher(name) for name in others if name != first.modality})
    if len({found.snapshot.number for found in searchers.values()}) > 1:
        raise StoreError(
            f"store {config.store_uri}: a snapshot was committed while one was opened; it is "
            "opened at the next look"
        )
    return Opened(snapshot=snapshot, searchers=searchers)


def is_current(opened: Opened, config: ServiceConfig) -> bool:
    """Whether a snapshot is the store's newest, and its indexes are those that serve now.

    An index that is being built anew may not be there for a while: the one that is open goes on.

    Raises:
        StoreError: The store cannot be read.
    """
    store = Store(config.store_uri)
    if max(snapshot_numbers(store), default=None) != opened.snapshot.number:
        return False
    for modality, searcher in opened.searchers.items():
        manifest = find_index(store, opened.snapshot, modality=modality)
        if manifest is not None and manifest.build_id != searcher.build_id:
            return False
    return True


class Live:
    """The snapshot that answers now."""

    def __init__(
        self,
        config: ServiceConfig,
        metrics: Metrics,
        *,
        opener: Opener = open_current,
        on_opened: Callable[[Opened], None] = lambda opened: None,
    ) -> None:
        """Open nothing yet.

        Args:
            config: Of the service.
            metrics: Tells which snapshot answers.
            opener: Opens the current snapshot, in a thread.
            on_opened: Called in the same thread with each snapshot that begins to answer.
        """
        self._config = config
        self._metrics = metrics
        self._opener = opener
        self._on_opened = on_opened
        self._opened: Opened | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="open")
        self.failure: str | None = None
        """Why what is newer cannot be opened, None if nothing is wrong."""

    @property
    def opened(self) -> Opened | None:
        """What answers, to be held for the length of a request; None before there is any."""
        return self._opened

    async def look(self) -> bool:
        """Open what is current, unless it answers already; whether all is well."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._look)

    async def watch(self) -> None:
        """Look again and again, for ever; after failures ever more rarely, up to a minute."""
        pause = self._config.refresh_seconds
        while True:
            await asyncio.sleep(pause)
            is_well = await self.look()
            longest = max(MAX_PAUSE_SECONDS, self._config.refresh_seconds)
            pause = self._config.refresh_seconds if is_well else min(2 * pause, longest)

    def close(self) -> None:
        """End the thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> bool:
        try:
            if self._opened is not None and is_current(self._opened, self._config):
                self._note(None)
                return True
            self._take_up(self._opener(self._config))
            return True
        except ClipmillError as error:
            self._failed(str(error))
            return False
        # A damaged index fails in whichever library reads it; the one that answers goes on.
        except Exception as error:
            _logger.exception("snapshot cannot be opened")
            self._failed(f"{type(error).__name__}: {error}")
            return False

    def _take_up(self, opened: Opened) -> None:
        self._on_opened(opened)
        self._metrics.answers_from(
            number=opened.snapshot.number,
            created_seconds=datetime.fromisoformat(opened.snapshot.created_at).timestamp(),
        )
        for modality, searcher in opened.searchers.items():
            self._metrics.rows.labels(modality).set(searcher.num_rows)
            self._metrics.finds(searcher.index_manifest)
        self._metrics.openings.labels("opened").inc()
        self._note(None)
        _logger.info("snapshot %d answers", opened.snapshot.number)
        # One reference, set whole: a request has either the old one or the new one. Last, so that
        # what failed before is done again at the next look.
        self._opened = opened

    def _failed(self, why: str) -> None:
        self._metrics.openings.labels("failed").inc()
        if why != self.failure:
            answers = f"snapshot {self._opened.snapshot.number}" if self._opened else "nothing"
            _logger.warning("no newer snapshot is taken up, %s answers: %s", answers, why)
        self._note(why)

    def _note(self, failure: str | None) -> None:
        self.failure = failure
        self._metrics.is_behind.set(failure is not None)
