"""Silhouettes agree with the rendered scenes, and overlaps with known masks."""

import numpy as np
import pytest

from offcut.benchmarks.shapes import scenes, silhouettes

TEXT = "a small red circle above a large blue star on a grey background"


def scene(text: str = TEXT) -> scenes.Scene:
    return scenes.scene_from_caption(text, np.random.default_rng(3))


def picture(rows: slice, columns: slice, ground: int = 0) -> np.ndarray:
    images = np.full((64, 64, 3), ground, dtype=np.uint8)
    images[rows, columns] = 255 - ground
    return images


def test_a_silhouette_is_white_where_the_object_covers_a_pixel_by_half() -> None:
    expected = scene()
    mask = silhouettes.silhouette(expected)
    assert mask.shape == (64, 64, 3)
    assert set(np.unique(mask)) == {0, 255}
    plain = scenes.render(expected).astype(float) - scenes.BACKGROUNDS["grey"]
    inside = np.zeros((64, 64), dtype=bool)
    for item in expected.items:
        colour = np.array(scenes.COLOURS[item.colour], dtype=float) - scenes.BACKGROUNDS["grey"]
        inside |= (plain @ colour) / (colour @ colour) > 0.5
    agree = inside == (mask[..., 0] > 0)
    assert agree.mean() > 0.995  # the objects' colours are not quite orthogonal


def test_the_caption_for_a_silhouette_states_no_size() -> None:
    assert silhouettes.open_caption(scene()) == "a red circle above a blue star on a grey background"
    assert silhouettes.open_caption(scene("an orange cross on a teal background")) == (
        "an orange cross on a teal background"
    )


@pytest.mark.parametrize("ground", [0, 255])
def test_overlaps_are_those_of_the_masks(ground: int) -> None:
    mask = picture(slice(10, 30), slice(10, 30))
    cases = {
        "the same": (picture(slice(10, 30), slice(10, 30), ground), 1.0),
        "half of it": (picture(slice(10, 20), slice(10, 30), ground), 0.5),
        "moved by half": (picture(slice(20, 40), slice(10, 30), ground), 1 / 3),
        "elsewhere": (picture(slice(35, 55), slice(35, 55), ground), 0.0),
        "nothing": (picture(slice(0, 0), slice(0, 0), ground), 0.0),
    }
    images = np.stack([image for image, _ in cases.values()])
    overlaps = silhouettes.overlaps(images, np.stack([mask] * len(cases)))
    assert overlaps == pytest.approx([value for _, value in cases.values()])


def test_an_empty_image_agrees_with_an_empty_silhouette() -> None:
    empty = picture(slice(0, 0), slice(0, 0))[None]
    assert silhouettes.overlaps(empty, empty) == [1.0]


def test_rendered_scenes_overlap_only_with_their_own_silhouettes() -> None:
    rng = np.random.default_rng(5)
    expected = [scenes.sample_scene(rng) for _ in range(20)]
    masks = np.stack([silhouettes.silhouette(original) for original in expected])
    rendered = np.stack([scenes.render(original) for original in expected])
    own, others = silhouettes.overlaps(rendered, masks), silhouettes.overlaps(rendered, np.roll(masks, 1, axis=0))
    assert own.min() > 0.7
    assert own.mean() > 0.85
    assert others.mean() < 0.5
