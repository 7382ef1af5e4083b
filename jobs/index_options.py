"""The options that `index` and `nightly` share: what an index shall be.

Knows nothing of what is done with them.
"""

from argparse import Namespace
from pathlib import Path

from jobs.command import CommandParser
from pipelines.indexes.options import IndexOptions


def add_index_options(parser: CommandParser) -> None:
    """Add them to a command."""
    group = parser.add_argument_group("index")
    group.add_argument(
        "--max-memory-bytes",
        type=int,
        help="that a search may want; half of this machine's if left out",
    )
    group.add_argument(
        "--factory",
        metavar="NAME",
        help="FAISS's name of a type, as IVF4096,SQ8; chosen for rows and memory if left out",
    )
    group.add_argument(
        "--queries",
        metavar="FILE",
        help="texts that your users ask for, one a line, to measure recall with; of the store's if "
        "left out",
    )
    group.add_argument(
        "--index-seed", type=int, default=0, metavar="N", help="of sample and clusters"
    )


def index_options_from(options: Namespace, *, min_recall: float) -> IndexOptions:
    """What was asked for; ValueError if the file of queries cannot be read or has none."""
    texts: tuple[str, ...] = ()
    if options.queries is not None:
        try:
            lines = Path(options.queries).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--queries {options.queries}: {error}") from error
        texts = tuple(line.strip() for line in lines if line.strip())
        if not texts:
            raise ValueError(f"--queries {options.queries}: no texts in it; write one a line")
    return IndexOptions(
        max_memory_bytes=options.max_memory_bytes,
        min_recall=min_recall,
        factory=options.factory,
        seed=options.index_seed,
        query_texts=texts,
        engines_uri=options.engines,
    )
