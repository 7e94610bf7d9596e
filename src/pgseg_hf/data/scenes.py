"""Synthetic scenes with captions, tags and exact masks: dry runs without data, and a world that is known in full.

In its splits some combinations of attributes never occur in training, see [`is_novel`].
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
    """Looks of a background: colour, strength of its noise in grey levels, and width and height of a grain as shares of
    the image's side (0 for one pixel)."""

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
    """An outline around the origin, corners [P, 2] within the unit circle, and the outline of a hole or None."""

    outline: np.ndarray
    hole: np.ndarray | None = None


def _around(radii: list[float], turn: float = 0.0) -> np.ndarray:
    """Corners [P, 2] at equal angles, the radii repeated in turn; the first one at the top, turned by `turn` steps."""
    angles = 2 * math.pi * (np.arange(len(radii)) + turn) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


def _cross(arm: float) -> np.ndarray:
    """A plus sign with arms 2 * `arm` wide."""
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
# An object stays where it leaves at least this share of every earlier one to be seen.
LEAST_VISIBLE = 0.5
PLACEMENTS = 10
# Radii as shares of the image's side, and which of them captions call small and large.
RADII = (0.09, 0.28)
SMALL, LARGE = 0.14, 0.22
# From one stripe, dot or check to the next: a share of the radius, and the least number of pixels.
PATTERN_PERIOD, LEAST_PERIOD = 0.6, 4.0


def is_novel(color: str, material: str, shape: str) -> bool:
    """Whether a shape has a colour or a material that it never has in the splits "train" and "test".

    Of the 70 pairs of colour and shape these are 14, two colours of each shape; of the 28 pairs of material and shape
    5, one a shape but none of circle and cross. Every word is in training.
    """
    number = list(SHAPES).index(shape)
    return (list(COLORS).index(color) + number) % 5 == 0 or (MATERIALS.index(material) + number) % 5 == 4


@dataclass
class SceneOptions:
    """Which scenes are made.

    Args:
        size: side of the images in pixels.
        length: number of scenes.
        seed: another one gives other scenes.
        max_objects: each scene has 1 to so many.
        num_captions: captions of a scene.
        with_tags: whether scenes have tags beside their captions.
        colored_labels: labels are "red circle" instead of "circle".
        split: "all", or "train" and "test", which have no novel combination (see [`is_novel`]), or "novel", where
            every object is one. No scene of one split is in another.
        keep: scenes stay in memory once they are made, at 64 pixels some 20 KiB each.

    Raises:
        ValueError: naming the field that makes no sense.
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
        """Options from text: a split, fields with whole numbers (0 or 1 for a choice), or both, such as
        `"train,size=96,length=20000"`; empty for the defaults.

        Raises:
            ValueError: a part that is neither.
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
                    f"scenes have the option {part!r}, expected one of {', '.join(SPLITS)}, or a whole number for one "
                    f"of {', '.join(kinds)}, such as size=96."
                )
        return cls(**options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SceneObject:
    """A shape of one colour and material; `radius` as a share of the image's side."""

    color: str
    material: str
    shape: str
    radius: float


@dataclass(frozen=True)
class Scene:
    """A scene and what is in it.

    Args:
        pixels: uint8 [S, S, 3].
        owners: [S, S], the number of the object that is seen in a pixel, -1 for the ground.
        objects: in the order in which they are painted; later ones hide earlier ones.
        ground: its name.
    """

    pixels: np.ndarray
    owners: np.ndarray
    objects: list[SceneObject]
    ground: str


class SceneSource:
    """Scenes of coloured shapes on a textured ground, made when asked for and always the same for a seed and index.

    `source[i]` is a `Record`: an RGB image, captions that each name some of what is to be seen, as tags the labels of
    everything visible, and an exact mask (mode L) with the indices of `labels`.
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
        mask_HW = values[scene.owners]  # owner -1 is the ground, which comes last
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
        """What scene `index` is made of."""
        return self._make(index)[0]

    def describe(self, index: int) -> str:
        """A caption with everything: each object with its size (unless it is neither small nor large), material and
        colour, in the order in which they are painted, and the ground."""
        scene = self.scene(index)
        return f"{join_words([_phrase(thing) for thing in scene.objects])} on {scene.ground}"

    def _make(self, index: int) -> tuple[Scene, np.random.Generator]:
        """A scene, and the generator that goes on with its captions."""
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
    """Where an object is painted, bool [H, W]: a random place and angle that hide none of the earlier objects too much;
    None if no such place was found."""
    before = np.bincount(owners_HW.ravel() + 1, minlength=number + 1)[1:]
    for _ in range(PLACEMENTS):
        region_HW = _outline_region(thing, len(owners_HW), rng)
        hidden = np.bincount(owners_HW[region_HW] + 1, minlength=number + 1)[1:]
        if (before - hidden >= LEAST_VISIBLE * before).all():
            return region_HW
    return None


def _outline_region(thing: SceneObject, size: int, rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(-0.4, 0.4)  # radians: a square must not become a diamond, nor a cross an x
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
    """Colours of an object's pixels, float [number of pixels, 3]: two tones in its material's pattern, and noise."""
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
    # Nothing is darker than black: its second tone is a grey.
    second = color + 75 if thing.color == "black" else color * 0.5
    return np.where(is_second[:, None], second, color) + noise


def _texture(ground: Ground, size: int, rng: np.random.Generator) -> np.ndarray:
    """A ground of random tint, float [size, size, 3]: coarse noise smoothed to grains, and fine noise."""
    grid = [max(1, round(1 / grain)) if grain else size for grain in ground.grain]
    coarse = Image.fromarray(rng.uniform(-1, 1, (grid[1] + 1, grid[0] + 1)).astype(np.float32))
    noise = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR)) * ground.contrast
    noise = noise + rng.normal(0, 5, (size, size))
    return np.array(ground.color) + rng.uniform(-15, 15, 3) + noise[:, :, None]


def _light(size: int, rng: np.random.Generator) -> np.ndarray:
    """A factor for each pixel, [size, size]: dark or bright as a whole, and brighter towards a random side."""
    steps = np.linspace(-1, 1, size)
    across, down = rng.uniform(-0.12, 0.12, 2)
    return rng.uniform(0.75, 1.15) + across * steps[None, :] + down * steps[:, None]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    """Some of the objects in any order, each with or without its size, material and colour, with or without the
    ground; or the ground alone."""
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
