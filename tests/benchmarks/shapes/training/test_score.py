"""The score: perfect for drawn scenes, and it says which part went wrong."""

from collections.abc import Sequence

import numpy as np
import pytest

from offcut.benchmarks.shapes import prompts, scenes
from offcut.benchmarks.shapes.training import score


def draw(texts: Sequence[str]) -> list[np.ndarray]:
    return [scenes.render(scenes.scene_from_caption(text, np.random.default_rng(3))) for text in texts]


@pytest.mark.parametrize("kind", prompts.KINDS)
def test_drawn_scenes_score_one_hundred_percent(kind: str) -> None:
    assert score.score(draw, prompts.prompts(kind, 6), batch=4) == score.Score(6, 1, 1, 1, 1, 1, 1)


def test_prompts_are_of_their_kind_and_repeatable() -> None:
    for kind in prompts.KINDS:
        texts = prompts.prompts(kind, 20)
        assert texts == prompts.prompts(kind, 20)
        drawn = [scenes.scene_from_caption(text, np.random.default_rng(0)) for text in texts]
        assert {len(scene.items) for scene in drawn} == ({2} if kind == "two objects" else {1})
        assert all(bool(scene.pairs & scenes.HELD_OUT) == (kind == "held-out pair") for scene in drawn)
    with pytest.raises(ValueError, match="kind of prompt"):
        prompts.prompts("ten objects", 1)


def test_a_wrong_background_costs_only_what_depends_on_it() -> None:
    texts = ["a red circle on a white background", "a red star on a black background"]
    made = score.score(lambda _: draw([texts[0], texts[1].replace("black", "pink")]), texts)
    assert made == score.Score(2, 0.5, 1, 1, 1, 1, 0.5)
