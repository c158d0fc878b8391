"""The scenarios in turn, uncached and cached, on the shapes model's prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ..schema.mlperf import MlPerf, Scenario, ScenarioRun
from ..shapes import judge, prompts
from . import loadgen
from .loadgen import Shortened

if TYPE_CHECKING:
    from ...runtime.generation.schedule import Schedule
    from .system import Picture

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Library:
    """The samples that LoadGen draws from, each a prompt with a seed of its own, and how they are drawn.

    Attributes:
        steps, guidance: of every image.
    """

    pipe: Any
    prompts: Sequence[str]
    steps: int
    guidance: float

    def draw(self, indices: Sequence[int]) -> list[Picture]:
        """One picture for each index, uint8 [H, W, 3]; all share their UNet calls."""
        import torch

        images = self.pipe(
            [self.prompts[index] for index in indices],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator("cpu").manual_seed(index) for index in indices],
            output_type="np",
        ).images
        return [np.ascontiguousarray(np.rint(image * 255).astype(np.uint8)) for image in images]

    def rate(self, batch: int) -> float:
        """Images per second in full batches, after a first batch that is not measured."""
        indices = [index % len(self.prompts) for index in range(batch)]
        self.draw(indices)
        began = time.perf_counter()
        self.draw(indices)
        return batch / (time.perf_counter() - began)


def mixed_prompts(count: int) -> list[str]:
    """Captions of one object and of two in turn; the same for the same count."""
    one, two = (prompts.prompts(kind, (count + 1) // 2, seed=2000) for kind in ("one object", "two objects"))
    return [prompt for pair in zip(one, two, strict=True) for prompt in pair][:count]


def run(
    pipe: Any,
    output: Path,
    *,
    scenarios: Sequence[Scenario],
    schedules: Sequence[Schedule | None],
    cut: str | None = None,
    samples: int = 32,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 8,
    settings: Shortened | None = None,
    load: float = 0.7,
    accuracy: bool = True,
    stage: Stage = lambda text: None,
) -> MlPerf:
    """Every scenario with every schedule; LoadGen's logs go into folders under ``output``.

    Args:
        pipe: from ``offcut.load``, of the shapes model.
        samples: prompts in LoadGen's library.
        settings: its ``rate`` is measured here and replaced.
        load: of the server, as a share of the images per second that full batches reach.
        accuracy: also draw every sample once and judge it, for each schedule.

    Raises:
        UserError: LoadGen is missing, the logs cannot be written, or an image could not be drawn.
    """
    version = loadgen.version()
    settings = settings or Shortened()
    pipe.set_progress_bar_config(disable=True)
    library = Library(pipe, mixed_prompts(samples), steps, guidance)
    runs: list[ScenarioRun] = []
    for schedule in schedules:
        pipe.unet.set_schedule(schedule, cut=cut if schedule else None)
        words = None if schedule is None else f"{schedule}, {pipe.unet.cut}"
        stage(f"{words or 'uncached'}: images per second")
        rate = library.rate(batch)
        right: float | None = None
        if accuracy:
            stage(f"{words or 'uncached'}: accuracy of {samples} images")
            right = _accuracy(library, settings, batch, _folder(output, schedule, "accuracy"))
        for scenario in scenarios:
            stage(f"{words or 'uncached'}: {scenario}")
            # Offline, LoadGen makes a query of 1.1 times the expected rate times the duration.
            asked = replace(settings, rate=rate * load if scenario == "Server" else rate * 1.2)
            verdict, batches = loadgen.performance(
                scenario, library.draw, samples, asked, batch, _folder(output, schedule, scenario)
            )
            runs.append(
                ScenarioRun(
                    scenario=scenario,
                    caching=words,
                    valid=verdict.valid,
                    reasons=verdict.reasons,
                    metric=verdict.metric,
                    value=verdict.value,
                    images=sum(batches),
                    latencies=verdict.latencies,
                    accuracy=right,
                    accuracy_images=samples if accuracy else 0,
                    settings=asked.words(scenario),
                )
            )
    return MlPerf(
        model="shapes",
        engine=pipe.unet.engine,
        steps=steps,
        guidance=guidance,
        scheduler=type(pipe.scheduler).__name__,
        batch=batch,
        loadgen=version,
        runs=runs,
    )


def _accuracy(library: Library, settings: Shortened, batch: int, logs: Path) -> float:
    """Share of the pictures that LoadGen logged whose caption the judge found obeyed."""
    shape = library.draw([0])[0].shape
    pictures = loadgen.accuracy("Offline", library.draw, len(library.prompts), settings, batch, logs, shape)
    verdicts = [judge.judge(picture, library.prompts[index]) for index, picture in pictures.items()]
    return sum(verdict.right for verdict in verdicts) / len(verdicts)


def _folder(output: Path, schedule: Schedule | None, name: str) -> Path:
    caching = "uncached" if schedule is None else str(schedule).replace(":", "-").replace("=", "-")
    folder = output / "loadgen" / f"{caching}-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another directory with -o") from error
    return folder
