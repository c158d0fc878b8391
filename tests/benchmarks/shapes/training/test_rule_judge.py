"""The rule-based judge reads rendered scenes without errors and finds wrong parts."""

import numpy as np
import pytest

from offcut.benchmarks.shapes import scenes
from offcut.benchmarks.shapes.training import rule_judge


def rendered(text: str, seed: int = 0) -> np.ndarray:
    return scenes.render(scenes.scene_from_caption(text, np.random.default_rng(seed)))


@pytest.mark.parametrize("held_out", [False, True])
def test_rendered_scenes_are_judged_right(held_out: bool) -> None:
    rng = np.random.default_rng(11)
    for _ in range(40):
        scene = scenes.sample_scene(rng, held_out=held_out)
        verdict = rule_judge.judge_by_rules(scenes.render(scene), scenes.caption(scene))
        assert verdict.right, (scenes.caption(scene), verdict)


def test_faint_noise_does_not_change_the_verdict() -> None:
    text = "a small blue star above a large red cross on a pink background"
    noise = np.random.default_rng(0).normal(0, 5, (64, 64, 3))
    picture = np.clip(rendered(text) + noise, 0, 255).astype(np.uint8)
    assert rule_judge.judge_by_rules(picture, text).right


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        ("a red circle on a grey background", "background"),
        ("a blue circle on a white background", "colours"),
        ("a red star on a white background", "shapes"),
        ("a red circle above a red circle on a white background", "count"),
    ],
)
def test_a_wrong_part_of_a_picture_is_found(shown: str, wrong: str) -> None:
    verdict = rule_judge.judge_by_rules(rendered(shown), "a red circle on a white background")
    assert not verdict.right
    assert not getattr(verdict, wrong)


def test_relations_and_the_assignment_of_shapes_are_judged() -> None:
    caption = "a red circle left of a blue square on a white background"
    turned = rule_judge.judge_by_rules(rendered("a red circle right of a blue square on a white background"), caption)
    assert turned.shapes
    assert not turned.relation
    swapped = rule_judge.judge_by_rules(rendered("a red square left of a blue circle on a white background"), caption)
    assert swapped.relation
    assert not swapped.shapes


def test_an_empty_picture_has_no_objects() -> None:
    picture = np.full((64, 64, 3), 250, dtype=np.uint8)
    assert rule_judge.look(picture) == ("white", ())
    assert not rule_judge.judge_by_rules(picture, "a red circle on a white background").count


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        rule_judge.look(np.zeros((64, 64, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="not the caption"):
        rule_judge.judge_by_rules(np.zeros((64, 64, 3), dtype=np.uint8), "a cat")
