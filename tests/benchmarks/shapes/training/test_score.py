"""The score is perfect for rendered scenes, and shows which part of a picture is wrong."""

from collections.abc import Sequence

import numpy as np
import pytest

from offcut.benchmarks.shapes import prompts, scenes
from offcut.benchmarks.shapes.training import score


def render(texts: Sequence[str]) -> list[np.ndarray]:
    return [scenes.render(scenes.scene_from_caption(text, np.random.default_rng(3))) for text in texts]


@pytest.mark.parametrize("kind", prompts.KINDS)
def test_rendered_scenes_have_a_perfect_score(kind: str) -> None:
    assert score.score(render, prompts.prompts(kind, 6), batch=4) == score.Score(6, 1, 1, 1, 1, 1, 1)


def test_prompts_have_their_kind_and_are_reproducible() -> None:
    for kind in prompts.KINDS:
        texts = prompts.prompts(kind, 20)
        assert texts == prompts.prompts(kind, 20)
        originals = [scenes.scene_from_caption(text, np.random.default_rng(0)) for text in texts]
        assert {len(scene.items) for scene in originals} == ({2} if kind == "two objects" else {1})
        assert all(bool(scene.pairs & scenes.HELD_OUT) == (kind == "held-out pair") for scene in originals)
    with pytest.raises(ValueError, match="kind of prompt"):
        prompts.prompts("ten objects", 1)


def test_a_wrong_background_lowers_only_the_background_score() -> None:
    texts = ["a red circle on a white background", "a red star on a black background"]
    result = score.score(lambda _: render([texts[0], texts[1].replace("black", "pink")]), texts)
    assert result == score.Score(2, 0.5, 1, 1, 1, 1, 0.5)
