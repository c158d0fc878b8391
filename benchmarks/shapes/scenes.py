"""Procedural scenes: coloured shapes on a plain background, with captions and anti-aliased pictures.

A `Scene` has one object, or two with a relation. `caption` describes it, `render` draws it, and `sample_scene` returns
a random scene. All functions are pure functions of the scene or the random generator.

The coordinate system is the picture's: x to the right, y downward, in pixels, pixel centres at half-integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Size = Literal["small", "large"]
Relation = Literal["above", "below", "left of", "right of"]

IMAGE_SIZE = 64
"""Height and width of a picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "purple": (140, 60, 180),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
}
"""Colours of objects, as 8-bit sRGB."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": COLOURS["white"],
    "black": COLOURS["black"],
    "grey": (130, 132, 136),
    "pink": (248, 190, 205),
    "teal": (20, 105, 110),
}
"""Colours of backgrounds, as 8-bit sRGB. Backgrounds and objects of the same name have the same colour."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES: tuple[Size, ...] = get_args(Size)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {("purple", "star"), ("green", "cross"), ("orange", "diamond"), ("yellow", "square")}
)
"""(colour, shape) pairs that no training picture contains; each colour and each shape occurs in other pairs."""

# Circumradius in pixels, (low, high), by number of objects and size.
_RADII: dict[int, dict[Size, tuple[float, float]]] = {
    1: {"small": (9.5, 12.5), "large": (18.0, 22.0)},
    2: {"small": (8.0, 9.5), "large": (12.0, 14.0)},
}
_CIRCLE = 0.9  # radius of a circle, relative to the circumradius of polygons
_MARGIN = 2.0  # minimum pixels between an object and the picture's edge, and between two objects
_TILT = math.radians(8)  # maximum angle of objects
_SAY_SIZE = 0.5  # probability that a caption states an object's size
_TWO_OBJECTS = 0.4  # probability of a second object


@dataclass(frozen=True)
class Item:
    """One object: the words of its caption, and its place in pixels and angle in radians."""

    colour: str
    shape: str
    size: Size
    says_size: bool
    x: float
    y: float
    radius: float
    angle: float

    def __post_init__(self) -> None:
        for value, allowed in ((self.colour, COLOURS), (self.shape, SHAPES), (self.size, SIZES)):
            if value not in allowed:
                raise ValueError(f"{value!r} is not one of {', '.join(allowed)}; use one of these words.")
        if not self.radius > 0:
            raise ValueError(f"the radius is {self.radius}; give a positive number of pixels.")


@dataclass(frozen=True)
class Scene:
    """One object on a plain background, or two, of which the first is in `relation` to the second."""

    items: tuple[Item, ...]
    background: str
    relation: Relation | None = None

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"{self.background!r} is not a background; use one of {', '.join(BACKGROUNDS)}.")
        if len(self.items) not in (1, 2) or (len(self.items) == 2) != (self.relation in RELATIONS):
            raise ValueError("a scene has one object, or two and a relation; pass one of these.")
        if any(item.colour == self.background for item in self.items):
            raise ValueError(f"a {self.background} object is invisible here; change colour or background.")

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """The (colour, shape) pairs that the scene contains."""
        return frozenset((item.colour, item.shape) for item in self.items)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _say(item: Item) -> str:
    size = f"{item.size} " if item.says_size else ""
    return _with_article(f"{size}{item.colour} {item.shape}")


def caption(scene: Scene) -> str:
    """Return the caption, such as "a small red circle above an orange star on a grey background"."""
    objects = f" {scene.relation} ".join(_say(item) for item in scene.items)
    return f"{objects} on {_with_article(scene.background)} background"


def vocabulary() -> tuple[str, ...]:
    """Return every word that a caption can contain, sorted."""
    phrases = (*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *RELATIONS, "a", "an", "on", "background")
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _place(rng: np.random.Generator, radii: tuple[float, ...], relation: Relation | None) -> list[tuple[float, float]]:
    """Return the centres of one object, or of two in their relation, which lie inside the image and do not overlap."""
    low = [radius + _MARGIN for radius in radii]
    high = [IMAGE_SIZE - edge for edge in low]
    if relation is None:
        # One object stays near the middle: half of the free range.
        middle, reach = IMAGE_SIZE / 2, (high[0] - low[0]) / 4
        return [(middle + float(rng.uniform(-reach, reach)), middle + float(rng.uniform(-reach, reach)))]
    # `along` is the axis of the relation, on which `first` is the object nearer to the origin.
    first, second = (0, 1) if relation in ("above", "left of") else (1, 0)
    gap = radii[0] + radii[1] + _MARGIN
    near = float(rng.uniform(low[first], high[second] - gap))
    far = float(rng.uniform(near + gap, high[second]))
    along = {first: near, second: far}
    middle = float(rng.uniform(IMAGE_SIZE * 0.4, IMAGE_SIZE * 0.6))
    across = [float(np.clip(middle + rng.uniform(-3, 3), low[i], high[i])) for i in (0, 1)]
    if relation in ("left of", "right of"):
        return [(along[i], across[i]) for i in (0, 1)]
    return [(across[i], along[i]) for i in (0, 1)]


def _arrange(
    rng: np.random.Generator,
    words: list[tuple[str, str, Size | None]],
    relation: Relation | None,
    background: str,
) -> Scene:
    """Return a scene with random values for all that the words leave open."""
    sizes = [size or SIZES[int(rng.integers(2))] for _, _, size in words]
    radii = tuple(float(rng.uniform(*_RADII[len(words)][size])) for size in sizes)
    places = _place(rng, radii, relation)
    items = tuple(
        Item(colour, shape, size, stated_size is not None, x, y, radius, float(rng.uniform(-_TILT, _TILT)))
        for (colour, shape, stated_size), size, radius, (x, y) in zip(words, sizes, radii, places, strict=True)
    )
    return Scene(items, background, relation)


def sample_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Return a random scene.

    Args:
        rng: random generator; equal states give equal scenes.
        held_out: False returns training scenes, which contain no pair of `HELD_OUT`;
            True returns scenes whose first object is such a pair.
    """
    background = _choose(rng, tuple(BACKGROUNDS))
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))] if rng.random() < _TWO_OBJECTS else None
    words: list[tuple[str, str, Size | None]] = []
    for index in range(1 if relation is None else 2):
        is_held_out = held_out and index == 0
        pairs = tuple(
            (colour, shape)
            for colour in COLOURS
            for shape in SHAPES
            if colour != background
            and ((colour, shape) in HELD_OUT) == is_held_out
            and (colour, shape) not in [word[:2] for word in words]
        )
        colour, shape = pairs[int(rng.integers(len(pairs)))]
        size = SIZES[int(rng.integers(2))] if rng.random() < _SAY_SIZE else None
        words.append((colour, shape, size))
    return _arrange(rng, words, relation, background)


def scene_from_caption(text: str, rng: np.random.Generator) -> Scene:
    """Return a scene that `text` describes; `rng` decides what the caption leaves open.

    Raises:
        ValueError: the text is not a caption that `caption` can return.
    """
    objects, _, ground = text.removesuffix(" background").rpartition(" on ")
    relation = next((r for r in RELATIONS if f" {r} " in objects), None)
    words: list[tuple[str, str, Size | None]] = []
    for phrase in objects.split(f" {relation} ") if relation else [objects]:
        size = next((s for s in SIZES if f" {s} " in phrase), None)
        colour, _, shape = phrase.rpartition(" ")
        words.append((colour.rpartition(" ")[2], shape, size))
    try:
        scene = _arrange(rng, words, relation, ground.rpartition(" ")[2])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{text!r} is not the caption of a scene ({error})") from error
    if caption(scene) != text:
        raise ValueError(f"{text!r} is not the caption of a scene; the nearest one is {caption(scene)!r}.")
    return scene


def _outline(shape: str) -> npt.NDArray[np.float32]:
    """Return the polygon of a shape within the unit circle, (corners, 2)."""
    if shape == "cross":
        arm = 0.32
        quarter = np.array([(arm, -0.95), (arm, -arm), (0.95, -arm)])
        turn = np.array([[0, 1], [-1, 0]])
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)]).astype(np.float32)
    corners, start, inner = {
        "square": (4, 45.0, 1.0),
        "triangle": (3, 90.0, 1.0),
        "diamond": (4, 90.0, 1.0),
        "star": (10, 90.0, 0.42),
    }[shape]
    angles = np.radians(start + 360.0 / corners * np.arange(corners))
    lengths = np.where(np.arange(corners) % 2, inner, 1.0)
    x = lengths * np.cos(angles) * (0.68 if shape == "diamond" else 1.0)
    return np.stack([x, -lengths * np.sin(angles)], axis=1).astype(np.float32)


def distance(points: npt.NDArray[np.float32], item: Item) -> npt.NDArray[np.float32]:
    """Return the signed distance (n,) in pixels from each point (n, 2) to the item's edge; negative inside."""
    local = points - np.array([item.x, item.y], dtype=np.float32)
    if item.shape == "circle":
        return np.asarray(np.hypot(local[:, 0], local[:, 1]) - item.radius * _CIRCLE, dtype=np.float32)
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    turn = np.array([[cos, sin], [-sin, cos]], dtype=np.float32)
    corners = _outline(item.shape) * np.float32(item.radius) @ turn
    edges = np.roll(corners, -1, axis=0) - corners
    to_point = local[:, None, :] - corners  # (n, corners, 2)
    along = np.clip((to_point * edges).sum(-1) / (edges * edges).sum(-1), 0, 1)
    nearest = np.linalg.norm(to_point - along[..., None] * edges, axis=-1).min(axis=1)
    # Even-odd rule: count the edges that a ray to the right crosses.
    above, next_above = to_point[..., 1] >= 0, np.roll(to_point[..., 1] >= 0, -1, axis=1)
    side = edges[:, 0] * to_point[..., 1] - edges[:, 1] * to_point[..., 0]
    crossed = (above != next_above) & ((side > 0) == (edges[:, 1] < 0))
    inside = crossed.sum(axis=1) % 2 == 1
    return np.asarray(np.where(inside, -nearest, nearest), dtype=np.float32)


def mask(shape: str, x: float, y: float, area: float, angle: float) -> npt.NDArray[np.bool_]:
    """Return the pixels of a shape of a given area (pixels) with its centroid at (x, y): bool (64, 64)."""
    unit = _outline(shape) if shape != "circle" else None
    if unit is None:
        radius, centre = math.sqrt(area / math.pi) / _CIRCLE, np.zeros(2)
    else:
        # Area and centroid of a polygon (shoelace formula), then the scale for the given area.
        following = np.roll(unit, -1, axis=0)
        cross = unit[:, 0] * following[:, 1] - following[:, 0] * unit[:, 1]
        radius = math.sqrt(area / abs(float(cross.sum()) / 2))
        cos, sin = math.cos(angle), math.sin(angle)
        centre = ((unit + following) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
        centre = centre @ np.array([[cos, sin], [-sin, cos]]) * radius
    item = Item("red", shape, "small", False, x - float(centre[0]), y - float(centre[1]), radius, angle)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32) + np.float32(0.5)
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    return (distance(points, item) <= 0).reshape(IMAGE_SIZE, IMAGE_SIZE)


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """Return the picture of a scene; the signed distance to pixel centres anti-aliases the edges.

    Returns:
        uint8 array (64, 64, 3), sRGB.
    """
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        left, right = (int(np.clip(item.x + s * (item.radius + 2), 0, IMAGE_SIZE)) for s in (-1, 1))
        top, bottom = (int(np.clip(item.y + s * (item.radius + 2), 0, IMAGE_SIZE)) for s in (-1, 1))
        rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32) + np.float32(0.5)
        points = np.stack([columns.ravel(), rows.ravel()], axis=1)
        cover = np.clip(0.5 - distance(points, item), 0, 1).reshape(rows.shape)[..., None]
        window = picture[top:bottom, left:right]
        window += cover * (np.array(COLOURS[item.colour], dtype=np.float32) - window)
    return np.rint(picture).astype(np.uint8)


def to_signal(pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Convert uint8 pictures (N, 3, H, W) to fp32 in [-1, 1], as diffusers' pipelines expect."""
    import torch

    return torch.from_numpy(pictures).float() / 127.5 - 1
