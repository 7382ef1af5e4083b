"""`clipmill embed`: embeds what is new or changed in a catalog and commits a snapshot.

Knows nothing of how it is done.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout

from jobs.cluster import check_metrics_port, ray_cluster
from jobs.command import CommandParser, print_result, run
from jobs.embed_options import add_embed_options, embed_config_from
from jobs.logs import event_log
from jobs.progress import shown_progress
from jobs.recorded_run import close_run, noted, recorded_run, say_begun
from jobs.stopping import ended_by_sigterm
from pipelines.embedding import EmbedConfig, embed
from pipelines.runs.report import RunReport, make_report, summary
from pipelines.runs.run_metrics import told_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = CommandParser("embed", description="Embed what is new or changed in a catalog.")
    add_embed_options(parser)
    options = parser.parse_options(words)
    config = embed_config_from(options, command=("clipmill", "embed", *words))
    check_metrics_port(options.metrics_port, address=options.address)
    report, report_path = run_embed(
        config, address=options.address, metrics_port=options.metrics_port
    )
    text = f"{summary(report)}\nreport: {report_path or 'could not be saved'}"
    print_result(report, as_json=options.json, text=text)
    return 0


def run_embed(
    config: EmbedConfig, *, address: str | None = None, metrics_port: int | None = None
) -> tuple[RunReport, str | None]:
    """Embed with progress on stderr; returns the report and where its page was saved, if it was."""
    with (
        ended_by_sigterm(),
        ExitStack() as cluster,  # left last: it waits for a scrape, and the record for nothing
        recorded_run(config.store_uri, command="embed") as journal,
        event_log("embed", run_id=journal.run_id) as context,
    ):
        say_begun(config)
        # Ray prints of its own, on stdout, where only the result belongs.
        cluster.enter_context(redirect_stdout(sys.stderr))
        cluster.enter_context(ray_cluster(address, metrics_port=metrics_port))
        with told_run(config.store_uri) as told, shown_progress() as show:
            result = embed(config, run_id=journal.run_id, on_progress=noted(show, journal))
            told.outcome = "committed" if result.committed else "unchanged"
        report = make_report(result, catalog_uri=config.catalog.uri, store_uri=config.store_uri)
        return close_run(report, journal, context)


if __name__ == "__main__":
    run(main, sys.argv[1:])
