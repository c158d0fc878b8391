"""Images of a setting, generated in batches and stored in parts, so that an interrupted run can continue."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ...errors import InternalError, UserError
from ...runtime.tuning.artifact import Tuned
from .metrics import Pictures
from .plan import QualitySetting

PART = 128
"""Number of images in a part, which is the most that an interrupted run generates again."""

Progress = Callable[[int], None]
"""Function that is called at every UNet call with its number of images."""


@dataclass(frozen=True)
class ImageTask:
    """The images that every setting of a run generates.

    Attributes:
        prompts: one prompt for each image.
        guidance: guidance scale.
        seed: seed of the first image; image i starts from the noise of seed `seed + i`.
        batch: number of images in one pipeline call.
        identity: text that identifies everything else that the images depend on: the bundle, the engine and versions.
        bundle: bundle with the schedules of settings that have ``bundle_schedule``.
    """

    prompts: tuple[str, ...]
    guidance: float
    seed: int
    batch: int
    identity: str
    bundle: Path | None = None

    def key(self, setting: QualitySetting, first: int) -> str:
        """Return a short digest of everything that the images of the part from image `first` on depend on."""
        prompts = self.prompts[first : first + PART]
        parts = [self.identity, self.guidance, self.seed, self.batch, first, prompts, setting.identity]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SettingImages:
    """The images of a setting.

    Attributes:
        pictures: uint8 (N, 64, 64, 3).
        full, shallow: median seconds of a full and of a shallow UNet call in each part; NaN without such a call.
        timeline: the calls of one generation, as `Run.timeline` shows them.
    """

    pictures: Pictures
    full: tuple[float, ...]
    shallow: tuple[float, ...]
    timeline: str


def make(
    pipe: Any, task: ImageTask, setting: QualitySetting, folder: Path, on_call: Progress = lambda count: None
) -> SettingImages:
    """Return the images of a setting; parts that are missing in `folder` are generated and stored there.

    Args:
        pipe: result of ``offcut.load``, with any scheduler.
        folder: directory with a file for each part.

    Raises:
        UserError: `folder` cannot be written.
    """
    parts = [make_part(pipe, task, setting, first, folder, on_call) for first in range(0, len(task.prompts), PART)]
    timelines = {part.timeline for part in parts}
    if len(timelines) != 1:
        raise InternalError(f"{setting.name}: parts of one setting ran different calls: {', '.join(timelines)}")
    return SettingImages(
        np.concatenate([part.pictures for part in parts]),
        sum((part.full for part in parts), ()),
        sum((part.shallow for part in parts), ()),
        timelines.pop(),
    )


def make_part(
    pipe: Any,
    task: ImageTask,
    setting: QualitySetting,
    first: int,
    folder: Path,
    on_call: Progress = lambda count: None,
) -> SettingImages:
    """Return the part that begins at image ``first``, from ``folder`` or newly generated and stored there.

    Raises:
        UserError: `folder` cannot be written, or the file there is damaged.
    """
    path = part_path(task, setting, first, folder)
    part = _read(path)
    if part is None:
        part = _part(pipe, task, setting, first, on_call)
        _write(path, part)
    return part


def part_path(task: ImageTask, setting: QualitySetting, first: int, folder: Path) -> Path:
    """Return the file of the part that begins at image ``first``."""
    return folder / f"{task.key(setting, first)}.npz"


def missing_parts(task: ImageTask, setting: QualitySetting, folder: Path) -> list[int]:
    """Return the index of the first image of each missing part."""
    starts = range(0, len(task.prompts), PART)
    return [first for first in starts if not part_path(task, setting, first, folder).exists()]


def missing(task: ImageTask, setting: QualitySetting, folder: Path) -> int:
    """Return the number of a setting's images that are missing in ``folder``."""
    return sum(len(task.prompts[first : first + PART]) for first in missing_parts(task, setting, folder))


def scheduler(config: Any, sampler: str) -> Any:
    """Return the scheduler with a name of `plan.SAMPLERS` and the noise schedule in ``config``."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

    classes = {
        "ddim": DDIMScheduler,
        "dpm++ 2m": DPMSolverMultistepScheduler,
        "euler ancestral": EulerAncestralDiscreteScheduler,
    }
    return classes[sampler].from_config(config)


def _part(pipe: Any, task: ImageTask, setting: QualitySetting, first: int, on_call: Progress) -> SettingImages:
    own = pipe.scheduler
    pipe.scheduler = scheduler(own.config, setting.sampler)
    if setting.bundle_schedule is None:
        pipe.unet.set_schedule(setting.parsed, setting.cut, setting.forecast)
    elif task.bundle is None:
        raise InternalError(f"{setting.name} is a bundle's schedule, and the task has no bundle")
    else:
        Tuned.load(task.bundle, setting.bundle_schedule.name).apply(pipe.unet)
    pipe.unet.record_times = True
    pipe.set_progress_bar_config(disable=True)
    try:
        pictures, runs = [], []
        end = min(first + PART, len(task.prompts))
        for start in range(first, end, task.batch):
            places = range(start, min(start + task.batch, end))
            pictures.append(
                batch(pipe, task.prompts, task.seed, places, on_call, steps=setting.steps, guidance=task.guidance)
            )
            runs.append(pipe.unet.last_run)
    finally:
        pipe.scheduler = own

    def median(mark: str) -> float:
        times = [time for run in runs for call, time in zip(run.timeline, run.seconds, strict=True) if call == mark]
        return float(np.median(times)) if times else float("nan")

    return SettingImages(np.concatenate(pictures), (median("#"),), (median("."),), runs[0].timeline)


def _read(path: Path) -> SettingImages | None:
    """Read a stored part; None if the file is missing.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            full, shallow = float(arrays["full"]), float(arrays["shallow"])
            return SettingImages(arrays["pictures"], (full,), (shallow,), str(arrays["timeline"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and its images are generated again") from error


def _write(path: Path, part: SettingImages) -> None:
    """Write a part to a temporary file and rename it, so that the file is always complete.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    arrays: dict[str, Any] = {"pictures": part.pictures, "timeline": part.timeline}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, full=part.full[0], shallow=part.shallow[0], **arrays)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # where the folder itself cannot be created
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; give another directory with -o") from error


def batch(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    places: range,
    on_call: Progress,
    *,
    steps: int,
    guidance: float,
    **options: Any,
) -> Pictures:
    """Generate the images with these indices by one pipeline call: uint8 (N, 64, 64, 3).

    Args:
        prompts: all prompts.
        seed: image i starts from the noise of seed ``seed + i``.
        places: indices of the images.
        on_call: called at every step.
        options: additional arguments of the pipeline.
    """
    import torch

    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_call(len(places))
        return tensors

    images = pipe(
        [prompts[place] for place in places],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed + place) for place in places],
        callback_on_step_end=step_ended,
        output_type="np",
        **options,
    ).images
    return np.asarray(np.rint(images * 255).astype(np.uint8))


def prompts(count: int, seed: int) -> tuple[str, ...]:
    """Return captions of one object, of two, and of a colour and shape never trained together, in turns."""
    from ..shapes.prompts import KINDS
    from ..shapes.prompts import prompts as prompts_of_kind

    kinds = [prompts_of_kind(kind, -(-count // len(KINDS)), seed + index) for index, kind in enumerate(KINDS)]
    return tuple(text for row in zip(*kinds, strict=True) for text in row)[:count]


def render_scenes(texts: Sequence[str], seed: int) -> Pictures:
    """Render a scene for each caption: uint8 (N, 64, 64, 3); `seed` decides what a caption leaves open."""
    from ..shapes import scenes

    random = np.random.default_rng(seed)
    return np.stack([scenes.render(scenes.scene_from_caption(text, random)) for text in texts])


def time_full_call(pipe: Any, task: ImageTask) -> float:
    """Return the seconds of a full UNet call, divided by the images of a batch: the median of a short generation."""
    setting = QualitySetting("ddim", 8)
    one = ImageTask(task.prompts[: task.batch], task.guidance, task.seed, task.batch, task.identity)
    part = _part(pipe, one, setting, 0, lambda count: None)
    return part.full[0] / len(part.pictures)
