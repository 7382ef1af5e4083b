"""Compares a catalog with a store, as the first part of a run: what is due, what is there.

Knows nothing of what becomes of the rows that are due.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from pipelines.cluster.placement import WorkerDemand
from pipelines.cluster.resources import Resources
from pipelines.cluster.watched_runs import placement_watched
from pipelines.ledger import Ledger
from pipelines.planning import fill, modalities_by_content, staged_files
from pipelines.preparing import Preparation
from pipelines.snapshots import StoredFile
from pipelines.stages import ray_data_settings


@contextmanager
def compared(
    setting: Preparation, *, resources: Resources, retried: Collection[str]
) -> Iterator[tuple[Ledger, list[StoredFile]]]:
    """A ledger of both sides, settled, for the length of a block, in which Ray Data is set up.

    Args:
        setting: What is to be embedded, and where to.
        resources: What reading takes of the cluster.
        retried: Reject reasons: rows that were rejected for them are due again.

    Yields:
        The ledger, and the files that an unfinished run left.

    Raises:
        PlacementError: The cluster gave readers no place in time.
    """
    catalog = setting.catalog
    with (
        ray_data_settings(modalities=catalog.modalities),
        Ledger(
            key_type=catalog.key_type,
            modalities=catalog.modalities,
            by_content=modalities_by_content(catalog),
        ) as ledger,
    ):
        staged = staged_files(setting.store, plan_id=setting.plan_id, committed=setting.before)
        reading = WorkerDemand(
            what="reading the catalog",
            resources={"CPU": resources.io_cpus},
            kind="queue",
            option=None,
        )
        with placement_watched([reading], placement=resources.placement, progress=lambda: 0):
            fill(
                ledger,
                catalog,
                parent=setting.base,
                staged=staged,
                store=setting.store,
                num_cpus=resources.io_cpus,
                retried=retried,
            )
        yield ledger, staged
