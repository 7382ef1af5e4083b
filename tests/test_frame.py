"""Tests of pipelines/indexes/frame.py: order and cosines stay, whatever the coordinates."""

import numpy as np
import pytest

from pipelines.indexes.frame import Frame, identity, random_rotation

DIM = 24


def unit_vectors(num_rows: int, *, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)
    vectors[:, 0] += 3
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("is_rotated", [False, True])
def test_products_in_a_frame_give_the_cosines(is_rotated):
    rows, queries = unit_vectors(50, seed=1), unit_vectors(5, seed=2)
    rotation = random_rotation(DIM, seed=3) if is_rotated else None
    frame = Frame(mean=rows.mean(axis=0), scale=1.7, rotation=rotation)
    moved = frame.of_rows(rows)
    products = frame.of_queries(queries) @ moved.T
    assert np.allclose(frame.cosines(products, queries), queries @ rows.T, atol=1e-5)
    assert not np.allclose(products, queries @ rows.T, atol=0.1)
    assert np.allclose([frame.row_of(vector) for vector in moved], rows, atol=1e-5)
    assert np.allclose(moved.mean(axis=0), 0, atol=1e-5)

    again = Frame.from_bytes(frame.to_bytes())
    assert np.array_equal(again.of_rows(rows), moved)
    assert (again.rotation is None) == (not is_rotated)


def test_the_identity_changes_nothing():
    rows = unit_vectors(5, seed=1)
    assert np.array_equal(identity(DIM).of_rows(rows), rows)


def test_a_rotation_is_orthogonal_and_of_its_seed():
    rotation = random_rotation(DIM, seed=1)
    assert np.allclose(rotation @ rotation.T, np.eye(DIM), atol=1e-6)
    assert np.array_equal(rotation, random_rotation(DIM, seed=1))
    assert not np.allclose(rotation, random_rotation(DIM, seed=2))


def test_a_damaged_file_is_an_error():
    content = identity(DIM).to_bytes()
    with pytest.raises(ValueError, match="no arrays can be read"):
        Frame.from_bytes(content[: len(content) // 2])
