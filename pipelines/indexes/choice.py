"""Chooses what kind of index to build: exact, a graph, or lists of quantized vectors, and says why.

Knows nothing of FAISS but the names of its types, and nothing of how an index is built.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.errors import PipelineError

Kind = Literal["exact", "hnsw", "ivf"]

# An exact search of 20,000 x 512 takes 2.6 ms on one thread (AMD EPYC, AVX2).
MAX_EXACT_VALUES = 20_000 * 512
# A graph answers quickest, but nothing can be removed from it: it is built anew each time, which
# for 100,000 x 512 takes 12 s on two cores.
MAX_HNSW_ROWS = 200_000
HNSW_LINKS = 32
# More lists are found through a graph of their centroids.
MAX_FLAT_LISTS = 8192
# FAISS trains no product quantizer of 8 bits with fewer.
MIN_PQ_ROWS = 256
MIN_LISTS, MAX_LISTS = 16, 131_072
# Above this recall 8 bits for each value are too few: of 200,000 x 512 the ten nearest by such
# codes are 0.97 to 0.98 of the exact ones.
MAX_SQ8_RECALL = 0.96
_ID_BYTES = 8

_NAMES = (
    "Flat; HNSW32,SQ8; IVF2048,SQ8 (or Flat, SQfp16, SQ6, SQ4); IVF2048,RaBitQ4,Refine(SQfp16) (2 "
    "to 8 bits; RaBitQ is 1); IVF2048,PQ64,Refine(SQfp16); IVF65536_HNSW32,... for many lists"
)
_NAME = re.compile(
    r"(?P<exact>Flat)"
    r"|HNSW(?P<links>\d+),(?P<graph_code>SQ8|Flat)"
    r"|IVF(?P<lists>\d+)(_HNSW(?P<coarse>\d+))?,"
    r"((?P<code>Flat|SQfp16|SQ8|SQ6|SQ4)|(?P<short>RaBitQ[2-8]?|PQ\d+)(?P<refine>,Refine\(SQfp16\)))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to build."""

    kind: Kind
    """Decides how it is built and changed."""
    factory: str
    """FAISS's name of the type; `Refine(SQfp16)`: answers are re-ranked by 16-bit vectors, which
    are memory-mapped."""
    num_lists: int
    """Inverted lists; 0 if it has none."""
    is_reranked: bool
    """Whether answers are re-ranked."""
    memory_bytes: int
    """What a search wants in memory: vectors or codes with their ids, centroids and links."""
    reason: str
    """Why, in words."""

    @property
    def is_rotated(self) -> bool:
        """Whether its codes want vectors rotated at random."""
        return "RaBitQ" in self.factory or "PQ" in self.factory


def choose_recipe(
    *, num_rows: int, embedding_dim: int, max_memory_bytes: int, min_recall: float
) -> Recipe:
    """The best index for so many rows that fits.

    Args:
        num_rows: To be indexed.
        embedding_dim: D.
        max_memory_bytes: What a search may want in memory.
        min_recall: The recall@10 that is asked for.

    Raises:
        PipelineError: Nothing fits; it says what would.
    """
    asked = f"{num_rows:,} x {embedding_dim} in {max_memory_bytes:,} bytes"
    candidates: list[tuple[str, str]] = []
    if num_rows * embedding_dim <= MAX_EXACT_VALUES:
        candidates.append(("Flat", "so few are searched exactly in milliseconds"))
    if num_rows <= MAX_HNSW_ROWS:
        why = "a graph answers quickest, and of so few is soon built anew"
        candidates.append((f"HNSW{HNSW_LINKS},Flat", why))
        if min_recall <= MAX_SQ8_RECALL:
            candidates.append((f"HNSW{HNSW_LINKS},SQ8", why))
    lists = _lists_name(num_lists_for(num_rows))
    # Of scalar quantizers none is chosen: 8 bits are searched three times slower than 2 bits, and
    # without vectors to re-rank by have no better recall.
    for bits, name in ((2, "RaBitQ2"), (1, "RaBitQ")):
        why = f"codes of {bits} bit for each value, re-ranked by vectors on the disk"
        candidates.append((f"{lists},{name},Refine(SQfp16)", why))
    if embedding_dim % 16 == 0 and num_rows >= MIN_PQ_ROWS:
        candidates.append(
            (
                f"{lists},PQ{embedding_dim // 16},Refine(SQfp16)",
                "codes of half a bit for each value",
            )
        )
    recipes = [
        named_recipe(name, num_rows=num_rows, embedding_dim=embedding_dim, reason=reason)
        for name, reason in candidates
    ]
    for place, recipe in enumerate(recipes):
        if recipe.memory_bytes <= max_memory_bytes:
            larger = "".join(
                f"; {other.factory} would want {other.memory_bytes:,}"
                for other in recipes[:place][-1:]
            )
            why = f"{asked}: {recipe.reason} ({recipe.memory_bytes:,} bytes{larger})"
            return replace(recipe, reason=why)
    least = recipes[-1]
    raise PipelineError(
        f"max_memory_bytes={max_memory_bytes}: an index of {num_rows} x {embedding_dim} wants "
        f"{least.memory_bytes} at least ({least.factory}); raise --max-memory-bytes, or take a "
        "machine with more memory"
    )


def named_recipe(
    factory: str, *, num_rows: int, embedding_dim: int, reason: str = "asked for by name"
) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: No such type, or it does not go with the dimension.
    """
    match = _NAME.fullmatch(factory)
    if match is None:
        raise ValueError(f"factory={factory!r}: expected one of {_NAMES}")
    if match["exact"]:
        kind: Kind = "exact"
        num_lists, row_bytes = 0, 4 * embedding_dim
    elif match["links"]:
        kind, num_lists = "hnsw", 0
        code_bytes = embedding_dim * (4 if match["graph_code"] == "Flat" else 1)
        # Twice as many links in the lowest layer, 4 bytes each; level, offset and id.
        row_bytes = code_bytes + 2 * 4 * int(match["links"]) + 3 * _ID_BYTES
    else:
        kind, num_lists = "ivf", int(match["lists"])
        if num_lists < 1:
            raise ValueError(f"factory={factory!r}: expected at least one list")
        if ",PQ" in factory and num_rows < MIN_PQ_ROWS:
            raise ValueError(
                f"factory={factory!r}: {num_rows} rows are fewer than the {MIN_PQ_ROWS} that a "
                "product quantizer is trained with; name another"
            )
        row_bytes = _code_bytes(match["code"] or match["short"], embedding_dim) + _ID_BYTES
    return Recipe(
        kind=kind,
        factory=factory,
        num_lists=num_lists,
        is_reranked=bool(match["refine"]),
        memory_bytes=num_rows * row_bytes + 4 * num_lists * embedding_dim,
        reason=reason,
    )


def num_lists_for(num_rows: int) -> int:
    """Of inverted lists: a power of two near four times the square root of the rows.

    Of a million, 4,096 lists and no more than 35 s of k-means on two cores.
    """
    power = round(math.log2(4 * math.sqrt(max(num_rows, 1))) - 0.2)
    return min(max(1 << power, MIN_LISTS), MAX_LISTS)


def _lists_name(num_lists: int) -> str:
    return f"IVF{num_lists}" + ("_HNSW32" if num_lists > MAX_FLAT_LISTS else "")


def _code_bytes(code: str, embedding_dim: int) -> int:
    """Of one vector, as FAISS stores it."""
    if code.startswith("RaBitQ"):
        bits = int(code.removeprefix("RaBitQ") or 1)
        # The first bit with two factors; the others with two more, and one for the bound.
        extra = 0 if bits == 1 else -(-embedding_dim * (bits - 1) // 8) + 12
        return -(-embedding_dim // 8) + 8 + extra
    if code.startswith("PQ"):
        num_parts = int(code.removeprefix("PQ"))
        if not num_parts or embedding_dim % num_parts:
            raise ValueError(f"factory: {code} does not divide {embedding_dim} dimensions")
        return num_parts
    bits = {"Flat": 32, "SQfp16": 16, "SQ8": 8, "SQ6": 6, "SQ4": 4}[code]
    return -(-embedding_dim * bits // 8)
