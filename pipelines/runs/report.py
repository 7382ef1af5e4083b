"""The report of a run: its numbers, and the line that names what limits it.

Knows nothing of how the report is drawn.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.redaction import public_uri
from pipelines.counts import KeyCounts, plan_line
from pipelines.progress import Progress

if TYPE_CHECKING:  # who reads reports of old runs need not load what runs them
    from pipelines.embedding import EmbedResult

ADVICE = {
    "read": "the catalog's storage sets the pace; bring the data nearer or use larger row groups",
    "prepare": "add CPUs: they look at headers, fingerprint rows and decode what GPUs do not take",
    "decode": "add CPUs, store images nearer to the size that the model reads, or decode them on "
    "GPUs (--decode gpu)",
    "decode by gpu": "add GPUs, or store images nearer to the size that the model reads",
    "encode": "add encoders (--num-encoders), CPUs for them, or a GPU",
    "write": "the store sets the pace; write larger files (--rows-per-file) or nearer",
}
# Below this the stages mostly waited for Ray to start workers, and no stage was short of them.
IDLE_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """One stage of a run."""

    stage: str
    """read, prepare, decode, encode or write."""
    num_rows: int
    """Rows that left the stage; after reading once for each modality."""
    num_bytes: int
    """Bytes read, decoded to, or written; 0 for encode."""
    busy_seconds: float
    """Summed over all workers."""
    core_seconds: float
    """See `StageCount`."""
    workers: int
    """How many could work at once."""
    busy_share: float
    """Of the workers' time during the run, 0 to 1."""
    rows_per_second: float
    """What the stage alone would take with all its workers; 0 if it did nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """A run in numbers; JSON-able with dataclasses.asdict."""

    run_id: str
    """Names the run."""
    created_at: str
    """UTC, ISO 8601."""
    catalog_uri: str
    """What was embedded; without what may be secret."""
    store_uri: str
    """Where to; the same."""
    checkpoint: str
    """With what."""
    engine_id: str
    """Same id, same embeddings."""
    backend: str
    """What executed it in this run."""
    decoder: str
    """Where this run decoded JPEGs: cpu or gpu."""
    embedding_dim: int
    """D."""
    snapshot: int
    """The current snapshot after the run."""
    committed: bool
    """Whether the run made it."""
    num_catalog_rows: int
    """Rows of the catalog."""
    num_keys: int
    """Distinct keys."""
    num_embedded: dict[str, int]
    """Modality -> rows embedded by this run."""
    num_copied: dict[str, int]
    """Modality -> rows whose content was embedded already, for another row: copied by this run."""
    num_unchanged: dict[str, int]
    """Modality -> rows that were stored already, by runs that did not finish too."""
    plan: dict[str, KeyCounts]
    """Modality -> what was to be done for its keys."""
    num_stored: dict[str, int]
    """Modality -> embeddings in the snapshot."""
    rejects_by_reason: dict[str, int]
    """Of the snapshot."""
    seconds: float
    """The stages, from first read to last write; 0 if there was nothing to embed."""
    stages: list[StageReport]
    """Timed apart."""
    samples: list[tuple[float, int]]
    """(seconds, rows encoded) over the run."""
    bottleneck: str
    """One line: the stage that limits, and what would help."""
    num_rejected: int | None = None
    """Rows of all modalities that this run rejected; None in reports of before it was counted."""
    num_gpus: float | None = None
    """That encoders held while the stages ran; 0 on CPUs, None as above."""
    nodes: list[str] = field(default_factory=list)
    """Of the cluster; see `node_line`."""
    slow: str | None = None
    """One line if it was slower than earlier runs; see `slow_line`."""
    spilled_bytes: int | None = None
    """Written to disk by object stores of the cluster while the stages ran, for other jobs too; 0
    if there was nothing to embed, None if it is not known."""


def make_report(result: "EmbedResult", *, catalog_uri: str, store_uri: str) -> RunReport:
    """Put a run's result into numbers; its URIs lose what they hold of credentials."""
    snapshot, progress = result.snapshot, result.progress
    stages = stage_reports(progress, workers=result.workers) if progress else []
    modalities = snapshot.modalities
    spilled_bytes = progress.spilled_bytes if progress else 0
    return RunReport(
        run_id=result.run_id,
        created_at=result.created_at,
        catalog_uri=public_uri(catalog_uri),
        store_uri=public_uri(store_uri),
        checkpoint=snapshot.engine.checkpoint,
        engine_id=snapshot.engine.engine_id,
        backend=result.execution.backend,
        decoder=result.execution.decoder,
        embedding_dim=snapshot.embedding_dim,
        snapshot=snapshot.number,
        committed=result.committed,
        num_catalog_rows=result.counts.num_rows,
        num_keys=result.counts.num_keys,
        num_embedded={str(name): num for name, num in result.num_embedded.items()},
        num_copied={str(name): num for name, num in result.num_copied.items()},
        num_unchanged={
            str(name): keys.num_unchanged + keys.num_staged
            for name, keys in result.counts.keys.items()
        },
        plan={str(name): keys for name, keys in result.counts.keys.items()},
        num_stored={name: snapshot.num_rows("embeddings", modality=name) for name in modalities},
        rejects_by_reason=result.rejects_by_reason,
        seconds=progress.seconds if progress else 0.0,
        stages=stages,
        samples=progress.samples if progress else [],
        bottleneck=bottleneck_line(stages, spilled_bytes=spilled_bytes),
        num_rejected=result.num_rejected,
        num_gpus=result.num_gpus,
        nodes=list(result.nodes),
        spilled_bytes=spilled_bytes,
    )


def stage_reports(progress: Progress, *, workers: dict[str, int]) -> list[StageReport]:
    """Turn counts into shares and rates."""
    reports = []
    for stage, count in progress.stages.items():
        available = progress.seconds * workers[stage]
        reports.append(
            StageReport(
                stage=stage,
                num_rows=count.num_rows,
                num_bytes=count.num_bytes,
                busy_seconds=count.busy_seconds,
                core_seconds=count.core_seconds,
                workers=workers[stage],
                busy_share=min(1.0, count.busy_seconds / available) if available else 0.0,
                rows_per_second=(
                    count.num_rows * workers[stage] / count.busy_seconds
                    if count.busy_seconds
                    else 0.0
                ),
            )
        )
    return reports


def bottleneck_line(stages: list[StageReport], *, spilled_bytes: int | None = 0) -> str:
    """Name the stage whose workers were busiest, and what would help.

    Args:
        stages: Of the run.
        spilled_bytes: See `RunReport`.
    """
    if not stages:
        return "nothing to embed: no row is new or changed"
    line = _busiest_line(stages)
    if not spilled_bytes:
        return line
    return (
        f"{line}; meanwhile Ray wrote {spilled_bytes / 2**20:,.0f} MiB from object stores to disk: "
        "give them more memory (`ray start --object-store-memory BYTES`; where the command starts "
        "Ray, a larger /dev/shm), or less to hold (--batch-rows)"
    )


def _busiest_line(stages: list[StageReport]) -> str:
    busiest = max(stages, key=lambda stage: stage.busy_share)
    rates = ", ".join(f"{stage.stage} {stage.rows_per_second:,.0f}" for stage in stages)
    share = f"its {busiest.workers} workers were busy {busiest.busy_share:.0%} of the run"
    if busiest.busy_share < IDLE_SHARE:
        return (
            f"start-bound: even {busiest.stage} was busy only {busiest.busy_share:.0%} of the run; "
            f"a larger catalog would use the workers better (rows/s each alone: {rates})"
        )
    by_gpu = busiest.stage == "decode" and any(stage.stage == "prepare" for stage in stages)
    advice = ADVICE["decode by gpu" if by_gpu else busiest.stage]
    return f"{busiest.stage}-bound: {share} (rows/s each alone: {rates}); {advice}"


def summary(report: RunReport) -> str:
    """The closing lines of a run, for a terminal."""
    state = "committed" if report.committed else "unchanged"
    lines = [
        f"snapshot {report.snapshot} {state}: {report.num_keys:,} keys of "
        f"{report.num_catalog_rows:,} rows",
        f"  engine {report.engine_id} by {report.backend}, images decoded by {report.decoder}",
    ]
    for modality, num_stored in report.num_stored.items():
        lines.append(
            f"  {modality:<6} {num_stored:>10,} stored: {report.num_embedded[modality]:,} "
            f"embedded now, {report.num_copied[modality]:,} copied, "
            f"{report.num_unchanged[modality]:,} rows unchanged"
        )
        if modality in report.plan:
            lines.append(f"  {'':<6} {'':>10} planned: {plan_line(report.plan[modality])}")
    for reason, num_rows in report.rejects_by_reason.items():
        lines.append(f"  reject {num_rows:>10,} {reason}")
    if report.stages:
        lines.append("  stage         rows   busy s  workers  busy   rows/s alone")
    lines += [
        f"  {stage.stage:<7} {stage.num_rows:>10,} {stage.busy_seconds:>8.1f} "
        f"{stage.workers:>8} {stage.busy_share:>5.0%} {stage.rows_per_second:>14,.0f}"
        for stage in report.stages
    ]
    lines.append(report.bottleneck)
    return "\n".join(lines)
