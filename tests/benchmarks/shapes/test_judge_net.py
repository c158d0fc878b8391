"""The judge network reads rendered scenes, its distances grow with disturbances, its training is reproducible."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.benchmarks.quality.metrics import frechet
from offcut.benchmarks.shapes import judge, model, scenes
from offcut.benchmarks.shapes.judge_net.network import CELL
from offcut.benchmarks.shapes.judge_net.reader import DIRECTORY, WEIGHTS, JudgeNet, Reading, verdicts
from offcut.benchmarks.shapes.training import checkpoint, rule_judge, vae_stage
from offcut.benchmarks.shapes.training import judge_data as data
from offcut.benchmarks.shapes.training import judge_stage as stage
from offcut.benchmarks.shapes.training.judge_evaluate import NONE, evaluate
from offcut.errors import ModelError

DRAWN = data.judged_scenes(200, 987)


@pytest.fixture(scope="module")
def net() -> JudgeNet:
    return JudgeNet.load()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([scenes.render(scene) for scene in DRAWN])


def test_the_judge_network_takes_less_than_a_megabyte() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 1_000_000


def test_the_judge_network_reads_rendered_scenes_with_all_pairs(net: JudgeNet, pictures: np.ndarray) -> None:
    result = evaluate(DRAWN, net.read(pictures))
    assert result.scenes == 200
    assert {"one object", "two objects", "held-out pair"} == result.by_kind.keys()
    assert result.right >= 0.98, result.by_kind


def test_the_card_has_the_figures_of_the_judge_network() -> None:
    text = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| as rendered |"))
    assert float(row.split("|")[-2].strip(" %")) >= 98
    for name in ("Colour", "Shape", "Relation", "Count", "Background"):
        assert float(re.search(rf"^{name}, ([\d.]+)% right:$", text, re.MULTILINE)[1]) >= 98  # type: ignore[index]
    for word in (*scenes.COLOURS, *scenes.SHAPES, *scenes.RELATIONS, *scenes.BACKGROUNDS):
        assert f"\n| {word} | " in text


def test_both_judges_agree_on_rendered_scenes(net: JudgeNet, pictures: np.ndarray) -> None:
    """Both judges agree on the right caption and on another one."""
    captions = [scenes.caption(scene) for scene in DRAWN[:8]]
    for texts in (captions, captions[1:] + captions[:1]):
        ruled = [rule_judge.judge_by_rules(picture, text) for picture, text in zip(pictures, texts, strict=False)]
        assert verdicts(net, pictures[:8], texts) == ruled


def test_an_empty_picture_has_no_object(net: JudgeNet) -> None:
    (reading,) = net.read(np.full((1, 64, 64, 3), scenes.BACKGROUNDS["teal"], dtype=np.uint8))
    assert reading == Reading("teal", ())


def test_distances_are_zero_between_equal_images_and_grow_with_blur_shift_and_noise(
    net: JudgeNet, pictures: np.ndarray
) -> None:
    few = pictures[:16]
    random = np.random.default_rng(0)

    def noisy(deviation: float) -> np.ndarray:
        return np.clip(few + random.normal(scale=deviation, size=few.shape), 0, 255).astype(np.uint8)

    def blurred(times: int) -> np.ndarray:
        values = few.astype(np.float64)
        for _ in range(times):
            padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
            values = sum(padded[:, y : y + 64, x : x + 64] for y in range(3) for x in range(3)) / 9
        return values.astype(np.uint8)

    assert net.distance(few, few).max() == 0
    np.testing.assert_allclose(net.distance(few, noisy(4)), net.distance(noisy(0), noisy(4)), rtol=0.5)
    for steps in (
        [blurred(1), blurred(3), blurred(9)],
        [np.roll(few, pixels, axis=2) for pixels in (1, 2, 4)],
        [noisy(deviation) for deviation in (3, 10, 30)],
    ):
        means = [net.distance(few, disturbed).mean() for disturbed in steps]
        assert 0 < means[0] < means[1] < means[2] <= 2, means


def test_reading_does_not_change_the_gradient_mode(net: JudgeNet, pictures: np.ndarray) -> None:
    for act in (net.read, net.pooled, lambda images: net.distance(images, images)):
        act(pictures[:2])
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_the_frechet_distance_grows_with_the_number_of_wrong_images(net: JudgeNet, pictures: np.ndarray) -> None:
    first, other = net.pooled(pictures[:100]), net.pooled(pictures[100:])
    noise = np.random.default_rng(0).normal(scale=40, size=pictures[:100].shape)
    noisy = np.clip(pictures[:100] + noise, 0, 255).astype(np.uint8)
    one_colour = pictures[:100][..., ::-1].copy()  # exchanges red and blue
    undisturbed = frechet(first, other)
    assert frechet(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet(net.pooled(noisy), other) > 1.5 * undisturbed
    assert frechet(net.pooled(one_colour), other) > undisturbed


def test_the_evaluation_counts_each_kind_of_fault() -> None:
    scene = next(scene for scene in DRAWN if scene.relation == "above")
    objects = tuple(judge.SeenObject(item.colour, item.shape, item.x, item.y, 1.0) for item in scene.items)
    right = Reading(scene.background, objects)
    wrong_colour = dataclasses.replace(objects[0], colour=next(c for c in scenes.COLOURS if c != objects[0].colour))
    faulty = {
        "background": Reading(next(b for b in scenes.BACKGROUNDS if b != scene.background), objects),
        "colour": Reading(scene.background, (wrong_colour, objects[1])),
        "count": Reading(scene.background, (*objects, dataclasses.replace(objects[0], x=objects[0].x + 20))),
        "relation": Reading(scene.background, objects[1:]),
    }
    assert evaluate([scene], [right]).right == 1
    for name, reading in faulty.items():
        result = evaluate([scene], [reading])
        assert result.right == 0, name
        assert result.matrices[name].right < 1, name
    assert evaluate([scene], [faulty["relation"]]).matrices["relation"].counts["above", NONE] == 1


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_targets_are_hottest_at_the_objects_also_when_mirrored(seed: int, mirrored: bool) -> None:
    scene = data.judged_scenes(1, seed)[0]
    labels = data.labels_of([scene]).mirrored(torch.tensor([mirrored]))
    heat, colour, shape = data.targets(labels)
    for item in scene.items:
        x = 64 - item.x if mirrored else item.x
        row, column = int(item.y // CELL), int(min(x, 63.999) // CELL)
        assert heat[0, row, column] > 0.6
        assert list(scenes.COLOURS)[int(colour[0, row, column])] == item.colour
        assert scenes.SHAPES[int(shape[0, row, column])] == item.shape
    assert (heat > 0.6).sum() <= 4 * len(scene.items)


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = stage.JudgeSettings(steps=4, batch=4, pictures=12, softened=4, save_every=2)
    whole = stage.train_judge(tmp_path / "whole", small).state_dict()
    save = checkpoint.save

    def cut_off(path: Path, state: Any) -> None:
        save(path, state)
        if path.name == "judge.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            stage.train_judge(tmp_path / "cut", small)
    assert checkpoint.load(tmp_path / "cut" / "judge.pt")["step"] == 2
    resumed = stage.train_judge(tmp_path / "cut", small).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_softened_pictures_are_close_to_the_originals(pictures: np.ndarray) -> None:
    rendered = vae_stage.render_all(DRAWN[:4])
    soft = data.softened(rendered, model.model_path() / "vae", 0.0, 1)
    assert soft.shape == rendered.shape
    assert 0 < np.abs(soft.astype(int) - rendered).mean() < 8


def test_invalid_images_and_weights_are_refused(net: JudgeNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        net.read(np.zeros((1, 64, 64, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="64"):
        net.pooled(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="same number"):
        net.distance(np.zeros((1, 64, 64, 3), dtype=np.uint8), np.zeros((2, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(ModelError, match="reinstall offcut"):
        JudgeNet.load(tmp_path)
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="network of another version"):
        JudgeNet.load(tmp_path)
