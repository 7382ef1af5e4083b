"""What the routes of one replica share: the open snapshot, the batcher, the pictures, the counts.

Knows nothing of HTTP or of Ray.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from engine.images import ImageLimits
from jobs.serving.batching import Batcher
from jobs.serving.live import Live, Opened, Opener
from jobs.serving.metrics import Metrics
from jobs.serving.options import ServiceConfig
from jobs.serving.problems import overloaded
from jobs.serving.thumbnails import Thumbnails
from pipelines.catalog_rows import CatalogRows


class Service:
    """What the routes share: the open snapshot, the batcher, the pictures, the counts."""

    def __init__(self, config: ServiceConfig, *, opener: Opener, replica: str) -> None:
        """Open nothing yet."""
        self.config = config
        self.replica = replica
        self.metrics = Metrics()
        self.batcher = Batcher(self.metrics)
        self.thumbnails = Thumbnails(
            limits=ImageLimits(max_image_pixels=config.limits.max_image_pixels),
            open_rows=partial(CatalogRows, fetch=config.fetch),
        )
        self.live = Live(config, self.metrics, opener=opener, on_opened=self._follow)

    @property
    def opened(self) -> Opened:
        """What answers; Problem 503 before there is anything."""
        if self.live.opened is None:
            why = self.live.failure or "it is being opened"
            raise overloaded(f"no snapshot answers yet: {why}")
        return self.live.opened

    @property
    def shows_pictures(self) -> bool:
        """Whether items have pictures, or will have them."""
        return self.thumbnails.state in ("reading", "ready")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look for snapshots for the length of a block."""
        await self.live.look()
        watching = asyncio.create_task(self.live.watch())
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            for part in (self.live, self.batcher, self.thumbnails):
                part.close()

    def _follow(self, opened: Opened) -> None:
        if self.config.thumbnails:
            self.thumbnails.follow(opened.snapshot.catalog)
