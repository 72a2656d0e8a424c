"""A small world of captioned images, rendered by rule, in which every sample can be marked right or wrong.

A scene is one or two objects (shape, colour, size, texture), a spatial relation between them, and a background.
Images are 32x32. Objects are rendered in cells of 2x2 pixels without anti-aliasing and lie on a lattice of 4 pixels,
so that the world has few distinct 4x4 patches. Captions vary in words and word order.

A fixed share of the (shape, colour, texture) triples never occurs in training, although every pair in them does:
images of those triples measure composition.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 32  # pixels
CELL = 2  # pixels of a cell's side
CELLS = IMAGE_SIZE // CELL

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (250, 140, 30),
    "cyan": (50, 200, 220),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"dark": (25, 25, 30), "light": (235, 235, 230)}
SIZES = {"small": 4, "large": 6}  # cells of an object's side
TEXTURES = ("plain", "striped")
RELATIONS = ("left", "right", "above", "below")

_UPPER_HALVES: dict[str, dict[str, tuple[str, ...]]] = {  # "#": a cell of the object
    "full": {"small": ("####", "####"), "large": ("######", "######", "######")},
    "round": {"small": (".##.", "####"), "large": (".####.", "######", "######")},
    "closed": {"small": ("####", "#..#"), "large": ("######", "######", "##..##")},
    "open": {"small": ("#..#", "#..#"), "large": ("##..##", "##..##", "##..##")},
}
# Upper half, and the half whose mirror image is the lower one. Each half belongs to two shapes, so that a shape that
# never occurs in some colour and texture is made of halves that do.
_SHAPE_HALVES = {
    "square": ("full", "full"),
    "circle": ("round", "round"),
    "dome": ("round", "full"),
    "bowl": ("full", "round"),
    "frame": ("closed", "closed"),
    "gate": ("closed", "open"),
    "cup": ("open", "closed"),
}
SHAPES = {
    shape: {size: _UPPER_HALVES[upper][size] + _UPPER_HALVES[lower][size][::-1] for size in SIZES}
    for shape, (upper, lower) in _SHAPE_HALVES.items()
}

# words that a caption may use for an attribute
WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "plain": ("plain", "solid"),
    "striped": ("striped", "lined"),
    "square": ("square", "box"),
    "circle": ("circle", "disc"),
    "dome": ("dome", "hill"),
    "bowl": ("bowl", "basin"),
    "frame": ("frame", "window"),
    "gate": ("gate", "table"),
    "cup": ("cup", "mug"),
    "dark": ("dark", "black"),
    "light": ("light", "white"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

HELD_OUT_SHARE = 1 / 8  # of the (shape, colour, texture) triples
_BLOCKS = (0, 4, 8)  # where a block of 8x8 cells may begin; an object sits at a fixed place in its block


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    texture: str

    @property
    def triple(self) -> tuple[str, str, str]:
        """The combination that training may lack."""
        return self.shape, self.colour, self.texture


@dataclass(frozen=True)
class Scene:
    """Content of a caption: one or two things, the relation of the first to the second, and the background."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str


def held_out_triples() -> frozenset[tuple[str, str, str]]:
    """The (shape, colour, texture) triples that never occur in training; every pair in them does.

    A fixed choice: triples in the order of their hash, each kept unless it shares two attributes with one before.
    """
    triples = [(shape, colour, texture) for shape in SHAPES for colour in COLOURS for texture in TEXTURES]
    triples.sort(key=lambda triple: hashlib.sha256(" ".join(triple).encode()).digest())
    chosen: list[tuple[str, str, str]] = []
    for triple in triples:
        if len(chosen) < round(HELD_OUT_SHARE * len(triples)) and all(_shared(triple, other) < 2 for other in chosen):
            chosen.append(triple)
    return frozenset(chosen)


def _shared(triple: tuple[str, str, str], other: tuple[str, str, str]) -> int:
    return sum(mine == theirs for mine, theirs in zip(triple, other, strict=True))


HELD_OUT = held_out_triples()


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination that training lacks."""
    return any(thing.triple in HELD_OUT for thing in scene.things)


def sample_scene(rng: random.Random, num_things: int, held_out: bool) -> Scene:
    """A random scene of one or two things; `held_out`: with an unseen combination, or without any."""
    while True:
        things = tuple(
            Thing(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(SIZES)), rng.choice(TEXTURES))
            for _ in range(num_things)
        )
        relation = rng.choice(RELATIONS) if num_things == 2 else None
        scene = Scene(things, relation, rng.choice(list(BACKGROUNDS)))
        if is_held_out(scene) == held_out:
            return scene


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many ways to say what the scene shows."""

    def word(attribute: str) -> str:
        return rng.choice(WORDS.get(attribute, (attribute,)))

    def phrase(thing: Thing) -> str:
        size, texture, colour, shape = map(word, (thing.size, thing.texture, thing.colour, thing.shape))
        return rng.choice((f"a {size} {texture} {colour} {shape}", f"a {size} {colour} {texture} {shape}"))

    what = phrase(scene.things[0])
    if scene.relation:
        what += f" {word(scene.relation)} {phrase(scene.things[1])}"
    background = word(scene.background)
    return rng.choice((f"{what} on {background}", f"on {background} {what}"))


def mask(shape: str, size: str) -> NDArray[np.bool_]:
    """The cells of a shape, bool [side, side]."""
    return np.array([[mark == "#" for mark in row] for row in SHAPES[shape][size]])


def place(size: str, block: tuple[int, int]) -> tuple[int, int]:
    """Top-left cell (row, column) of an object of this size in its block."""
    inset = 2 if size == "small" else 0
    return block[0] + inset, block[1] + inset


def blocks_for(relation: str | None) -> list[tuple[tuple[int, int], ...]]:
    """Every choice of blocks (row, column) for the things of a scene with this relation."""
    if relation is None:
        return [((row, column),) for row in _BLOCKS for column in _BLOCKS]
    near, far = _BLOCKS[0], _BLOCKS[-1]
    first, second = (near, far) if relation in ("left", "above") else (far, near)
    if relation in ("left", "right"):
        return [((row, first), (row, second)) for row in _BLOCKS]
    return [((first, column), (second, column)) for column in _BLOCKS]


def cell_pattern(colour: tuple[int, int, int], texture: str) -> NDArray[np.uint8]:
    """The 2x2 pixels of a coloured cell, uint8 [2, 2, 3]; stripes darken every other row."""
    pattern = np.empty((CELL, CELL, 3), dtype=np.uint8)
    pattern[:] = colour
    if texture == "striped":
        pattern[1] = np.array(colour) * 2 // 5
    return pattern


def render(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """Draw the scene at a random place that fits it: uint8 [32, 32, 3]."""
    cells = np.empty((CELLS, CELLS, CELL, CELL, 3), dtype=np.uint8)
    cells[:] = BACKGROUNDS[scene.background]
    for thing, block in zip(scene.things, rng.choice(blocks_for(scene.relation)), strict=True):
        row, column = place(thing.size, block)
        side = SIZES[thing.size]
        region = cells[row : row + side, column : column + side]
        region[mask(thing.shape, thing.size)] = cell_pattern(COLOURS[thing.colour], thing.texture)
    return np.ascontiguousarray(cells.transpose(0, 2, 1, 3, 4).reshape(IMAGE_SIZE, IMAGE_SIZE, 3))
