"""`clipmill query`: the nearest rows of a store to texts, images, keys and vectors.

Knows nothing of how they are found.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.registry import default_engines_uri
from jobs.command import CommandParser, print_result, run
from pipelines.indexes.filters import Condition, parse_condition
from pipelines.indexes.queries import Part, Query, query_from_json
from pipelines.json_text import json_text
from pipelines.search import Answer, Searcher

# Of a file of queries, answered together.
QUERIES_AT_ONCE = 256
DESCRIPTION = """Find the nearest rows to texts, images, keys and vectors.

What to look for is the weighted sum of all that is given, each of --text, --image, --key and
--vector as often as you like; with --not- before it, away from it. --weight W after one of them
says how much it counts (1 if it is left out):

    --text "red shoe" --weight 2 --image boot.jpg --not-key k17 --weight 0.5

Conditions all hold for every hit: COLUMN=VALUE, COLUMN=VALUE|VALUE (one of them; a bar in a value
is \\|), and >=, >, <=, < in the place of =, on `key` and the columns that were carried from the
catalog. Dates and times are written as 2026-03-01 and 2026-03-01T12:00:00.

    --where "brand=acme|bolt" --where "price<20"

A file of queries has one JSON object a line, and gets one line of JSON for each:

    {"parts": [{"text": "red shoe"}, {"key": "k17", "weight": -0.5}],
     "where": [{"column": "price", "operator": "lt", "value": 20}]}

Parts are of text, image (base64), key and vector; operators are eq, in (a list), ge, gt, le, lt."""


class _Asked(NamedTuple):
    """A line of a file of queries."""

    line: int
    query: Query
    where: tuple[Condition, ...]


class _AddPart(argparse.Action):
    """Notes a part of the query, in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert option_string is not None
        parts = [*(getattr(namespace, "parts", None) or []), (option_string, values, None)]
        namespace.parts = parts


class _WeighPart(argparse.Action):
    """Gives the part before it a weight."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parts = list(getattr(namespace, "parts", None) or [])
        if not parts or parts[-1][2] is not None:
            parser.error(f"--weight {values}: name it after the one part that it is of")
        option, content, _ = parts[-1]
        namespace.parts = [*parts[:-1], (option, content, values)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    options = parser.parse_options(argv)
    parts = getattr(options, "parts", None) or []
    if bool(parts) == (options.queries is not None):
        parser.error(
            "say what to look for: --text, --image, --key or --vector, or --queries FILE in their "
            "place"
        )
    where = [parse_condition(text) for text in options.where or []]
    query = Query(parts=tuple(_part(*part) for part in parts)) if parts else None
    searcher = Searcher(options.store, engines_uri=options.engines, modality=options.among)
    if query is None:
        _answer_file(searcher, Path(options.queries), num_hits=options.num_hits, where=where)
        return 0
    (answer,) = searcher.search([query], num_hits=options.num_hits, where=where)
    if not options.json:
        for note in answer.notes:
            print(f"note: {note}", file=sys.stderr)
    print_result(answer, as_json=options.json, text=_table(answer))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("query", description=DESCRIPTION)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--store", required=True, metavar="URI", help="a store with an index")
    for prefix, what in (("", "near to"), ("not-", "away from")):
        for name, metavar, kind in (
            ("text", "TEXT", "words"),
            ("image", "FILE", "a picture"),
            ("key", "KEY", "a row of the store, which is no hit itself"),
            ("vector", "FILE.npy", "an embedding of the same engine"),
        ):
            parser.add_argument(
                f"--{prefix}{name}", action=_AddPart, metavar=metavar, help=f"{what} {kind}"
            )
            parser.for_once.add(f"{prefix}{name}".replace("-", "_"))
    parser.add_argument(
        "--weight", action=_WeighPart, type=float, metavar="W", help="of the part before it"
    )
    parser.for_once.add("weight")
    parser.add_argument(
        "--queries", metavar="FILE", help="queries in JSON lines; prints an answer a line"
    )
    parser.add_argument(
        "--where", action="append", metavar="CONDITION", help="what a hit's column must be"
    )
    parser.add_argument(
        "-k", type=int, default=10, dest="num_hits", metavar="N", help="hits (default: 10)"
    )
    parser.add_argument(
        "--among", choices=("image", "text"), help="which embeddings; images, if there are any"
    )
    parser.add_argument(
        "--engines", default=default_engines_uri(), metavar="URI", help="where engines are kept"
    )
    return parser


def _part(option: str, content: str, weight: float | None) -> Part:
    sign = -1 if option.startswith("--not-") else 1
    weight = 1.0 if weight is None else weight
    if weight <= 0:
        raise ValueError(
            f"{option} --weight {weight:g}: expected more than 0; --not-... asks for what is far"
        )
    name = option.removeprefix("--").removeprefix("not-")
    if name == "text":
        return Part(text=content, weight=sign * weight)
    if name == "key":
        return Part(key=content, weight=sign * weight)
    try:
        if name == "image":
            return Part(image=Path(content).read_bytes(), weight=sign * weight)
        vector = np.load(content, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{option} {content}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{option} {content}: no file of NumPy ({error})") from error
    if vector.dtype.kind not in "fiu" or vector.ndim < 1 or vector.size != vector.shape[-1]:
        raise ValueError(
            f"{option} {content}: holds {vector.dtype} {list(vector.shape)}; expected one vector"
        )
    return Part(vector=tuple(vector.ravel().tolist()), weight=sign * weight)


def _answer_file(
    searcher: Searcher, path: Path, *, num_hits: int, where: Sequence[Condition]
) -> None:
    try:
        with path.open(encoding="utf-8") as lines:
            asked = _asked(lines)
            while chunk := list(islice(asked, QUERIES_AT_ONCE)):
                for answer in _answers(searcher, chunk, num_hits=num_hits, where=where):
                    print(json_text(answer), flush=True)
    except OSError as error:
        raise ValueError(f"--queries {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--queries {path}: {error}") from error


def _asked(lines: Iterable[str]) -> Iterator[_Asked]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with _line(number):
                query, where = query_from_json(json.loads(line))
            yield _Asked(number, query, where)


def _answers(
    searcher: Searcher, asked: Sequence[_Asked], *, num_hits: int, where: Sequence[Condition]
) -> Iterator[Answer]:
    """In the order asked; neighbours of the same conditions are asked together."""
    # Their text, since 1 equals True, and is not the same to ask for.
    for _, group in groupby(asked, key=lambda one: repr(one.where)):
        together = list(group)
        conditions = [*where, *together[0].where]
        try:
            yield from searcher.search(
                [one.query for one in together], num_hits=num_hits, where=conditions
            )
        except ValueError:
            for one in together:
                with _line(one.line):
                    searcher.search([one.query], num_hits=num_hits, where=conditions)
            raise


@contextmanager
def _line(number: int) -> Iterator[None]:
    """Say of an error which line it is of."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error


def _table(answer: Answer) -> str:
    """A line for each hit: score, key, and the carried columns."""
    return "\n".join(
        "  ".join(
            [
                f"{hit.score:7.4f}  {hit.key}",
                *(f"{name}={value}" for name, value in hit.columns.items()),
            ]
        )
        for hit in answer.hits
    )


if __name__ == "__main__":
    run(main, sys.argv[1:])
