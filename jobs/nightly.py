"""`clipmill nightly`: brings a store up to its catalog, guarded, with its index; for a scheduler.

Knows nothing of how it is done.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from typing import Literal

from jobs.cluster import check_metrics_port, ray_cluster
from jobs.command import CommandParser, print_result, run
from jobs.embed_options import add_embed_options, embed_config_from
from jobs.index_options import add_index_options, index_options_from
from jobs.logs import event_log
from jobs.progress import shown_progress
from jobs.recorded_run import close_run, noted, recorded_run, say_begun, say_ended
from jobs.stopping import ended_by_sigterm
from pipelines.counts import KeyCounts, plan_line
from pipelines.dry_run import Plan
from pipelines.guarding.guard_limits import GuardLimits
from pipelines.indexes.manifest import IndexManifest
from pipelines.lineage import GUARDS, Lineage, measurement_line
from pipelines.nightly import NightlyConfig, plan_night, run_night
from pipelines.runs.report import RunReport, make_report, summary
from pipelines.runs.run_metrics import told_run
from pipelines.schema import RETRYABLE_REASONS
from pipelines.snapshots import is_other_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """What a night would do; JSON-able."""

    outcome: Literal["planned"]
    """Nothing was done."""
    snapshot: int | None
    """The current one."""
    engine_id: str
    """What would encode."""
    engine_before: str | None
    """What the current snapshot was made with."""
    is_anew: bool
    """Whether that is another engine or build, so that all rows are embedded anew."""
    num_catalog_rows: int
    """Rows of the catalog."""
    num_keys: int
    """Its distinct keys."""
    num_keys_before: int
    """Of the current snapshot."""
    plan: dict[str, KeyCounts]
    """Modality -> what would be done for the keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NightReport:
    """What a night did; JSON-able."""

    outcome: Literal["committed", "unchanged"]
    """Whether the snapshot is new."""
    snapshot: int
    """The current one."""
    parent: int | None
    """The one before it."""
    num_indexes_built: int
    """By this night."""
    indexes: list[IndexManifest]
    """Of the snapshot."""
    lineage: Lineage | None
    """Plan, guards and what was accepted; None if nothing was committed."""
    run: RunReport
    """The run in numbers."""
    report_path: str | None
    """Its page; None if there was nothing to do, or if it could not be saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    options = _parser().parse_options(words)
    config = _config_from(options, command=("clipmill", "nightly", *words))
    check_metrics_port(options.metrics_port, address=options.address)
    if options.dry_run:
        with (
            redirect_stdout(sys.stderr),
            ray_cluster(options.address, metrics_port=options.metrics_port),
        ):
            plan_report = _plan_report(plan_night(config))
        print_result(plan_report, as_json=options.json, text=_plan_text(plan_report))
    else:
        report = _run(config, address=options.address, metrics_port=options.metrics_port)
        print_result(report, as_json=options.json, text=_night_text(report))
    return 0


def _parser() -> CommandParser:
    limits = GuardLimits()
    parser = CommandParser(
        "nightly", description="Plan, embed, ask the guards, index, commit: all or nothing."
    )
    add_embed_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be done; nothing is written"
    )
    parser.add_argument(
        "--retry-rejects",
        action="store_true",
        help="try all rejected rows again that another try may heal",
    )
    add_index_options(parser)
    guards = parser.add_argument_group("guards")
    guards.add_argument(
        "--accept",
        nargs="+",
        action="extend",
        default=[],
        choices=GUARDS,
        metavar="GUARD",
        help=f"let it trip this time, once you know why: {', '.join(GUARDS)}",
    )
    parser.for_once.add("accept")
    guards.add_argument("--max-rejects", type=float, default=limits.max_rejects, metavar="SHARE")
    guards.add_argument(
        "--max-deletions", type=float, default=limits.max_deletions, metavar="SHARE"
    )
    guards.add_argument("--max-norms", type=float, default=limits.max_norms, metavar="SHARE")
    guards.add_argument("--min-drift", type=float, default=limits.min_drift, metavar="COSINE")
    guards.add_argument(
        "--min-new-drift", type=float, default=limits.min_new_drift, metavar="COSINE"
    )
    guards.add_argument("--max-collapse", type=float, default=limits.max_collapse, metavar="LENGTH")
    guards.add_argument(
        "--min-neighbours", type=float, default=limits.min_neighbours, metavar="SHARE"
    )
    guards.add_argument("--min-recall", type=float, default=limits.min_recall, metavar="SHARE")
    return parser


def _config_from(options: Namespace, *, command: Sequence[str]) -> NightlyConfig:
    config = embed_config_from(options, command=command)
    if options.retry_rejects:
        config = replace(config, retry=tuple(sorted(RETRYABLE_REASONS.union(config.retry))))
    return NightlyConfig(
        embed=config,
        limits=GuardLimits(
            max_rejects=options.max_rejects,
            max_deletions=options.max_deletions,
            max_norms=options.max_norms,
            min_drift=options.min_drift,
            min_new_drift=options.min_new_drift,
            max_collapse=options.max_collapse,
            min_neighbours=options.min_neighbours,
            min_recall=options.min_recall,
        ),
        accepted=tuple(options.accept),
        index=index_options_from(options, min_recall=options.min_recall),
    )


def _plan_report(plan: Plan) -> PlanReport:
    parent, counts = plan.parent, plan.counts
    return PlanReport(
        outcome="planned",
        snapshot=None if parent is None else parent.number,
        engine_id=plan.engine.engine_id,
        engine_before=None if parent is None else parent.engine.engine_id,
        is_anew=parent is not None and is_other_engine(plan.engine, parent),
        num_catalog_rows=counts.num_rows,
        num_keys=counts.num_keys,
        num_keys_before=0 if parent is None else parent.catalog.num_keys,
        plan={str(name): keys for name, keys in counts.keys.items()},
    )


def _plan_text(report: PlanReport) -> str:
    if report.snapshot is None:
        lines = ["the store has no snapshot yet"]
    else:
        lines = [f"snapshot {report.snapshot} is current: {report.num_keys_before:,} keys"]
    lines.append(f"  catalog {report.num_catalog_rows:,} rows, {report.num_keys:,} keys")
    anew = f", in the place of {report.engine_before}: all rows anew" if report.is_anew else ""
    lines.append(f"  engine  {report.engine_id}{anew}")
    lines += [f"  {modality:<7} {plan_line(keys)}" for modality, keys in report.plan.items()]
    return "\n".join([*lines, "dry run: nothing was done"])


def _run(config: NightlyConfig, *, address: str | None, metrics_port: int | None) -> NightReport:
    with (
        ended_by_sigterm(),
        ExitStack() as cluster,  # left last: it waits for a scrape, and the record for nothing
        recorded_run(config.embed.store_uri, command="nightly") as journal,
        event_log("nightly", run_id=journal.run_id) as context,
    ):
        say_begun(config.embed)
        # Ray prints of its own, on stdout, where only the result belongs.
        cluster.enter_context(redirect_stdout(sys.stderr))
        cluster.enter_context(ray_cluster(address, metrics_port=metrics_port))
        with told_run(config.embed.store_uri) as told, shown_progress() as show:
            result = run_night(config, run_id=journal.run_id, on_progress=noted(show, journal))
            told.outcome = "committed" if result.embedded.committed else "unchanged"
        snapshot, committed = result.embedded.snapshot, result.embedded.committed
        run_report = make_report(
            result.embedded,
            catalog_uri=config.embed.catalog.uri,
            store_uri=config.embed.store_uri,
        )
        report_path = None
        # A night with nothing to do writes nothing.
        if committed or result.embedded.progress is not None or result.num_indexes_built:
            run_report, report_path = close_run(run_report, journal, context)
        else:
            say_ended(run_report, context)
    return NightReport(
        outcome="committed" if committed else "unchanged",
        snapshot=snapshot.number,
        parent=snapshot.parent,
        num_indexes_built=result.num_indexes_built,
        indexes=result.indexes,
        lineage=snapshot.lineage if committed else None,
        run=run_report,
        report_path=report_path,
    )


def _night_text(report: NightReport) -> str:
    indexes = f"indexes: {report.num_indexes_built} built, {len(report.indexes)} there"
    page = f"report: {report.report_path or 'could not be saved'}"
    if report.lineage is None:
        num_retried = sum(keys.num_retried for keys in report.run.plan.values())
        if num_retried:
            return (
                f"nothing changed: {num_retried:,} rejects were tried again, all in vain; snapshot "
                f"{report.snapshot} stays; {indexes}\n{page}"
            )
        if report.num_indexes_built:
            return (
                f"nothing to embed: snapshot {report.snapshot} is that of the catalog; "
                f"{indexes}\n{page}"
            )
        return f"nothing to do: snapshot {report.snapshot} is that of the catalog; {indexes}"
    accepted = report.lineage.accepted
    lines = [summary(report.run), *map(measurement_line, report.lineage.measurements)]
    lines += [f"accepted: {', '.join(accepted)}"] if accepted else []
    return "\n".join([*lines, indexes, page])


if __name__ == "__main__":
    run(main, sys.argv[1:])
