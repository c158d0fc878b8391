"""Pipelines with and without a ControlNet on one open UNet, and the images that they generate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InternalError, UserError
from ...runtime.pipeline import attach
from ...runtime.unet import UNet
from ..quality.metrics import Pictures
from ..quality.pictures import Progress, batch
from .settings import CUT, ControlNetSetting, SceneTask


@dataclass
class ControlNetMeter:
    """Number of passes through a ControlNet's layers, and seconds of all its calls, also of skipped ones."""

    passes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class SceneImages:
    """The images of a setting, uint8 (N, 64, 64, 3), with the UNet calls and ControlNet passes of one batch."""

    pictures: Pictures
    timeline: str
    passes: int


class Pipelines:
    """Three diffusers pipelines on one open UNet: without a ControlNet, with one, and with a reused one.

    Args:
        unet: UNet of a bundle with inputs for a ControlNet's residuals.
        model: directory of the pipeline.
        controlnet: directory of the ControlNet, which runs in eager PyTorch.

    Raises:
        UserError: the directory holds no ControlNet.
    """

    def __init__(self, unet: UNet, model: Path, controlnet: Path) -> None:
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

        if not (controlnet / "config.json").is_file():
            raise UserError(f"{controlnet} holds no ControlNet in diffusers' format: give another directory")
        self.unet = unet
        plain = StableDiffusionPipeline.from_pretrained(model)
        components = plain.components | {"scheduler": type(plain.scheduler).from_config(plain.scheduler.config)}
        self._plain = attach(plain, unet)
        self._controlled: dict[bool, Any] = {}
        for reused in (False, True):
            net = ControlNetModel.from_pretrained(controlnet).eval()
            pipe = StableDiffusionControlNetPipeline(**components, controlnet=net, requires_safety_checker=False)
            self._controlled[reused] = attach(pipe, unet, reuse_controlnet=reused)
        for pipe in (self._plain, *self._controlled.values()):
            pipe.set_progress_bar_config(disable=True)

    @property
    def scheduler(self) -> str:
        """Class name of the scheduler."""
        return type(self._plain.scheduler).__name__

    def generate(
        self, task: SceneTask, setting: ControlNetSetting, places: range, on_step: Progress, meter: ControlNetMeter
    ) -> Pictures:
        """Generate the images with these indices by one pipeline call: uint8 (N, 64, 64, 3)."""
        import torch

        pipe: Any = self._controlled[setting.reused] if setting.control else self._plain
        options: dict[str, Any] = {}
        if setting.control:
            chosen = task.silhouettes[places.start : places.stop]
            options["image"] = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255  # [N, 3, 64, 64]
        self.unet.set_schedule(setting.schedule, None if setting.schedule is None else CUT)
        options |= {"steps": task.steps, "guidance": task.guidance}
        with _metered(pipe.controlnet if setting.control else None, meter):
            return batch(pipe, task.prompts, task.seed, places, on_step, **options)


@contextmanager
def _metered(net: Any, meter: ControlNetMeter) -> Iterator[None]:
    """Record the passes and seconds of a ControlNet in ``meter``; a ``net`` of None records nothing."""
    if net is None:
        yield
        return
    began = [0.0]

    def begin(*_: object) -> None:
        began[0] = time.perf_counter()

    def end(*_: object) -> None:
        meter.seconds += time.perf_counter() - began[0]

    def count(*_: object) -> None:
        meter.passes += 1

    # A skipped ControlNet returns without running its layers: the first layer counts the passes.
    hooks = [
        net.register_forward_pre_hook(begin),
        net.register_forward_hook(end),
        net.conv_in.register_forward_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate_images(pipes: Pipelines, task: SceneTask, setting: ControlNetSetting, on_step: Progress) -> SceneImages:
    """Return the images of a setting, generated in batches.

    Raises:
        InternalError: two batches ran different calls.
    """
    pictures: list[Pictures] = []
    calls: set[tuple[str, int]] = set()
    for start in range(0, len(task.prompts), task.batch):
        places, meter = range(start, min(start + task.batch, len(task.prompts))), ControlNetMeter()
        pictures.append(pipes.generate(task, setting, places, on_step, meter))
        run = pipes.unet.last_run
        if run is None:
            raise InternalError("the pipeline did not call the UNet")
        calls.add((run.timeline, meter.passes))
    if len(calls) != 1:
        raise InternalError(f"{setting.name}: batches of one setting ran different calls: {sorted(calls)}")
    return SceneImages(np.concatenate(pictures), *calls.pop())
