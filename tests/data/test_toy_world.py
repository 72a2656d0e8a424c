"""The toy world keeps its promises: held-out combinations are fair questions, and the judge is right."""

import itertools
import random

import numpy as np
import pytest

from dalle_scale.data import toy_judge, toy_world
from dalle_scale.data.toy_world import Scene, Thing


def scenes(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes of one and two objects, seen and held out, and their pictures."""
    rng = random.Random(seed)
    chosen = [toy_world.sample_scene(rng, 1 + index % 2, index % 4 > 1) for index in range(count)]
    return chosen, np.stack([toy_world.render(scene, rng) for scene in chosen])


def test_judge_is_right_on_true_pictures():
    chosen, images = scenes(2000, seed=0)
    assert toy_judge.share_right(chosen, images) >= 0.995


def test_judge_is_right_on_noisy_pictures():
    chosen, images = scenes(500, seed=1)
    noise = np.random.default_rng(0).normal(0, 16, images.shape)
    assert toy_judge.share_right(chosen, np.clip(images + noise, 0, 255).astype(np.uint8)) >= 0.995


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "texture", "background", "relation", "swap"])
def test_judge_notices_one_wrong_attribute(attribute):
    rng = random.Random(2)
    other = {
        "shape": list(toy_world.SHAPES),
        "colour": list(toy_world.COLOURS),
        "size": list(toy_world.SIZES),
        "texture": list(toy_world.TEXTURES),
    }
    for _ in range(50):
        scene = toy_world.sample_scene(rng, 2, held_out=False)
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
        shown = toy_judge.read(toy_world.render(scene, rng))
        assert toy_judge.same(scene, shown)
        assert not toy_judge.same(claim, shown)


def test_judge_sees_nothing_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    assert all(toy_judge.read(image) is None for image in noise)


def test_every_pair_of_a_held_out_triple_occurs_in_training():
    triples = set(itertools.product(toy_world.SHAPES, toy_world.COLOURS, toy_world.TEXTURES))
    assert len(toy_world.HELD_OUT) == round(toy_world.HELD_OUT_SHARE * len(triples))
    seen = triples - toy_world.HELD_OUT
    for kept in ((0, 1), (0, 2), (1, 2)):
        pairs = {tuple(triple[i] for i in kept) for triple in seen}
        assert {tuple(triple[i] for i in kept) for triple in toy_world.HELD_OUT} <= pairs


def test_every_patch_of_a_held_out_picture_occurs_in_training():
    def patches(image: np.ndarray) -> set[bytes]:
        return {patch.tobytes() for patch in image.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 48)}

    rng = random.Random(3)
    seen = set().union(
        *(patches(toy_world.render(toy_world.sample_scene(rng, 1, held_out=False), rng)) for _ in range(6000))
    )
    for triple in toy_world.HELD_OUT:
        shape, colour, texture = triple
        for size, background in itertools.product(toy_world.SIZES, toy_world.BACKGROUNDS):
            scene = Scene((Thing(shape, colour, size, texture),), None, background)
            assert patches(toy_world.render(scene, rng)) <= seen


def test_training_scenes_hold_nothing_held_out_and_captions_vary():
    rng = random.Random(4)
    for _ in range(500):
        assert not toy_world.is_held_out(toy_world.sample_scene(rng, 2, held_out=False))
        assert toy_world.is_held_out(toy_world.sample_scene(rng, 1, held_out=True))
    scene = toy_world.sample_scene(rng, 2, held_out=False)
    assert len({toy_world.caption(scene, rng) for _ in range(200)}) > 100
