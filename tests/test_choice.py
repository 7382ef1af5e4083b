"""Tests of pipelines/indexes/choice.py: what fits, and sizes against FAISS's own."""

import faiss
import pytest

from pipelines.errors import PipelineError
from pipelines.indexes.choice import choose_recipe, named_recipe, num_lists_for

GIB = 2**30


@pytest.mark.parametrize(
    ("num_rows", "dim", "memory_bytes", "min_recall", "factory"),
    [
        (0, 512, 1, 0.95, "Flat"),
        (20_000, 512, GIB, 0.95, "Flat"),
        (20_000, 512, 20_000 * 1_000, 0.95, "HNSW32,SQ8"),
        (20_000, 512, 20_000 * 1_000, 0.97, "IVF512,RaBitQ2,Refine(SQfp16)"),
        (200_000, 512, GIB, 0.95, "HNSW32,Flat"),
        (200_000, 512, GIB // 4, 0.95, "HNSW32,SQ8"),
        (1_000_000, 512, GIB, 0.95, "IVF4096,RaBitQ2,Refine(SQfp16)"),
        (1_000_000, 512, GIB // 10, 0.95, "IVF4096,RaBitQ,Refine(SQfp16)"),
        (1_000_000, 512, GIB // 20, 0.95, "IVF4096,PQ32,Refine(SQfp16)"),
        (10_000_000, 256, 2 * GIB, 0.9, "IVF8192,RaBitQ2,Refine(SQfp16)"),
        (10**9, 512, 200 * GIB, 0.95, "IVF131072_HNSW32,RaBitQ2,Refine(SQfp16)"),
    ],
)
def test_the_best_that_fits_is_chosen(num_rows, dim, memory_bytes, min_recall, factory):
    recipe = choose_recipe(
        num_rows=num_rows,
        embedding_dim=dim,
        max_memory_bytes=memory_bytes,
        min_recall=min_recall,
    )
    assert recipe.factory == factory
    assert recipe.memory_bytes <= memory_bytes
    assert f"{num_rows:,} x {dim} in {memory_bytes:,} bytes" in recipe.reason


def test_what_does_not_fit_is_said_with_what_would():
    with pytest.raises(PipelineError, match=r"max_memory_bytes=1000000: .* wants \d+ at least"):
        choose_recipe(num_rows=10**6, embedding_dim=512, max_memory_bytes=10**6, min_recall=0.95)


@pytest.mark.parametrize(
    "name",
    ["IVF4,Flat", "IVF4,SQfp16", "IVF4,SQ8", "IVF4,SQ6", "IVF4,SQ4", "IVF4_HNSW32,SQ8"]
    + [f"IVF4,{code},Refine(SQfp16)" for code in ("RaBitQ", "RaBitQ2", "RaBitQ4", "RaBitQ8")]
    + ["IVF4,PQ16,Refine(SQfp16)"],
)
@pytest.mark.parametrize("dim", [64, 80, 512])
def test_bytes_of_a_row_are_those_of_faiss(name, dim):
    recipe = named_recipe(name, num_rows=1000, embedding_dim=dim)
    plain = name.removesuffix(",Refine(SQfp16)")
    index = faiss.index_factory(dim, plain, faiss.METRIC_INNER_PRODUCT)
    assert recipe.memory_bytes == 1000 * (index.code_size + 8) + 4 * 4 * dim
    assert (recipe.kind, recipe.num_lists, recipe.is_reranked) == ("ivf", 4, plain != name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "flat",
        "IVF0,SQ8",
        "IVF4",
        "IVF4,RaBitQ",
        "IVF4,SQ8,Refine(SQfp16)",
        "LSH",
        "IVF4,PQ7,Refine(SQfp16)",
    ],
)
def test_names_that_are_none_are_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match="factory"):
        named_recipe(name, num_rows=1000, embedding_dim=64)


def test_lists_grow_with_the_square_root_of_the_rows():
    assert [num_lists_for(rows) for rows in (1, 10**4, 10**6, 10**7, 10**9, 10**12)] == [
        *(16, 256, 4096, 8192, 131_072, 131_072)
    ]
