"""`clipmill bench index`, `serve` and `query`: what their options are, and how they print.

Knows nothing of how any of them measures.
"""

from collections.abc import Sequence

from engine.registry import default_engines_uri
from jobs.command import CommandParser, print_result, say
from jobs.demo.run import CHECKPOINT_DIR
from pipelines.indexes.options import DEFAULT_MIN_RECALL


def index(argv: Sequence[str]) -> int:
    """Measure an index: built, and with some rows changed."""
    from jobs.benches.index import IndexBenchConfig, index_lines, measure_index

    parser = CommandParser(
        "bench index",
        description="Time, memory and recall of an index: built, and with some rows changed.",
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--changed", type=float, default=0.01, metavar="SHARE")
    parser.add_argument("--max-memory-bytes", type=int, default=2**30)
    parser.add_argument("--min-recall", type=float, default=DEFAULT_MIN_RECALL, metavar="SHARE")
    parser.add_argument("--factory", metavar="NAME", help="as of `clipmill index`")
    parser.add_argument("--page", metavar="FILE", help="write plots there, as one HTML page")
    parser.add_argument(
        "--autofaiss", metavar="PYTHON", help="one that has autofaiss, which is measured as well"
    )
    options = parser.parse_options(argv)
    words = ["--min-recall", str(options.min_recall)]
    words += ["--factory", options.factory] if options.factory else []
    config = IndexBenchConfig(
        num_rows=options.rows,
        embedding_dim=options.dim,
        memory_bytes=options.max_memory_bytes,
        words=tuple(words),
        changed_share=options.changed,
        page=options.page,
        autofaiss_python=options.autofaiss,
    )
    figures = []
    for run_figures in measure_index(config):
        figures.append(run_figures)
        say(*index_lines(run_figures))
    lines = [line for run_figures in figures for line in index_lines(run_figures)]
    print_result(figures, as_json=options.json, text="\n".join(lines))
    return 0


def serve(argv: Sequence[str]) -> int:
    """Measure the service under load."""
    from jobs.benches.serve import ServeBenchConfig, measure_serve, serve_line

    parser = CommandParser("bench serve", description="Requests a second of `clipmill serve`.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT_DIR), metavar="ID_OR_DIR")
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    parser.add_argument("--max-memory-bytes", type=int, default=2**30)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--switches", type=int, default=20, metavar="N", help="snapshots during one more run"
    )
    options = parser.parse_options(argv)
    config = ServeBenchConfig(
        checkpoint=options.checkpoint,
        engines_uri=options.engines,
        num_rows=options.rows,
        memory_bytes=options.max_memory_bytes,
        num_replicas=options.replicas,
        num_clients=options.clients,
        seconds=options.seconds,
        num_runs=options.runs,
        num_switches=options.switches,
    )
    figures = []
    for run_figures in measure_serve(config):
        figures.append(run_figures)
        say(serve_line(run_figures))
    print_result(figures, as_json=options.json, text="\n".join(map(serve_line, figures)))
    return 0


def query(argv: Sequence[str]) -> int:
    """Measure the recall of a store's pairs."""
    from pipelines.retrieval import pair_recall, recall_line

    parser = CommandParser("bench query", description="Recall of the pairs of a store.")
    parser.add_argument("--store", required=True, metavar="URI", help="an indexed store of pairs")
    parser.add_argument("-k", type=int, nargs="+", default=[1, 5, 10], help="cut-offs")
    options = parser.parse_options(argv)
    recalls = pair_recall(options.store, ks=options.k)
    text = "\n".join(map(recall_line, recalls))
    print_result(recalls, as_json=options.json, text=text)
    return 0
