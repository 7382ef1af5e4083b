"""Finds out what a run would do, and does nothing of it.

Knows nothing of guards or of how the answer is shown.
"""

from dataclasses import dataclass
from functools import partial

from engine.registry import Registry
from pipelines.catalog import open_catalog
from pipelines.comparing import compared
from pipelines.counts import Counts
from pipelines.embedding import EmbedConfig, prepared
from pipelines.engines import Execution, chosen_engine
from pipelines.preparing import built_manifest
from pipelines.snapshots import EngineRecord, Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run would do."""

    parent: Snapshot | None
    """The current snapshot."""
    engine: EngineRecord
    """What would encode."""
    execution: Execution
    """What would execute it, and decode images."""
    counts: Counts
    """Rows due, and rows stored already, by this or an unfinished run."""


def plan(config: EmbedConfig) -> Plan:
    """Find out what `embed` would do; nothing is written to the store, and no engine is built.

    Ray must be initialized. Errors as of `embed`; a catalog without rows is none here.
    """
    catalog = open_catalog(config.catalog)
    registry = Registry(config.engine.engines_uri)
    engine = chosen_engine(config.engine, registry=registry)
    setting = prepared(
        config,
        catalog=catalog,
        engine=engine,
        manifest=partial(built_manifest, engine, registry=registry),
    )
    with compared(setting, resources=config.resources, retried=config.retry) as (ledger, _):
        counts = ledger.counts()
    return Plan(parent=setting.parent, engine=engine, execution=setting.execution, counts=counts)
