"""The toy world keeps its promises: held-out combinations are fair questions, and the judge is right."""

import itertools
import random

import numpy as np
import pytest

from dalle_scale.curation.toy import judge, world
from dalle_scale.curation.toy.world import Scene, Thing


def scenes(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes of one and two objects, seen and held out, and their images."""
    rng = random.Random(seed)
    chosen = [world.sample_scene(rng, 1 + index % 2, index % 4 > 1) for index in range(count)]
    return chosen, np.stack([world.render(scene, rng) for scene in chosen])


def share_right(chosen: list[Scene], images: np.ndarray) -> float:
    """Share of images [N, 32, 32, 3] that show their scene."""
    return np.mean([judge.same(scene, judge.read(image)) for scene, image in zip(chosen, images, strict=True)])


def test_judge_is_right_on_true_images():
    chosen, images = scenes(2000, seed=0)
    assert share_right(chosen, images) >= 0.995


def test_judge_is_right_on_noisy_images():
    chosen, images = scenes(500, seed=1)
    noise = np.random.default_rng(0).normal(0, 16, images.shape)
    assert share_right(chosen, np.clip(images + noise, 0, 255).astype(np.uint8)) >= 0.995


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "texture", "background", "relation", "swap"])
def test_judge_notices_one_wrong_attribute(attribute):
    rng = random.Random(2)
    other = {
        "shape": list(world.SHAPES),
        "colour": list(world.COLOURS),
        "size": list(world.SIZES),
        "texture": list(world.TEXTURES),
    }
    for _ in range(50):
        scene = world.sample_scene(rng, 2, held_out=False)
        first, second = scene.things
        if attribute == "background":
            claim = Scene(scene.things, scene.relation, "dark" if scene.background == "light" else "light")
        elif attribute == "relation":
            claim = Scene(
                scene.things, {"left": "above", "above": "below"}.get(scene.relation, "left"), scene.background
            )
        elif attribute == "swap":
            if first == second:
                continue
            claim = Scene((second, first), scene.relation, scene.background)
        else:
            values = {name: getattr(first, name) for name in other}
            values[attribute] = rng.choice([v for v in other[attribute] if v != values[attribute]])
            claim = Scene((Thing(**values), second), scene.relation, scene.background)
        shown = judge.read(world.render(scene, rng))
        assert judge.same(scene, shown)
        assert not judge.same(claim, shown)


def test_judge_sees_nothing_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    assert all(judge.read(image) is None for image in noise)


def test_every_pair_of_a_held_out_triple_occurs_in_training():
    triples = set(itertools.product(world.SHAPES, world.COLOURS, world.TEXTURES))
    assert len(world.HELD_OUT) == round(world.HELD_OUT_SHARE * len(triples))
    seen = triples - world.HELD_OUT
    for kept in ((0, 1), (0, 2), (1, 2)):
        pairs = {tuple(triple[i] for i in kept) for triple in seen}
        assert {tuple(triple[i] for i in kept) for triple in world.HELD_OUT} <= pairs


def test_every_patch_of_a_held_out_image_occurs_in_training():
    def patches(image: np.ndarray) -> set[bytes]:
        return {patch.tobytes() for patch in image.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 48)}

    rng = random.Random(3)
    seen = set().union(*(patches(world.render(world.sample_scene(rng, 1, held_out=False), rng)) for _ in range(6000)))
    for triple in world.HELD_OUT:
        shape, colour, texture = triple
        for size, background in itertools.product(world.SIZES, world.BACKGROUNDS):
            scene = Scene((Thing(shape, colour, size, texture),), None, background)
            assert patches(world.render(scene, rng)) <= seen


def test_training_scenes_hold_nothing_held_out_and_captions_vary():
    rng = random.Random(4)
    for _ in range(500):
        assert not world.is_held_out(world.sample_scene(rng, 2, held_out=False))
        assert world.is_held_out(world.sample_scene(rng, 1, held_out=True))
    scene = world.sample_scene(rng, 2, held_out=False)
    assert len({world.caption(scene, rng) for _ in range(200)}) > 100
