"""Draws and captions small scenes of coloured shapes, the same ones for the same seed.

It does not know of models, tokens or training; it imports NumPy and Pillow and nothing heavier.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "heldout"]
Rgb = tuple[int, int, int]

IMAGE_SIZE = 128
"""Side of a drawn scene, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

COLOURS: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (245, 225, 40),
    "green": (35, 150, 55),
    "cyan": (60, 215, 225),
    "blue": (35, 65, 210),
    "purple": (125, 40, 165),
    "pink": (250, 150, 195),
}

BACKGROUNDS: dict[str, Rgb] = {
    "white": (246, 246, 246),
    "black": (14, 14, 14),
    "gray": (130, 130, 130),
    "brown": (110, 68, 35),
    "green": COLOURS["green"],
    "blue": COLOURS["blue"],
    "yellow": COLOURS["yellow"],
    "pink": COLOURS["pink"],
}

# Radii as fractions of the side. Their ranges after jitter stay a factor of 1.5 apart, so that the
# word for the size can be read off the picture.
SIZES = {"small": 0.095, "large": 0.19}
COUNTED_RADIUS = 0.092

PLACES: dict[str, tuple[float, float]] = {
    "in the top left corner": (0.24, 0.24),
    "at the top": (0.5, 0.24),
    "in the top right corner": (0.76, 0.24),
    "on the left": (0.24, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.76, 0.5),
    "in the bottom left corner": (0.24, 0.76),
    "at the bottom": (0.5, 0.76),
    "in the bottom right corner": (0.76, 0.76),
}

# Where the first figure of a pair lies, as a unit step from the middle; the second lies opposite.
RELATIONS: dict[str, tuple[int, int]] = {
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}

COUNTS = {"two": 2, "three": 3, "four": 4}

# Shares of the three kinds of scene: one figure, a pair in a relation, several alike.
_KINDS = ("single", "pair", "counted")
_KIND_SHARES = (0.3, 0.5, 0.2)

_PLACE_JITTER = 0.025
_RADIUS_JITTER = 0.12
_ANGLE_JITTER = math.radians(9)
_CHANNEL_JITTER = 14

# Drawn this many times larger and scaled down, because ImageDraw does not smooth edges.
_SUPERSAMPLING = 2

# About a tenth of all captions is held out.
_HELDOUT_MODULUS = 10

# A held-out iterator ends when this many draws in a row bring no new caption.
_MAX_STALE_DRAWS = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One coloured shape, placed."""

    shape: str
    """One of SHAPES."""

    rgb: Rgb
    """Fill colour after jitter, 0 to 255 a channel."""

    centre: tuple[float, float]
    """Place of the centre, x then y, as fractions of the side from the top left."""

    radius: float
    """Half the extent of the shape, roughly, as a fraction of the side."""

    angle: float
    """Clockwise turn, in radians."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A captioned picture, described but not yet drawn."""

    caption: str
    """What the picture shows, in English, lower case."""

    background_rgb: Rgb
    """Background colour after jitter, 0 to 255 a channel."""

    figures: tuple[Figure, ...]
    """The figures, in the order the caption names them; they do not overlap."""

    def draw(self) -> Image.Image:
        """Draws the scene.

        Returns:
            An RGB image of IMAGE_SIZE x IMAGE_SIZE pixels; the same scene gives the same pixels.
        """
        side = IMAGE_SIZE * _SUPERSAMPLING
        canvas = Image.new("RGB", (side, side), self.background_rgb)
        pen = ImageDraw.Draw(canvas)
        for figure in self.figures:
            _draw_figure(pen, figure=figure, side=side, background_rgb=self.background_rgb)
        return canvas.reduce(_SUPERSAMPLING)


def split_of(caption: str) -> Split:
    """Says which split a caption belongs to, by a hash of its text that never changes."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % _HELDOUT_MODULUS == 0 else "train"


def scenes(seed: int, *, split: Split) -> Iterator[Scene]:
    """Yields scenes of one split, the same sequence for the same seed.

    The train split never ends and repeats captions over differing pictures. The held-out split
    yields each caption at most once, and ends when no new ones turn up, far beyond 10,000.

    Args:
        seed: Seed of the random generator, 0 or greater.
        split: Which captions to yield; no caption is in both splits.

    Yields:
        Scenes, not yet drawn.
    """
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    num_stale_draws = 0
    while num_stale_draws < _MAX_STALE_DRAWS:
        scene = _compose(rng)
        if split_of(scene.caption) != split:
            continue
        if split == "heldout":
            if scene.caption in seen:
                num_stale_draws += 1
                continue
            seen.add(scene.caption)
            num_stale_draws = 0
        yield scene


def _compose(rng: np.random.Generator) -> Scene:
    """Draws one scene at random, of either split."""
    background = _choice(rng, tuple(BACKGROUNDS))
    colours = [colour for colour in COLOURS if colour != background]
    rng.shuffle(colours)
    kind = _KINDS[int(rng.choice(len(_KINDS), p=_KIND_SHARES))]
    if kind == "single":
        phrase, figures = _compose_single(rng, colour=colours[0])
    elif kind == "pair":
        phrase, figures = _compose_pair(rng, colours=(colours[0], colours[1]))
    else:
        phrase, figures = _compose_counted(rng, colour=colours[0])
    return Scene(
        caption=f"{phrase} on a {background} background",
        background_rgb=_jittered_rgb(rng, BACKGROUNDS[background]),
        figures=figures,
    )


def _compose_single(rng: np.random.Generator, *, colour: str) -> tuple[str, tuple[Figure, ...]]:
    size, shape, place = (
        _choice(rng, tuple(SIZES)),
        _choice(rng, SHAPES),
        _choice(rng, tuple(PLACES)),
    )
    figure = _place(rng, shape=shape, colour=colour, centre=PLACES[place], radius=SIZES[size])
    return f"a {size} {colour} {shape} {place}", (figure,)


def _compose_pair(
    rng: np.random.Generator, *, colours: tuple[str, str]
) -> tuple[str, tuple[Figure, ...]]:
    relation = _choice(rng, tuple(RELATIONS))
    step_x, step_y = RELATIONS[relation]
    # Both figures share a shift along the other axis, so that a pair is not always in the middle.
    shift = rng.uniform(-0.2, 0.2)
    phrases, figures = [], []
    for colour, sign in zip(colours, (1, -1), strict=True):
        size, shape = _choice(rng, tuple(SIZES)), _choice(rng, SHAPES)
        centre = (
            0.5 + sign * step_x * 0.26 + abs(step_y) * shift,
            0.5 + sign * step_y * 0.26 + abs(step_x) * shift,
        )
        phrases.append(f"a {size} {colour} {shape}")
        figures.append(_place(rng, shape=shape, colour=colour, centre=centre, radius=SIZES[size]))
    return f"{phrases[0]} {relation} {phrases[1]}", tuple(figures)


def _compose_counted(rng: np.random.Generator, *, colour: str) -> tuple[str, tuple[Figure, ...]]:
    count, shape = _choice(rng, tuple(COUNTS)), _choice(rng, SHAPES)
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    cells = rng.permutation(list(PLACES.values()))[: COUNTS[count]]
    figures = tuple(
        _place(
            rng,
            shape=shape,
            colour=colour,
            centre=(float(cell[0]), float(cell[1])),
            radius=COUNTED_RADIUS,
        )
        for cell in cells
    )
    return f"{count} {colour} {plural}", figures


def _place(
    rng: np.random.Generator,
    *,
    shape: str,
    colour: str,
    centre: tuple[float, float],
    radius: float,
) -> Figure:
    """Jitters the place, size, turn and colour that the caption stands for."""
    offset_x, offset_y = rng.uniform(-_PLACE_JITTER, _PLACE_JITTER, size=2)
    return Figure(
        shape=shape,
        rgb=_jittered_rgb(rng, COLOURS[colour]),
        centre=(centre[0] + float(offset_x), centre[1] + float(offset_y)),
        radius=radius * float(rng.uniform(1 - _RADIUS_JITTER, 1 + _RADIUS_JITTER)),
        angle=float(rng.uniform(-_ANGLE_JITTER, _ANGLE_JITTER)),
    )


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _jittered_rgb(rng: np.random.Generator, rgb: Rgb) -> Rgb:
    shifts = rng.integers(-_CHANNEL_JITTER, _CHANNEL_JITTER + 1, size=3)
    red, green, blue = (
        min(255, max(0, channel + int(shift))) for channel, shift in zip(rgb, shifts, strict=True)
    )
    return red, green, blue


def _draw_figure(
    pen: ImageDraw.ImageDraw, *, figure: Figure, side: int, background_rgb: Rgb
) -> None:
    x, y = figure.centre[0] * side, figure.centre[1] * side
    radius = figure.radius * side
    if figure.shape in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=figure.rgb)
        if figure.shape == "ring":
            hole = radius * 0.55
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background_rgb)
        return
    cos, sin = math.cos(figure.angle) * radius, math.sin(figure.angle) * radius
    pen.polygon(
        [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _OUTLINES[figure.shape]],
        fill=figure.rgb,
    )


def _star(*, num_points: int, inner_radius: float) -> tuple[tuple[float, float], ...]:
    turns = (math.pi * step / num_points - math.pi / 2 for step in range(2 * num_points))
    return tuple(
        (math.cos(turn) * reach, math.sin(turn) * reach)
        for turn, reach in zip(turns, (1.0, inner_radius) * num_points, strict=True)
    )


# Corners in units of the radius, x to the right and y down.
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)),
    "triangle": ((0.0, -0.95), (0.85, 0.68), (-0.85, 0.68)),
    "star": _star(num_points=5, inner_radius=0.42),
    "cross": tuple(
        (u, v)
        for u, v in (
            (-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3),
            (0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3),
        )
    ),
}  # fmt: skip
