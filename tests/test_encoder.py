"""What all backends share: embeddings come out of unit norm, or as NaN."""

import numpy as np
import pytest

from engine.backends.encoder import normalized


def test_rounding_of_16_bit_is_taken_off_the_norm():
    exact = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    found = normalized(exact.astype(np.float16).astype(np.float32) * np.float32(1.004))
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, exact, atol=5e-4)


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, 0.9, 0.0])
def test_a_row_that_is_no_unit_vector_is_nan_and_the_others_are_not(fault: float):
    rows = np.eye(3, dtype=np.float32)
    rows[1, 1] = fault
    found = normalized(rows)
    assert np.isnan(found[1]).all()
    assert np.array_equal(found[[0, 2]], rows[[0, 2]])


def test_no_rows():
    assert normalized(np.empty((0, 8), np.float32)).shape == (0, 8)
