"""Batches of JPEGs: where each one lies."""

import numpy as np

from engine.decoding.jpeg_header import Geometry
from engine.decoding.jpegs import jpegs_of


def test_each_image_is_where_its_bounds_say():
    images = [b"one", b"", b"three"]
    geometries = [Geometry(20, 30, 1), Geometry(16, 16, 6), Geometry(5, 7, 8)]
    jpegs = jpegs_of(images, geometries=geometries)
    assert len(jpegs) == 3
    assert [jpegs.image(row) for row in range(3)] == images
    assert jpegs.geometries.tolist() == [list(geometry) for geometry in geometries]
    assert jpegs.content.dtype == np.uint8
    assert jpegs.bounds.tolist() == [[0, 3], [3, 3], [3, 8]]


def test_no_images():
    jpegs = jpegs_of([], geometries=[])
    assert (len(jpegs), jpegs.bounds.shape, jpegs.geometries.shape) == (0, (0, 2), (0, 3))
