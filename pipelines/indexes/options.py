"""What an index shall be: bounds of memory and recall, or a type by name.

Knows nothing of how it is built.
"""

from dataclasses import dataclass

from ray._common.utils import get_system_memory

from pipelines.indexes.choice import MIN_PQ_ROWS, Recipe, choose_recipe, named_recipe

DEFAULT_MIN_RECALL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """What an index shall be."""

    max_memory_bytes: int | None = None
    """What a search may want in memory; None: half of this machine's, or of what its container may
    use."""
    min_recall: float = DEFAULT_MIN_RECALL
    """recall@10 that queries of each kind shall have."""
    factory: str | None = None
    """FAISS's name of the type, as `pipelines.indexes.choice` lists them; None: chosen."""
    seed: int = 0
    """Of sample, clusters and rotation."""
    query_texts: tuple[str, ...] = ()
    """What your users ask for, to measure recall with; without any, texts of the store are
    drawn."""
    engines_uri: str | None = None
    """Where the engine is that encodes them; None: the default place."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.max_memory_bytes is not None and self.max_memory_bytes < 1:
            raise ValueError(f"max_memory_bytes={self.max_memory_bytes}: expected at least 1")
        if not 0 <= self.min_recall <= 1:
            raise ValueError(f"min_recall={self.min_recall}: expected 0 to 1")
        if self.factory is not None:
            named_recipe(self.factory, num_rows=MIN_PQ_ROWS, embedding_dim=0)

    @property
    def memory_bytes(self) -> int:
        """The bound, as a number."""
        return self.max_memory_bytes or int(get_system_memory()) // 2


def recipe_for(options: IndexOptions, *, num_rows: int, embedding_dim: int) -> Recipe:
    """What to build of so many rows; PipelineError if nothing fits."""
    if options.factory is not None and num_rows:
        return named_recipe(options.factory, num_rows=num_rows, embedding_dim=embedding_dim)
    return choose_recipe(
        num_rows=num_rows,
        embedding_dim=embedding_dim,
        max_memory_bytes=options.memory_bytes,
        min_recall=options.min_recall,
    )
