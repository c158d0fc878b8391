"""Scenes: captions describe the pictures, pictures depend only on the scene, held-out pairs are not sampled."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.benchmarks.shapes import scenes

seeds = st.integers(0, 2**32 - 1)


def single(shape: str = "circle", **changes: object) -> scenes.Scene:
    item = scenes.Item("red", shape, "large", True, x=32.0, y=32.0, radius=20.0, angle=0.0)
    return scenes.Scene((replace(item, **changes),), "white")


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_a_caption_describes_a_scene_that_has_this_caption(seed: int) -> None:
    scene = scenes.sample_scene(np.random.default_rng(seed))
    text = scenes.caption(scene)
    again = scenes.scene_from_caption(text, np.random.default_rng(seed + 1))
    assert scenes.caption(again) == text
    assert (again.background, again.relation, again.pairs) == (scene.background, scene.relation, scene.pairs)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_equal_seeds_give_equal_scenes_and_pictures(seed: int) -> None:
    one, other = (scenes.sample_scene(np.random.default_rng(seed)) for _ in range(2))
    assert one == other
    assert np.array_equal(scenes.render(one), scenes.render(other))


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_objects_lie_inside_the_picture_and_apart(seed: int) -> None:
    scene = scenes.sample_scene(np.random.default_rng(seed))
    for item in scene.items:
        assert item.radius <= min(item.x, item.y, 64 - item.x, 64 - item.y)
    if scene.relation:
        one, other = scene.items
        assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_training_scenes_never_contain_a_held_out_pair() -> None:
    rng = np.random.default_rng(7)
    originals = [scenes.sample_scene(rng) for _ in range(5000)]
    pairs = frozenset().union(*(scene.pairs for scene in originals))
    assert not pairs & scenes.HELD_OUT
    assert len(pairs) == len(scenes.COLOURS) * len(scenes.SHAPES) - len(scenes.HELD_OUT)
    assert {word for scene in originals for word in scenes.caption(scene).split()} == set(scenes.vocabulary())


def test_held_out_scenes_are_sampled_on_request() -> None:
    rng = np.random.default_rng(8)
    for _ in range(200):
        assert scenes.sample_scene(rng, held_out=True).pairs & scenes.HELD_OUT


def test_a_picture_has_the_named_colours_and_soft_edges() -> None:
    picture = scenes.render(single())
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[32, 32]) == scenes.COLOURS["red"]
    assert tuple(picture[0, 0]) == scenes.BACKGROUNDS["white"]
    between = (picture[..., 1] > scenes.COLOURS["red"][1]) & (picture[..., 1] < scenes.BACKGROUNDS["white"][1])
    assert 40 < between.sum() < 250


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_mask_has_the_given_area_and_centre(shape: str) -> None:
    mask = scenes.mask(shape, 30.0, 34.0, 600.0, 0.1)
    rows, columns = np.nonzero(mask)
    assert mask.sum() == pytest.approx(600, rel=0.05)
    assert columns.mean() + 0.5 == pytest.approx(30, abs=0.4)
    assert rows.mean() + 0.5 == pytest.approx(34, abs=0.4)


def test_moving_a_shape_by_whole_pixels_moves_its_picture() -> None:
    for shape in scenes.SHAPES:
        still = scenes.render(single(shape, radius=15.0))
        moved = scenes.render(single(shape, radius=15.0, x=36.0, y=29.0))
        shifted = np.roll(still, (-3, 4), axis=(0, 1)).astype(int)
        assert np.abs(shifted - moved).max() <= 1, shape


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red circle on a red background",
        "a white circle on a white background",
        "a red pentagon on a white background",
        "an red circle on a white background",
        "a red circle over a blue square on a white background",
        "a red circle above a blue square above a green star on a white background",
    ],
)
def test_texts_that_are_not_captions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the caption of a scene"):
        scenes.scene_from_caption(text, np.random.default_rng(0))


def test_impossible_scenes_are_refused() -> None:
    scene = single()
    with pytest.raises(ValueError, match="invisible"):
        replace(scene, items=(replace(scene.items[0], colour="white"),))
    with pytest.raises(ValueError, match="one object, or two"):
        replace(scene, items=scene.items * 2)
    with pytest.raises(ValueError, match="use one of"):
        single(colour="ultraviolet")
