"""Agreement of embeddings, on cases small enough to count by hand."""

import math

import numpy as np
import pytest

from engine.accuracy import (
    Agreement,
    Thresholds,
    agreement,
    neighbour_overlap,
    pair_recalls,
    row_cosines,
    top1_accuracy,
)

GOOD = Agreement(
    num_rows=128, cosine_mean=0.999, cosine_p1=0.99, cosine_min=0.9, neighbour_overlap=0.93
)


def at_angles(*degrees: float) -> np.ndarray:
    """Unit vectors of a plane."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def random_rows(num_rows: int, *, seed: int, dim: int = 16) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_cosine_of_each_row_with_its_own() -> None:
    cosines = row_cosines(at_angles(0, 60, 90, 10), at_angles(0, 0, 0, 190))
    assert cosines.dtype == np.float64
    np.testing.assert_allclose(cosines, [1, 0.5, 0, -1], atol=1e-7)


def test_agreement_sums_up_the_cosines() -> None:
    turned = np.zeros(101)
    turned[[4, 50]] = 60, 90
    found = agreement(at_angles(*turned), at_angles(*np.zeros(101)))
    assert found.num_rows == 101
    assert found.cosine_mean == pytest.approx((99 + 0.5) / 101)
    assert found.cosine_p1 == pytest.approx(0.5)  # the second lowest of 101
    assert found.cosine_min == pytest.approx(0, abs=1e-7)


def test_a_row_is_compared_with_its_own_row_only() -> None:
    rows = random_rows(50, seed=0)
    assert agreement(rows, rows).cosine_min == pytest.approx(1)
    assert agreement(rows[::-1], rows).cosine_mean < 0.5


def test_neighbours_of_few_rows_are_all_the_others() -> None:
    rows = random_rows(11, seed=1)
    assert neighbour_overlap(random_rows(11, seed=2), rows) == 1.0


def test_neighbour_overlap_by_hand() -> None:
    # Twelve rows leave out one of eleven others: the farthest. Moving the last row to the other
    # end makes it the farthest of all the others, in the place of another for most.
    before = at_angles(*range(0, 60, 5))
    assert neighbour_overlap(before, before) == 1.0
    after = at_angles(*range(0, 55, 5), 100)
    # By the reference rows 0 to 5 leave out row 11 (row 5 is 30 degrees from it, 25 from row 0),
    # rows 6 to 11 row 0. Now rows 0 to 10 leave out row 11, and row 11 still row 0.
    assert neighbour_overlap(after, before) == pytest.approx((7 * 10 + 5 * 9) / 120)


def test_neighbour_overlap_does_not_ask_for_their_order() -> None:
    before = at_angles(*range(0, 60, 5))
    nearer = at_angles(*(angle / 2 for angle in range(0, 60, 5)))
    assert neighbour_overlap(nearer, before) == 1.0


def test_copies_of_rows_agree_with_themselves() -> None:
    rows = np.repeat(random_rows(5, seed=3), 20, axis=0)
    assert agreement(rows, rows).neighbour_overlap == 1.0


def test_copies_that_differ_by_rounding_change_places_without_harm() -> None:
    rows = np.repeat(random_rows(5, seed=3), 20, axis=0)
    ours, theirs = (
        (rows + 1e-8 * np.random.default_rng(seed).standard_normal(rows.shape)).astype(np.float32)
        for seed in (10, 11)
    )
    assert not np.array_equal(ours, theirs)
    assert neighbour_overlap(ours, theirs) == 1.0
    for recall in pair_recalls(images=ours, texts=theirs, reference=(theirs, ours)):
        assert recall.measured == recall.reference == {1: 1.0, 5: 1.0, 10: 1.0}


@pytest.mark.parametrize("num_rows", [1, 2])
def test_one_row_and_two(num_rows: int) -> None:
    rows = at_angles(*range(num_rows))
    found = agreement(rows, rows)
    assert found.num_rows == num_rows
    assert found.cosine_min == pytest.approx(1)
    assert found.neighbour_overlap == 1.0


def test_recall_by_hand() -> None:
    # Text i is nearest to image i, but for text 0, which four images come before.
    images = at_angles(*range(0, 120, 10))
    texts = at_angles(44, *range(10, 120, 10))
    to_image, to_text = pair_recalls(images=images, texts=texts, reference=(images, images))
    assert [to_image.direction, to_text.direction] == ["text-to-image", "image-to-text"]
    # Nearer to 44 than 0 (44 away): 10 to 80, eight images.
    assert to_image.measured == pytest.approx({1: 11 / 12, 5: 11 / 12, 10: 1})
    # Image 0 has texts 10 to 40 before 44; images 40 and 50 have their own at 0, image 30 too.
    assert to_text.measured == pytest.approx({1: 11 / 12, 5: 1, 10: 1})
    assert to_image.reference == to_text.reference == {1: 1.0, 5: 1.0, 10: 1.0}


def test_recall_of_chance() -> None:
    recalls = pair_recalls(
        images=random_rows(400, seed=4),
        texts=random_rows(400, seed=5),
        reference=(random_rows(400, seed=6),) * 2,
    )
    for recall in recalls:
        assert recall.measured[1] < recall.measured[10] < 0.07  # 0.025 expected
        assert recall.reference[1] == 1


def test_copies_of_the_own_row_do_not_count_against_it() -> None:
    rows = np.repeat(at_angles(0, 30, 60), 20, axis=0)
    for recall in pair_recalls(images=rows, texts=rows, reference=(rows, rows)):
        assert recall.measured == {1: 1.0, 5: 1.0, 10: 1.0}


def test_rows_that_are_not_numbers_are_not_found() -> None:
    rows = random_rows(40, seed=7)
    images = rows.copy()
    images[:10] = np.nan
    to_image, to_text = pair_recalls(images=images, texts=rows, reference=(rows, rows))
    # A text's own image is NaN for ten, and for the others ten images are in doubt.
    assert to_image.measured == {1: 0.0, 5: 0.0, 10: 0.0}
    assert to_text.measured == {1: 0.75, 5: 0.75, 10: 0.75}


def test_zero_shot_accuracy_by_hand() -> None:
    images, classes = at_angles(2, 40, 50, 88), at_angles(0, 90)
    assert top1_accuracy(images, classes=classes, labels=[0, 0, 1, 1]) == 1.0
    assert top1_accuracy(images, classes=classes, labels=[0, 1, 1, 0]) == 0.5


def test_what_just_meets_the_thresholds_passes() -> None:
    assert Thresholds().faults(GOOD) == []


@pytest.mark.parametrize(
    ("fault", "changed"),
    [
        ("1st percentile of cosines 0.9899 is below 0.99", {"cosine_p1": 0.9899}),
        ("lowest cosine 0.8999 is below 0.9", {"cosine_min": 0.8999}),
        ("overlap of ten neighbours 0.9299 is below 0.93", {"neighbour_overlap": 0.9299}),
    ],
)
def test_each_fault_in_words(fault: str, changed: dict[str, float]) -> None:
    measured = {"num_rows": 9, "cosine_mean": 1.0, "cosine_p1": 0.99, "cosine_min": 0.9}
    agreed = Agreement(**{**measured, "neighbour_overlap": 0.93, **changed})
    assert Thresholds().faults(agreed) == [fault]


def test_a_row_that_is_not_a_number_fails() -> None:
    rows = random_rows(200, seed=8)
    broken = rows.copy()
    broken[17] = np.nan
    found = agreement(broken, rows)
    assert math.isnan(found.cosine_min)
    faults = Thresholds().faults(found)
    assert any("lowest cosine nan" in fault for fault in faults)
    assert any("1st percentile of cosines nan" in fault for fault in faults)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_thresholds_out_of_bounds(value: float) -> None:
    with pytest.raises(ValueError, match=rf"max_recall_loss={value}: expected 0 to 1"):
        Thresholds(max_recall_loss=value)
