"""Samples: how many rows they have, and a digest that is their content's own."""

import numpy as np
import pytest

from engine.sample import Sample

PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def sample(
    pixels: np.ndarray | None = PIXELS, texts: tuple[str, ...] | None = ("a", "b"), **other: object
) -> Sample:
    return Sample(**{"uri": "catalog", "pixels": pixels, "texts": texts, **other})


def test_rows_of_each_kind() -> None:
    assert sample().num_rows == 2
    assert sample(texts=None).num_rows == 2
    assert sample(pixels=None, texts=("a", "b", "c")).num_rows == 3


def test_the_digest_is_that_of_the_content() -> None:
    assert len(sample().digest) == 64
    assert sample(PIXELS.copy(), ("a", "b"), uri="copy").digest == sample().digest
    assert sample(np.asfortranarray(PIXELS)).digest == sample().digest
    wide = np.concatenate([PIXELS, PIXELS], axis=2)
    assert sample(wide[:, :, :4]).digest == sample().digest


changed = PIXELS.copy()
changed[1, 3, 3, 2] ^= 1


@pytest.mark.parametrize(
    "other",
    [
        sample(changed),
        sample(PIXELS[::-1]),
        sample(PIXELS[:1]),
        sample(PIXELS.reshape(2, 2, 8, 3)),
        sample(None),
        sample(texts=None),
        sample(texts=("b", "a")),
        sample(texts=("ab", "")),
        sample(texts=("a", "B")),
        sample(texts=("a1:b",)),
        sample(texts=("a", "b", "")),
    ],
)
def test_other_content_has_another_digest(other: Sample) -> None:
    assert other.digest != sample().digest
