"""Synthetic scenes with captions, tags and exact masks, for tests without data and for controlled experiments.

Some combinations of attributes never occur in the training split, see [`is_novel`].
"""

import math
from dataclasses import dataclass, fields
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from ..prompts import join_words
from .records import Record

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "orange": (240, 135, 25),
    "yellow": (240, 215, 50),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "purple": (130, 50, 160),
    "pink": (240, 130, 180),
    "brown": (110, 65, 35),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}


@dataclass(frozen=True)
class Ground:
    """A background: colour, noise strength in grey levels, width and height of a grain as shares of the image's side
    (0 for one pixel)."""

    color: tuple[int, int, int]
    contrast: float
    grain: tuple[float, float]


GROUNDS: dict[str, Ground] = {
    "grass": Ground((85, 135, 55), 45, (0, 0.1)),
    "sand": Ground((215, 190, 135), 25, (0, 0)),
    "water": Ground((50, 105, 140), 40, (0.3, 0.04)),
    "sky": Ground((150, 195, 235), 35, (0.5, 0.25)),
    "snow": Ground((228, 232, 240), 12, (0.15, 0.15)),
    "asphalt": Ground((95, 95, 100), 35, (0, 0)),
    "wood": Ground((160, 110, 65), 35, (0.6, 0.03)),
    "leaves": Ground((60, 85, 35), 70, (0.08, 0.08)),
}


@dataclass(frozen=True)
class Shape:
    """An outline with corners [P, 2] in the unit circle around the origin, and the outline of a hole or None."""

    outline: np.ndarray
    hole: np.ndarray | None = None


def _around(radii: list[float], turn: float = 0.0) -> np.ndarray:
    """Corners [P, 2] at equal angles with the given radii; the first is at the top, rotated by `turn` steps."""
    angles = 2 * math.pi * (np.arange(len(radii)) + turn) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


def _cross(arm: float) -> np.ndarray:
    """A plus sign with arms of width 2 * `arm`."""
    quarter = np.array([[-arm, -1.0], [arm, -1.0], [arm, -arm]])
    turns = [
        np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
        for a in np.arange(4) * math.pi / 2
    ]
    return np.concatenate([quarter @ turn for turn in turns]) / math.hypot(1, arm)


def _heart() -> np.ndarray:
    angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    height = sum(weight * np.cos((k + 1) * angles) for k, weight in enumerate((13.0, -5.0, -2.0, -1.0)))
    return np.stack([16 * np.sin(angles) ** 3, -height], axis=1) / 17


SHAPES: dict[str, Shape] = {
    "circle": Shape(_around([1.0] * 40)),
    "square": Shape(_around([1.0] * 4, turn=0.5)),
    "triangle": Shape(_around([1.0] * 3)),
    "star": Shape(_around([1.0, 0.42] * 5)),
    "ring": Shape(_around([1.0] * 40), hole=_around([0.55] * 40)),
    "cross": Shape(_cross(0.3)),
    "heart": Shape(_heart()),
}

MATERIALS = ("plain", "striped", "dotted", "checked")
SPLITS = ("all", "train", "test", "novel")

TEMPLATES = ("{}", "a picture of {}", "there is {}", "a photo of {}.", "you can see {}")
# An object may be placed where at least this share of every earlier object stays visible.
LEAST_VISIBLE = 0.5
PLACEMENTS = 10
# Radii as shares of the image's side, and the limits below and above which captions call objects small and large.
RADII = (0.09, 0.28)
SMALL, LARGE = 0.14, 0.22
# Period of stripes, dots and checks: as a share of the radius, and the minimum in pixels.
PATTERN_PERIOD, LEAST_PERIOD = 0.6, 4.0


def is_novel(color: str, material: str, shape: str) -> bool:
    """Whether the colour or the material never occurs with the shape in the splits "train" and "test".

    This holds for 14 of the 70 pairs of colour and shape (two colours per shape), and for 5 of the 28 pairs of material
    and shape (one per shape, except circle and cross). Each single word occurs in training.
    """
    number = list(SHAPES).index(shape)
    return (list(COLORS).index(color) + number) % 5 == 0 or (MATERIALS.index(material) + number) % 5 == 4


@dataclass
class SceneOptions:
    """Options of a `SceneSource`.

    Args:
        size: side of the images in pixels.
        length: number of scenes.
        seed: seed of the scenes.
        max_objects: maximum number of objects per scene, which has at least one.
        num_captions: number of captions per scene.
        with_tags: whether scenes have tags in addition to captions.
        colored_labels: whether labels include the colour, such as "red circle" instead of "circle".
        split: "all"; "train" or "test", without novel combinations (see [`is_novel`]); or "novel", where every object
            is a novel combination. No scene occurs in two splits.
        keep: whether to keep scenes in memory, about 20 KiB each at 64 pixels.

    Raises:
        ValueError: if a field is invalid; the message names it.
    """

    size: int = 64
    length: int = 1000
    seed: int = 0
    max_objects: int = 3
    num_captions: int = 3
    with_tags: bool = True
    colored_labels: bool = False
    split: str = "all"
    keep: bool = False

    def __post_init__(self) -> None:
        least = {"size": 16, "length": 1, "seed": 0, "max_objects": 1, "num_captions": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {value}.")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}, expected one of {', '.join(SPLITS)}.")

    @classmethod
    def parse(cls, text: str) -> "SceneOptions":
        """Parses options such as `"train,size=96,length=20000"`: a split, fields with whole numbers (0 or 1 for
        booleans), or both. Empty text gives the defaults.

        Raises:
            ValueError: if a part is neither a split nor a valid field.
        """
        kinds: dict[str, type] = {field.name: field.type for field in fields(cls) if field.name != "split"}  # type: ignore[misc]
        options: dict[str, int | str] = {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.partition("=")
            if not equals and part in SPLITS:
                options["split"] = part
            elif name in kinds and value.isdecimal():
                options[name] = kinds[name](int(value))
            else:
                raise ValueError(
                    f"unknown scene option {part!r}, expected one of {', '.join(SPLITS)}, or a whole number for one of "
                    f"{', '.join(kinds)}, such as size=96."
                )
        return cls(**options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SceneObject:
    """A shape with a colour and a material; `radius` is a share of the image's side."""

    color: str
    material: str
    shape: str
    radius: float


@dataclass(frozen=True)
class Scene:
    """A scene and its content.

    Args:
        pixels: uint8 [S, S, 3].
        owners: index of the visible object in each pixel [S, S], -1 for the background.
        objects: objects in painting order; later ones occlude earlier ones.
        ground: name of the background.
    """

    pixels: np.ndarray
    owners: np.ndarray
    objects: list[SceneObject]
    ground: str


class SceneSource:
    """Scenes of coloured shapes on a textured background, generated on access and determined by seed and index.

    `source[i]` is a `Record` with an RGB image, captions that each describe part of the scene, the labels of everything
    visible as tags, and an exact mask (mode L) with indices into `labels`.
    """

    name = "synthetic"

    def __init__(self, options: SceneOptions | None = None):
        self.options = options or SceneOptions()
        split = self.options.split
        self._kinds = [
            kind
            for kind in product(COLORS, MATERIALS, SHAPES)
            if split == "all" or is_novel(*kind) == (split == "novel")
        ]
        things = [self._label(color, shape) for shape in SHAPES for color in COLORS]
        self.labels: list[str] = list(dict.fromkeys([*GROUNDS, *things]))
        self._values = {label: value for value, label in enumerate(self.labels)}
        self._kept: dict[int, Record] = {}

    def __len__(self) -> int:
        return self.options.length

    def __getitem__(self, index: int) -> Record:
        if index in self._kept:
            return self._kept[index]
        scene, rng = self._make(index)
        names = [*(self._label(thing.color, thing.shape) for thing in scene.objects), scene.ground]
        values = np.array([self._values[name] for name in names], dtype=np.uint8)
        mask_HW = values[scene.owners]  # owner -1 selects the background, which comes last
        present = np.flatnonzero(np.bincount(mask_HW.ravel()))
        record = Record(
            image=Image.fromarray(scene.pixels),
            captions=[_caption(scene, rng) for _ in range(self.options.num_captions)],
            tags=[self.labels[value] for value in present if self.options.with_tags],
            mask=Image.fromarray(mask_HW),
            name=f"scene {index}",
        )
        if self.options.keep:
            self._kept[index] = record
        return record

    def scene(self, index: int) -> Scene:
        """Scene `index` with its objects."""
        return self._make(index)[0]

    def describe(self, index: int) -> str:
        """A complete caption: objects in painting order with size (if small or large), material, colour, and ground."""
        scene = self.scene(index)
        return f"{join_words([_phrase(thing) for thing in scene.objects])} on {scene.ground}"

    def _make(self, index: int) -> tuple[Scene, np.random.Generator]:
        """A scene, and its generator for drawing the captions."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        rng = np.random.default_rng((self.options.seed, SPLITS.index(self.options.split), index))
        size = self.options.size
        ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
        pixels_HWC = _texture(GROUNDS[ground], size, rng)
        owners_HW = np.full((size, size), -1)
        objects: list[SceneObject] = []
        for _ in range(rng.integers(1, self.options.max_objects + 1)):
            candidate = SceneObject(*self._kinds[rng.integers(len(self._kinds))], float(rng.uniform(*RADII)))
            region_HW = _place(candidate, owners_HW, len(objects), rng)
            if region_HW is None:
                continue
            owners_HW[region_HW] = len(objects)
            objects.append(candidate)
            pixels_HWC[region_HW] = _surface(candidate, region_HW, rng)
        pixels_HWC *= _light(size, rng)[:, :, None]
        return Scene(pixels_HWC.clip(0, 255).astype(np.uint8), owners_HW, objects, ground), rng

    def _label(self, color: str, shape: str) -> str:
        return f"{color} {shape}" if self.options.colored_labels else shape


def _place(
    thing: SceneObject, owners_HW: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Pixels, bool [H, W], of an object placed at random so that earlier objects stay visible; None if no place is
    found."""
    before = np.bincount(owners_HW.ravel() + 1, minlength=number + 1)[1:]
    for _ in range(PLACEMENTS):
        region_HW = _outline_region(thing, len(owners_HW), rng)
        hidden = np.bincount(owners_HW[region_HW] + 1, minlength=number + 1)[1:]
        if (before - hidden >= LEAST_VISIBLE * before).all():
            return region_HW
    return None


def _outline_region(thing: SceneObject, size: int, rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(-0.4, 0.4)  # radians; small: a square must not become a diamond, nor a cross an x
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    center = rng.uniform(thing.radius, 1 - thing.radius, 2) * (size - 1)
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    shape = SHAPES[thing.shape]
    for corners, value in ((shape.outline, 255), (shape.hole, 0)):
        if corners is not None:
            draw.polygon((center + corners @ turn * thing.radius * size).ravel().tolist(), fill=value)
    return np.asarray(canvas) > 0


def _surface(thing: SceneObject, region_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colours of an object's pixels, float [number of pixels, 3]: two tones in its material's pattern, with noise."""
    color = np.array(COLORS[thing.color]) + rng.uniform(-15, 15, 3)
    rows, columns = np.nonzero(region_HW)
    noise = rng.normal(0, 6, (len(rows), 1))
    if thing.material == "plain":
        return color + noise
    period = max(LEAST_PERIOD, PATTERN_PERIOD * thing.radius * len(region_HW))
    angle, (start, other_start) = rng.uniform(0, math.pi), rng.uniform(0, 1, 2)
    along = ((columns * math.cos(angle) + rows * math.sin(angle)) / period + start) % 1
    across = ((rows * math.cos(angle) - columns * math.sin(angle)) / period + other_start) % 1
    if thing.material == "striped":
        is_second = along < 0.5
    elif thing.material == "checked":
        is_second = (along < 0.5) ^ (across < 0.5)
    else:
        is_second = (along - 0.5) ** 2 + (across - 0.5) ** 2 < 0.09
    # The second tone is darker, except for black, where it is grey.
    second = color + 75 if thing.color == "black" else color * 0.5
    return np.where(is_second[:, None], second, color) + noise


def _texture(ground: Ground, size: int, rng: np.random.Generator) -> np.ndarray:
    """A background with a random tint, float [size, size, 3]: coarse noise, smoothed to grains, and fine noise."""
    grid = [max(1, round(1 / grain)) if grain else size for grain in ground.grain]
    coarse = Image.fromarray(rng.uniform(-1, 1, (grid[1] + 1, grid[0] + 1)).astype(np.float32))
    noise = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR)) * ground.contrast
    noise = noise + rng.normal(0, 5, (size, size))
    return np.array(ground.color) + rng.uniform(-15, 15, 3) + noise[:, :, None]


def _light(size: int, rng: np.random.Generator) -> np.ndarray:
    """A brightness factor for each pixel, [size, size]: a random level that increases towards a random side."""
    steps = np.linspace(-1, 1, size)
    across, down = rng.uniform(-0.12, 0.12, 2)
    return rng.uniform(0.75, 1.15) + across * steps[None, :] + down * steps[:, None]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    """Some objects in random order with random attributes, with or without the background; or the background alone."""
    count = rng.integers(0, len(scene.objects) + 1)
    chosen = [scene.objects[index] for index in rng.permutation(len(scene.objects))[:count]]
    phrases = [_phrase(thing, *(rng.random(3) < (0.5, 0.5, 0.75))) for thing in chosen]
    if not phrases:
        text = scene.ground
    else:
        text = join_words(phrases) + (f" on {scene.ground}" if rng.random() < 0.5 else "")
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(text)


def _phrase(
    thing: SceneObject, with_size: bool = True, with_material: bool = True, with_color: bool = True
) -> str:
    words = [thing.shape]
    if with_color:
        words.insert(0, thing.color)
    if with_material:
        words.insert(0, thing.material)
    if with_size and not SMALL <= thing.radius <= LARGE:
        words.insert(0, "small" if thing.radius < SMALL else "large")
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])
