"""Images are stored in parts; a part is generated again only if something that it depends on changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from offcut.benchmarks.quality import pictures
from offcut.benchmarks.quality.pictures import ImageTask, SettingImages
from offcut.benchmarks.quality.plan import QualitySetting
from offcut.benchmarks.shapes import scenes
from offcut.errors import UserError

TASK = ImageTask(pictures.prompts(9, 1000), guidance=3.0, seed=0, batch=4, identity="bundle engine")
SETTING = QualitySetting("ddim", 8)


def test_prompts_are_balanced_distinct_and_reproducible() -> None:
    texts = pictures.prompts(30, 1000)
    assert texts == pictures.prompts(30, 1000) != pictures.prompts(30, 1001)
    assert texts[:7] == pictures.prompts(7, 1000)
    results = [scenes.scene_from_caption(text, np.random.default_rng(0)) for text in texts]
    assert [len(scene.items) for scene in results] == [1, 2, 1] * 10
    assert [bool(scene.pairs & scenes.HELD_OUT) for scene in results] == [False, False, True] * 10


def test_a_rendered_scene_obeys_its_caption() -> None:
    rendered = pictures.render_scenes(TASK.prompts, 1)
    assert rendered.shape == (9, 64, 64, 3)
    assert (rendered == pictures.render_scenes(TASK.prompts, 1)).all()
    ground = scenes.scene_from_caption(TASK.prompts[0], np.random.default_rng(0)).background
    assert tuple(rendered[0, 0, 0]) == scenes.BACKGROUNDS[ground]


def test_the_key_depends_on_everything_that_changes_an_image() -> None:
    keys = [
        TASK.key(SETTING, 0),
        TASK.key(SETTING, pictures.PART),
        TASK.key(dataclasses.replace(SETTING, steps=9), 0),
        TASK.key(dataclasses.replace(SETTING, schedule="uniform:2", cut="deepcache:0"), 0),
        TASK.key(dataclasses.replace(SETTING, sampler="euler ancestral"), 0),
    ]
    changes = {"prompts": TASK.prompts[:8], "guidance": 2.0, "seed": 1, "batch": 3, "identity": "another"}
    keys += [dataclasses.replace(TASK, **{name: value}).key(SETTING, 0) for name, value in changes.items()]
    assert len(set(keys)) == len(keys)
    assert TASK.key(dataclasses.replace(SETTING, fewer=True), 0) == keys[0]  # the same images under another name


def test_stored_parts_are_read_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    part = SettingImages(pictures.render_scenes(TASK.prompts, 0), (0.5,), (float("nan"),), "#" * 8)
    path = tmp_path / f"{TASK.key(SETTING, 0)}.npz"
    assert pictures.missing(TASK, SETTING, tmp_path) == 9
    pictures._write(path, part)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert pictures.missing(TASK, SETTING, tmp_path) == 0
    stored = pictures.make(None, TASK, SETTING, tmp_path)  # without a pipeline: all images exist
    assert (stored.pictures == part.pictures).all()
    assert stored.full == part.full
    assert np.isnan(stored.shallow[0])
    assert stored.timeline == part.timeline
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it"):
        pictures.make(None, TASK, SETTING, tmp_path)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++ 2m", "euler ancestral"])
def test_a_sampler_keeps_the_models_noise_schedule(sampler: str) -> None:
    from offcut.benchmarks.shapes.training.architecture import new_scheduler

    own = new_scheduler()
    results = pictures.scheduler(own.config, sampler)
    assert results.config.prediction_type == "v_prediction"
    assert results.config.timestep_spacing == "trailing"
    assert (results.alphas_cumprod == own.alphas_cumprod).all()
    results.set_timesteps(20)
    assert float(results.timesteps[0]) == 999
