"""The packaged model is small, has Stable Diffusion's layout, and obeys its prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from offcut.benchmarks.shapes import model, scenes
from offcut.benchmarks.shapes.training import rule_judge
from offcut.errors import ModelError


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(model.model_path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_all_files_together_take_at_most_12_megabytes() -> None:
    sizes = {path: path.stat().st_size for path in model.model_path().rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 12_000_000
    assert {"README.md", "samples.png", "model_index.json"} <= {path.name for path in sizes}


def test_the_model_files_contain_no_path_of_another_machine() -> None:
    for path in model.model_path().rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(Path.home()) not in text
        assert "_name_or_path" not in json.loads(text), path


def test_the_model_loads_in_single_precision_with_twelve_skip_connections(pipe: StableDiffusionPipeline) -> None:
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        assert part.dtype == torch.float32
    skips = 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in pipe.unet.down_blocks)
    joins = sum(len(block.resnets) for block in pipe.unet.up_blocks)
    assert skips == joins == 12
    assert pipe.safety_checker is None


def test_sampling_starts_from_the_noise_level_of_the_training(pipe: StableDiffusionPipeline) -> None:
    pipe.scheduler.set_timesteps(20)
    first = pipe.scheduler.timesteps[0]
    signal = pipe.scheduler.alphas_cumprod[first].sqrt()
    assert 0 < signal < 0.02
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def generate(pipe: StableDiffusionPipeline, prompts: list[str], steps: int = 15) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    output = pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, generator=generators, output_type="np")
    return list((output.images * 255).round().astype(np.uint8))


def test_a_red_circle_on_white_is_red_and_on_white(pipe: StableDiffusionPipeline) -> None:
    (picture,) = generate(pipe, ["a large red circle on a white background"])
    corners = np.concatenate([picture[:6, :6], picture[-6:, -6:]]).reshape(-1, 3).astype(float)
    middle = picture[28:36, 28:36].reshape(-1, 3).astype(float)
    assert corners.mean() > 225
    assert middle[:, 0].mean() > 150
    assert middle[:, 0].mean() - middle[:, 1:].mean() > 80


def test_single_objects_have_the_right_colour_and_all_but_one_the_right_shape(pipe: StableDiffusionPipeline) -> None:
    prompts = [text for text in model.PROMPTS if not any(f" {r} " in text for r in scenes.RELATIONS)]
    pictures = generate(pipe, prompts)
    verdicts = [rule_judge.judge_by_rules(picture, text) for picture, text in zip(pictures, prompts, strict=True)]
    assert all(v.background and v.count and v.colours for v in verdicts), verdicts
    assert sum(v.right for v in verdicts) >= len(prompts) - 1, verdicts  # one shape in six by chance


def test_prompts_are_captions_without_held_out_pairs() -> None:
    for text in model.PROMPTS:
        scene = scenes.scene_from_caption(text, np.random.default_rng(0))
        assert not scene.pairs & scenes.HELD_OUT


def test_a_missing_model_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DIRECTORY", tmp_path / "absent")
    with pytest.raises(ModelError, match=r"the shapes model is missing from .*absent: reinstall offcut"):
        model.model_path()
