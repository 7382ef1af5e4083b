"""Same seed, same scenes; splits apart; pictures that show what their captions say."""

import itertools

import numpy as np
import pytest
from PIL import Image

from jobs.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    Split,
    scenes,
    split_of,
)


def first_scenes(seed: int, *, split: Split, count: int) -> list[Scene]:
    return list(itertools.islice(scenes(seed, split=split), count))


def nearest_name(rgb: tuple[int, int, int], names: dict[str, tuple[int, int, int]]) -> str:
    return min(
        names, key=lambda name: sum(abs(a - b) for a, b in zip(names[name], rgb, strict=True))
    )


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_same_seed_gives_the_same_scenes_and_pixels(split: Split) -> None:
    once = first_scenes(7, split=split, count=40)
    again = first_scenes(7, split=split, count=40)
    other = first_scenes(8, split=split, count=40)
    assert once == again
    assert once != other
    for left, right in zip(once, again, strict=True):
        assert left.draw().tobytes() == right.draw().tobytes()


def test_split_of_is_stable_across_versions() -> None:
    # Were the hash to change, the checkpoint would have been trained on captions held out here.
    assert split_of("three blue rings on a yellow background") == "heldout"
    assert split_of("a large green star at the top on a red background") == "train"


def test_heldout_captions_are_distinct_and_never_trained() -> None:
    trained = {scene.caption for scene in first_scenes(0, split="train", count=1500)}
    heldout = [scene.caption for scene in first_scenes(1, split="heldout", count=2000)]
    assert len(set(heldout)) == len(heldout) == 2000
    assert not trained & set(heldout)
    assert {split_of(caption) for caption in trained} == {"train"}
    assert {split_of(caption) for caption in heldout} == {"heldout"}


def test_train_captions_repeat_over_different_pictures() -> None:
    by_caption: dict[str, list[Scene]] = {}
    for scene in first_scenes(0, split="train", count=1500):
        by_caption.setdefault(scene.caption, []).append(scene)
    left, right = next(alike for alike in by_caption.values() if len(alike) > 1)[:2]
    assert left.draw().tobytes() != right.draw().tobytes()


def test_pictures_are_rgb_of_the_stated_size() -> None:
    for scene in first_scenes(2, split="train", count=20):
        picture = scene.draw()
        assert isinstance(picture, Image.Image)
        assert picture.mode == "RGB"
        assert picture.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_picture_shows_the_colours_of_its_caption() -> None:
    for scene in first_scenes(3, split="heldout", count=200):
        pixels = np.asarray(scene.draw())
        background = scene.caption.split(" on a ")[-1].removesuffix(" background")
        corner = pixels[0, 0]
        assert nearest_name(tuple(int(c) for c in corner), BACKGROUNDS) == background, scene.caption
        named = [word for word in scene.caption.rsplit(" on a ", 1)[0].split() if word in COLOURS]
        for index, figure in enumerate(scene.figures):
            # A ring has its hole in the middle, so look at its left rim.
            reach = 0.78 * figure.radius if figure.shape == "ring" else 0.0
            x, y = figure.centre
            seen = pixels[int(y * IMAGE_SIZE), int((x - reach) * IMAGE_SIZE)]
            expected = named[min(index, len(named) - 1)]
            assert nearest_name(tuple(int(c) for c in seen), COLOURS) == expected, scene.caption


def test_figures_lie_where_the_caption_says() -> None:
    for scene in first_scenes(4, split="train", count=500):
        if len(scene.figures) != 2 or scene.caption.startswith("two"):
            continue
        (x_first, y_first), (x_second, y_second) = (figure.centre for figure in scene.figures)
        if " above " in scene.caption:
            assert y_first < y_second - 0.4
        elif " below " in scene.caption:
            assert y_first > y_second + 0.4
        elif " to the left of " in scene.caption:
            assert x_first < x_second - 0.4
        else:
            assert " to the right of " in scene.caption
            assert x_first > x_second + 0.4


def test_caption_counts_the_figures_and_names_their_shape() -> None:
    for scene in first_scenes(5, split="train", count=500):
        first_word, rest = scene.caption.split(" ", 1)
        if first_word in COUNTS:
            assert len(scene.figures) == COUNTS[first_word]
        for figure in scene.figures:
            assert figure.shape in SHAPES
            assert figure.shape in rest


def test_figures_stay_inside_the_picture_and_apart() -> None:
    for scene in first_scenes(6, split="train", count=500):
        for figure in scene.figures:
            for coordinate in figure.centre:
                assert figure.radius <= coordinate <= 1 - figure.radius, scene.caption
        for left, right in itertools.combinations(scene.figures, 2):
            apart = np.hypot(left.centre[0] - right.centre[0], left.centre[1] - right.centre[1])
            assert apart > left.radius + right.radius, scene.caption
