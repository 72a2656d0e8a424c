"""Reads a toy-world image back into the scene it shows, so that samples are marked right or wrong by rule.

Each 2x2-pixel cell takes the nearest of the world's cell patterns. Then every arrangement of one or two objects
that the world allows is compared with the map of cells; the one with fewest differing cells is the verdict.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dalle_scale.curation.toy import world as world
from dalle_scale.curation.toy.world import Scene, Thing

MAX_WRONG_CELLS = 12  # of 256: an image further from every scene than this shows none

_BACKGROUNDS = tuple(world.BACKGROUNDS)
_SURFACES = tuple((colour, texture) for colour in world.COLOURS for texture in world.TEXTURES)
_PATTERNS = np.stack(
    [world.cell_pattern(colour, "plain") for colour in world.BACKGROUNDS.values()]
    + [world.cell_pattern(world.COLOURS[colour], texture) for colour, texture in _SURFACES]
).astype(np.float32)
_FORMS = tuple((shape, size) for shape in world.SHAPES for size in world.SIZES)
_BLOCK = 8  # cells


def _form_masks() -> NDArray[np.bool_]:
    """Each form as the cells of a whole block, bool [forms, 8, 8]."""
    masks = np.zeros((len(_FORMS), _BLOCK, _BLOCK), dtype=bool)
    for index, (shape, size) in enumerate(_FORMS):
        row, column = world.place(size, (0, 0))
        side = world.SIZES[size]
        masks[index, row : row + side, column : column + side] = world.mask(shape, size)
    return masks


_MASKS = _form_masks()


def read(image: NDArray[np.uint8]) -> Scene | None:
    """The scene that an image [32, 32, 3] shows, or None if it shows none.

    Two things that lie beside each other are listed with the left or upper one first.
    """
    cells = image.reshape(world.CELLS, world.CELL, world.CELLS, world.CELL, 3).transpose(0, 2, 1, 3, 4)
    distances = ((cells[:, :, None].astype(np.float32) - _PATTERNS) ** 2).sum(axis=(3, 4, 5))
    labels = distances.argmin(axis=-1)  # [16, 16]; below len(_BACKGROUNDS): background
    counts = np.bincount(labels.ravel(), minlength=len(_PATTERNS))
    background = int(counts[: len(_BACKGROUNDS)].argmax())
    foreground = labels != background

    best: tuple[int, Scene] | None = None
    seen: dict[tuple[int, int], tuple[int, int, Thing]] = {}
    for relation in (None, "left", "above"):
        for blocks in world.blocks_for(relation):
            found = [_read_block(labels, foreground, block, seen) for block in blocks]
            outside = int(foreground.sum()) - sum(inside for inside, _, _ in found)
            wrong = outside + sum(cost for _, cost, _ in found)
            if best is None or wrong < best[0]:
                best = wrong, Scene(tuple(thing for _, _, thing in found), relation, _BACKGROUNDS[background])
    assert best is not None
    return best[1] if best[0] <= MAX_WRONG_CELLS else None


def _read_block(
    labels: NDArray[np.int64],
    foreground: NDArray[np.bool_],
    block: tuple[int, int],
    seen: dict[tuple[int, int], tuple[int, int, Thing]],
) -> tuple[int, int, Thing]:
    """The likeliest thing in one block: (foreground cells in the block, cells that differ from the thing, the
    thing)."""
    if block not in seen:
        window = np.s_[block[0] : block[0] + _BLOCK, block[1] : block[1] + _BLOCK]
        differing = (_MASKS ^ foreground[window]).sum(axis=(1, 2))
        form = int(differing.argmin())
        surfaces = np.bincount(labels[window][_MASKS[form]], minlength=len(_PATTERNS))[len(_BACKGROUNDS) :]
        surface = int(surfaces.argmax())
        other_surface = int(surfaces.sum() - surfaces[surface])
        (shape, size), (colour, texture) = _FORMS[form], _SURFACES[surface]
        inside = int(foreground[window].sum())
        seen[block] = inside, int(differing[form]) + other_surface, Thing(shape, colour, size, texture)
    return seen[block]


_MIRROR = {"right": "left", "below": "above"}


def same(scene: Scene, other: Scene | None) -> bool:
    """Whether two scenes show the same: A right of B is B left of A."""
    return other is not None and _upright(scene) == _upright(other)


def _upright(scene: Scene) -> Scene:
    if scene.relation in _MIRROR:
        return Scene(scene.things[::-1], _MIRROR[scene.relation], scene.background)
    return scene
