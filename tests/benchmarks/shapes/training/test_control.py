"""Training of the ControlNet: its start, a resumed run, the export; and the effect of the shipped ControlNet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from typer.testing import CliRunner

from offcut.benchmarks.shapes import model, scenes, silhouettes
from offcut.benchmarks.shapes.training import checkpoint, export, train_control
from offcut.benchmarks.shapes.training.control_stage import ControlSettings, ControlTrainer
from offcut.benchmarks.shapes.training.control_stage import train_control as train

SETTINGS = ControlSettings(steps=2, batch=2, held_out=2, save_every=1, log_every=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ControlTrainer]:
    run = tmp_path_factory.mktemp("control")
    return run, train(run, model.model_path(), SETTINGS, "cpu", resume=False)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_an_untrained_controlnet_does_not_change_the_error() -> None:
    errors = ControlTrainer(model.model_path(), SETTINGS, "cpu").held_out()
    assert errors["held_out"] == errors["without"] > 0


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    finished: tuple[Path, ControlTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutOffError(Exception):
        """A simulated power failure."""

    save = checkpoint.save

    def failing(path: Path, state: Any) -> None:
        save(path, state)
        raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", failing)
        with pytest.raises(CutOffError):
            train(tmp_path, model.model_path(), SETTINGS, "cpu", resume=True)
    assert checkpoint.load(tmp_path / "control.pt")["step"] == 1
    train(tmp_path, model.model_path(), SETTINGS, "cpu", resume=True)
    one, other = (checkpoint.load(run / "control.pt") for run in (finished[0], tmp_path))
    assert one["step"] == 2
    assert equal(one, other)
    assert [row["step"] for row in checkpoint.read_log(tmp_path / "control.jsonl")] == [1, 2]


def test_the_controlnet_learns_and_the_unet_does_not(finished: tuple[Path, ControlTrainer]) -> None:
    _, trainer = finished
    fresh = ControlTrainer(model.model_path(), SETTINGS, "cpu")
    begun = fresh.net.state_dict()
    assert any(not torch.equal(value, begun[name]) for name, value in trainer.net.state_dict().items())
    assert not torch.equal(
        trainer.net.controlnet_down_blocks[0].weight, torch.zeros_like(trainer.net.controlnet_down_blocks[0].weight)
    )
    assert equal(dict(trainer.unet.state_dict()), dict(fresh.unet.state_dict()))
    assert all(parameter.grad is None for parameter in trainer.unet.parameters())


def test_each_step_has_its_own_scenes_which_are_reproducible(
    finished: tuple[Path, ControlTrainer],
) -> None:
    _, trainer = finished
    one, repeated, other = trainer.batch(7, 2), trainer.batch(7, 2), trainer.batch(8, 2)
    assert equal(vars(one), vars(repeated))
    assert not torch.equal(one.silhouettes, other.silhouettes)
    assert not torch.equal(one.noisy, other.noisy)
    assert set(one.silhouettes.unique().tolist()) == {0.0, 1.0}


def test_the_command_exports_the_trained_weights_with_a_card(
    finished: tuple[Path, ControlTrainer], tmp_path: Path
) -> None:
    run, trainer = finished
    out = tmp_path / "control"
    options = ["--run", str(run), "--out", str(out), "--steps", "2", "--judged", "1", "--threads", "1"]
    app = typer.Typer()
    app.command()(train_control.main)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    net = ControlNetModel.from_pretrained(out)
    average = trainer.averaged().state_dict()
    assert all(torch.equal(value, average[name].half().float()) for name, value in net.state_dict().items())
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "--steps 2`" in card
    assert "| with the ControlNet | " in card


@pytest.fixture(scope="module")
def pipe() -> Iterator[StableDiffusionControlNetPipeline]:
    net = ControlNetModel.from_pretrained(model.control_path())
    parts = export.load_pipeline(model.model_path()).components
    controlled = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    return controlled


def test_the_shipped_controlnet_improves_the_overlap_with_silhouettes(pipe: StableDiffusionControlNetPipeline) -> None:
    rng = np.random.default_rng(41)
    originals = [scenes.sample_scene(rng) for _ in range(6)]
    masks = np.stack([silhouettes.silhouette(scene) for scene in originals])
    overlaps = []
    for scale in (1.0, 0.0):
        images = pipe(
            [silhouettes.open_caption(scene) for scene in originals],
            image=torch.from_numpy(masks).permute(0, 3, 1, 2).float() / 255,
            controlnet_conditioning_scale=scale,
            num_inference_steps=10,
            guidance_scale=export.GUIDANCE,
            generator=[torch.Generator().manual_seed(place) for place in range(len(originals))],
            output_type="np",
        ).images
        overlaps.append(silhouettes.overlaps(np.rint(images * 255).astype(np.uint8), masks).mean())
    assert overlaps[0] > overlaps[1] + 0.1
