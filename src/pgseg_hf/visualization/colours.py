"""Colours of labels and groups. A colour only depends on the index, unless the user chooses it."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import ImageColor

# Okabe and Ito, "Color Universal Design" (2008), ordered so that neighbours differ. Their black is hard to see on a
# photo, so it is replaced by a dark wine red.
BASE_COLOURS = (
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (86, 180, 233),
    (213, 94, 0),
    (120, 20, 80),
)
_NUM_COLOURS = 1024  # distinct colours; after that they repeat
_NUM_GROUP_COLOURS = 64
_SAME_COLOUR = 60**2  # squared distance in units of `_seen_colours`

# Simulation of protanopia and deuteranopia in linear RGB: Machado et al., "A Physiologically-based Model for Simulation
# of Color Vision Deficiency" (2009), severity 1.
_PROTANOPIA = (
    (0.152286, 1.052583, -0.204868),
    (0.114503, 0.786281, 0.099216),
    (-0.003882, -0.048116, 1.051998),
)
_DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)


def palette(n: int) -> npt.NDArray[np.uint8]:
    """The first `n` label colours, uint8 [n, 3] (RGB).

    The first eight are safe for colour-blind readers (Okabe-Ito). Each further colour is the one farthest from all
    previous ones, in the worst of normal, protanope and deuteranope vision. `palette(n)[:k]` equals `palette(k)`. The
    first 1,024 colours are distinct; then they repeat.

    Raises:
        ValueError: `n` is negative.
    """
    if n < 0:
        raise ValueError(f"The number of colours must not be negative, got {n}.")
    if n <= len(BASE_COLOURS):
        return np.array(BASE_COLOURS, dtype=np.uint8)[:n]
    return _all_colours()[np.arange(n) % _NUM_COLOURS]


def label_colours(labels: Sequence[str], chosen: Mapping[str, str] | None = None) -> npt.NDArray[np.uint8]:
    """Colours of labels, uint8 [N, 3] (RGB): the `chosen` ones ("#rrggbb" by label) and otherwise the palette's. A
    colour of the palette that is close to a chosen one is replaced by a further colour."""
    colours = palette(len(labels))
    own = [index for index, label in enumerate(labels) if label in (chosen or {})]
    if not chosen or not own:
        return colours
    colours[own] = [ImageColor.getrgb(chosen[labels[index]]) for index in own]
    seen = _seen_colours(colours[own])

    def are_taken(some: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        looks = _seen_colours(some)
        return np.min([_distance(looks, each) for each in seen], axis=0) < _SAME_COLOUR

    doubled = np.setdiff1d(np.flatnonzero(are_taken(colours)), own)
    further = palette(2 * len(labels) + len(BASE_COLOURS))[len(labels) :]
    further = further[~are_taken(further)][: len(doubled)]
    colours[doubled[: len(further)]] = further
    return colours


def group_palette(n: int) -> npt.NDArray[np.uint8]:
    """Pale colours of `n` groups, distinct from those of labels, uint8 [n, 3] (RGB); they repeat after 64."""
    return _group_colours()[np.arange(n) % _NUM_GROUP_COLOURS]


@functools.cache
def _all_colours() -> npt.NDArray[np.uint8]:
    # No near-black, near-white or grey colours, which look like a part of the photo.
    return _spread(_NUM_COLOURS, lightness=(0.35, 0.93), chroma=(0.05, 1.0))


@functools.cache
def _group_colours() -> npt.NDArray[np.uint8]:
    """Pale colours, the farthest from the first label colours first, uint8 [_NUM_GROUP_COLOURS, 3]."""
    count = len(BASE_COLOURS) + _NUM_GROUP_COLOURS
    return _spread(count, lightness=(0.72, 0.95), chroma=(0.03, 0.1))[len(BASE_COLOURS) :]


def _spread(count: int, lightness: tuple[float, float], chroma: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """The base colours, then colours of a grid, each the farthest from all previous ones, uint8 [count, 3]."""
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    light, *opponents = oklab(linear_light(grid)).T
    pure = np.hypot(*opponents)
    grid = grid[(light > lightness[0]) & (light < lightness[1]) & (pure > chroma[0]) & (pure < chroma[1])]
    base = np.array(BASE_COLOURS, dtype=np.uint8)
    # Integers, so that the result is the same on every machine.
    candidates, chosen = _seen_colours(grid), _seen_colours(base)
    distance = np.min([_distance(candidates, colour) for colour in chosen], axis=0)
    colours = list(base)
    while len(colours) < count:
        farthest = int(distance.argmax())
        colours.append(grid[farthest])
        distance = np.minimum(distance, _distance(candidates, candidates[farthest]))
    return np.array(colours, dtype=np.uint8)


def linear_light(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Converts sRGB bytes [N, 3] to linear RGB from 0 to 1."""
    value = rgb / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Converts linear RGB [N, 3] to Oklab [N, 3] (Ottosson, "A perceptual color space for image processing", 2020)."""
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


def _seen_colours(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Colours [N, 3] in three kinds of vision, as Oklab in units of 1/1000, [N, 3 kinds, 3]."""
    linear = linear_light(rgb)
    kinds = [linear, *(np.clip(linear @ np.array(m).T, 0, 1) for m in (_PROTANOPIA, _DEUTERANOPIA))]
    return np.stack([np.rint(oklab(kind) * 1000) for kind in kinds], axis=1).astype(np.int32)


def _distance(colours: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Squared distances of colours [N, kinds, 3] from a colour [kinds, 3] in the least sensitive kind of vision."""
    return ((colours - other) ** 2).sum(axis=-1).min(axis=-1)
