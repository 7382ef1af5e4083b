"""`clipmill query`: the nearest rows of a store to a text or an image file.

Knows nothing of how they are found.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.registry import default_engines_uri
from jobs.command import CommandParser, print_result, run
from pipelines.search import Searcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("query", description="Find the nearest rows to a text or an image.")
    parser.add_argument("--store", required=True, metavar="URI", help="a store with an index")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--text", metavar="TEXT", help="what to look for, in words")
    asked.add_argument("--image", metavar="FILE", help="what to look for, as a picture")
    parser.add_argument("-k", type=int, default=10, dest="num_hits", metavar="N", help="hits")
    parser.add_argument(
        "--among", choices=("image", "text"), help="which embeddings; images, if there are any"
    )
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    options = parser.parse_options(argv)
    searcher = Searcher(options.store, engines_uri=options.engines, modality=options.among)
    if options.text is not None:
        hits = searcher.by_text([options.text], num_hits=options.num_hits)[0]
    else:
        try:
            image = Path(options.image).read_bytes()
        except OSError as error:
            raise ValueError(f"--image {options.image}: {error.strerror}") from error
        hits = searcher.by_image([image], num_hits=options.num_hits)[0]
    text = "\n".join(f"{hit.score:7.4f}  {hit.key}" for hit in hits)
    print_result(hits, as_json=options.json, text=text)
    return 0


if __name__ == "__main__":
    run(main, sys.argv[1:])
