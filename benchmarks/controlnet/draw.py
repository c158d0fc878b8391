"""Draws the scenes of a way, watching the ControlNet. Finished ways are kept: a run that was cut off goes on."""

from __future__ import annotations

import hashlib
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
from ..quality import npz_cache
from ..quality.metrics import Pictures
from ..quality.pictures import Progress, batch
from .ways import CUT, ControlNetSetting, SceneTask


@dataclass
class ControlNetMeter:
    """What a ControlNet did: how often its layers ran, and the seconds of its calls, those with no pass too."""

    passes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """The pictures of a way, uint8 (N, 64, 64, 3), with the UNet's calls and the ControlNet's passes for one batch."""

    pictures: Pictures
    timeline: str
    passes: int


class Pipelines:
    """Diffusers' pipelines on one open UNet: without a ControlNet, with one, and with one that rests.

    Args:
        unet: of a bundle with inputs for a ControlNet's residuals.
        model: the directory of the pipeline.
        controlnet: that of the ControlNet, which runs in eager PyTorch.
    """

    def __init__(self, unet: UNet, model: Path, controlnet: Path) -> None:
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

        self.unet = unet
        whole = StableDiffusionPipeline.from_pretrained(model)
        parts = whole.components | {"scheduler": type(whole.scheduler).from_config(whole.scheduler.config)}
        self._plain = attach(whole, unet)
        self._controlled: dict[bool, Any] = {}
        for reused in (False, True):
            net = ControlNetModel.from_pretrained(controlnet).eval()
            made = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
            self._controlled[reused] = attach(made, unet, reuse_controlnet=reused)
        for pipe in (self._plain, *self._controlled.values()):
            pipe.set_progress_bar_config(disable=True)

    @property
    def scheduler(self) -> str:
        """The class of the pipelines' scheduler."""
        return type(self._plain.scheduler).__name__

    def draw(
        self, task: SceneTask, way: ControlNetSetting, places: range, on_step: Progress, watch: ControlNetMeter
    ) -> Pictures:
        """The pictures at these places of the task, by one call of the way's pipeline: uint8 (N, 64, 64, 3)."""
        import torch

        pipe: Any = self._controlled[way.reused] if way.control else self._plain
        asked: dict[str, Any] = {}
        if way.control:
            chosen = task.silhouettes[places.start : places.stop]
            asked["image"] = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255  # [N, 3, 64, 64]
        self.unet.set_schedule(way.schedule, None if way.schedule is None else CUT)
        asked |= {"steps": task.steps, "guidance": task.guidance}
        with _watched(pipe.controlnet if way.control else None, watch):
            return batch(pipe, task.prompts, task.seed, places, on_step, **asked)


@contextmanager
def _watched(net: Any, watch: ControlNetMeter) -> Iterator[None]:
    """Counts a ControlNet's passes and its seconds; None for no ControlNet."""
    if net is None:
        yield
        return
    began = [0.0]

    def begins(*_: object) -> None:
        began[0] = time.perf_counter()

    def ends(*_: object) -> None:
        watch.seconds += time.perf_counter() - began[0]

    def runs(*_: object) -> None:
        watch.passes += 1

    # A ControlNet that rests answers without its layers: its first one counts the passes.
    hooks = [
        net.register_forward_pre_hook(begins),
        net.register_forward_hook(ends),
        net.conv_in.register_forward_hook(runs),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def make(pipes: Pipelines, task: SceneTask, way: ControlNetSetting, folder: Path, on_step: Progress) -> Drawn:
    """Draws all scenes in a way, unless they lie in `folder` already.

    Raises:
        UserError: `folder` cannot be written, or what lies there is damaged.
    """
    path = folder / f"{task.key(way)}.npz"
    lying = npz_cache.read(path, "pictures", "timeline", "passes")
    if lying is not None:
        return Drawn(*lying)
    pictures: list[Pictures] = []
    ran: set[tuple[str, int]] = set()
    for start in range(0, len(task.prompts), task.batch):
        places, watch = range(start, min(start + task.batch, len(task.prompts))), ControlNetMeter()
        pictures.append(pipes.draw(task, way, places, on_step, watch))
        run = pipes.unet.last_run
        if run is None:
            raise InternalError("the pipeline did not call the UNet")
        ran.add((run.timeline, watch.passes))
    if len(ran) != 1:
        raise InternalError(f"{way.name}: batches of one way ran different calls: {sorted(ran)}")
    made = Drawn(np.concatenate(pictures), *ran.pop())
    npz_cache.write(path, pictures=made.pictures, timeline=made.timeline, passes=made.passes)
    return made


def digest(controlnet: Path) -> str:
    """Of a ControlNet's weights and configuration.

    Raises:
        UserError: there is none in the directory.
    """
    found = hashlib.sha256()
    try:
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            found.update((controlnet / name).read_bytes())
    except OSError as error:
        raise UserError(f"{controlnet} holds no ControlNet as diffusers saves it ({error}): give another") from error
    return found.hexdigest()


def missing(task: SceneTask, way: ControlNetSetting, folder: Path) -> int:
    """How many pictures of a way are still to be drawn."""
    return 0 if (folder / f"{task.key(way)}.npz").exists() else len(task.prompts)
