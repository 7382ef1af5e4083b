"""`clipmill demo`: a sample catalog, its embeddings, an index, answers and a report with pictures.

Knows nothing that the other commands do not: it calls what they call.
"""

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from engine.registry import default_engines_uri
from jobs.command import CommandParser, print_result, run
from jobs.demo.catalog import SampleRow, sample_rows, write_catalog
from jobs.embed import run_embed
from pipelines.catalog import CatalogConfig
from pipelines.embedding import EmbedConfig
from pipelines.engines import EngineChoice
from pipelines.indexes.queries import Part, Query
from pipelines.indexing import IndexConfig, build_index
from pipelines.retrieval import pair_recall, recall_line
from pipelines.runs.report import RunReport, summary
from pipelines.runs.report_page import Hit, QuerySheet
from pipelines.runs.saving import save_report
from pipelines.search import Hit as Found
from pipelines.search import Searcher

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
NUM_SHEETS = 10
NUM_HITS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("demo", description="From nothing to a report with pictures, offline.")
    parser.add_argument("--out", default="demo-output", metavar="DIR", help="output folder")
    parser.add_argument("--rows", type=int, default=2_000, help="scenes in the sample catalog")
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    parser.add_argument("--no-open", action="store_true", help="do not open the report")
    options = parser.parse_options(argv)
    if options.rows < NUM_SHEETS:
        raise ValueError(f"--rows {options.rows}: expected at least {NUM_SHEETS}")
    catalog_dir, store_dir = Path(options.out) / "catalog", Path(options.out) / "store"
    rows = sample_rows(options.rows)
    write_catalog(catalog_dir, rows)
    config = EmbedConfig(
        catalog=CatalogConfig(uri=str(catalog_dir)),
        store_uri=str(store_dir),
        engine=EngineChoice(checkpoint=str(CHECKPOINT_DIR), engines_uri=options.engines),
    )
    report, _ = run_embed(config)
    build_index(IndexConfig(store_uri=config.store_uri))
    recalls = pair_recall(config.store_uri)
    page = _save_page(config, report=report, rows=rows)
    text = "\n".join([summary(report), *map(recall_line, recalls), f"report: {page}"])
    print_result({"report": report, "recall": recalls}, as_json=options.json, text=text)
    if not options.no_open and sys.stdout.isatty():
        webbrowser.open(Path(page).resolve().as_uri())
    return 0


def _save_page(config: EmbedConfig, *, report: RunReport, rows: Sequence[SampleRow]) -> str:
    searcher = Searcher(config.store_uri, engines_uri=config.engine.engines_uri, modality="image")
    asked = rows[:: len(rows) // NUM_SHEETS][:NUM_SHEETS]
    by_words, by_picture = asked[:-2], asked[-2:]
    parts = [Part(text=row.text) for row in by_words]
    parts += [Part(image=row.image) for row in by_picture]
    answers = searcher.search([Query(parts=(part,)) for part in parts], num_hits=NUM_HITS)
    by_key = {row.key: row for row in rows}
    sheets = [
        QuerySheet(
            query=row.text,
            query_image=row.image if row in by_picture else None,
            hits=tuple(
                _hit(found, row=by_key[str(found.key)], expected=row) for found in answer.hits
            ),
        )
        for row, answer in zip(asked, answers, strict=True)
    ]
    return save_report(report, store_uri=config.store_uri, sheets=sheets)


def _hit(found: Found, *, row: SampleRow, expected: SampleRow) -> Hit:
    return Hit(
        key=row.key,
        score=found.score,
        image=row.image,
        caption=row.text,
        is_expected=row is expected,
    )


if __name__ == "__main__":
    run(main, sys.argv[1:])
