"""Images of the same prompts with every build and schedule: distance to fp32, and prompts obeyed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...engines.bundle.bundle import Bundle
from ...runtime.pipeline import load
from ..quality import metrics, pictures
from ..quality.plan import CUTS, QualitySetting, cached
from ..schema.precision import ImageRow, Images
from ..shapes.judge_net.reader import JudgeNet, obeyed
from ..stats import mean_of
from .builds import Build

SAMPLER = "ddim"
WARMUP = 2


def settings(steps: int, intervals: Sequence[int]) -> list[QualitySetting]:
    """Return the uncached setting, then every interval after two full calls."""
    rows = [cached(SAMPLER, steps, "uniform", interval, CUTS[0], WARMUP) for interval in intervals]
    return [QualitySetting(SAMPLER, steps), *rows]


def tasks(
    bundle: Bundle, builds: Sequence[Build], count: int, *, guidance: float, seed: int, batch: int, versions: str
) -> dict[Build, pictures.ImageTask]:
    """Return the same prompts and seeds for every build.

    Args:
        versions: of the packages that compute; they and the build's name are part of the key of stored images.
    """
    prompts = pictures.prompts(count, 1000 + seed)
    return {
        each: pictures.ImageTask(
            prompts, guidance, seed, batch, f"{bundle.built_digest} {each.engine} {each.name} {versions}"
        )
        for each in builds
    }


def draw(
    bundle: Bundle,
    asked: Mapping[Build, pictures.ImageTask],
    compared: Sequence[QualitySetting],
    folder: Path,
    *,
    threads: int | None,
    on_call: pictures.Progress,
    stage: Callable[[str], None],
) -> Images:
    """Generate and judge the images; those that `folder` has already are read from there.

    Args:
        asked: the task of every build; each engine has fp32 among its builds.
        compared: as ``settings`` returns them.

    Raises:
        UserError: `folder` cannot be written, or a file in it is damaged.
        EngineError: a build cannot be opened here.
    """
    drawn: dict[tuple[Build, QualitySetting], metrics.Pictures] = {}
    for build, task in asked.items():
        stage(f"{build.engine} {build.name}")
        pipe = load(
            bundle,
            build.engine,
            precision=build.precision,
            inference_precision=build.computes_in,
            threads=threads,
        )
        try:
            for setting in compared:
                drawn[build, setting] = pictures.make(pipe, task, setting, folder, on_call).pictures
        finally:
            pipe.unet.close()
    stage("scores")
    net, task = JudgeNet.load(), next(iter(asked.values()))
    right = {each: obeyed(net, made, task.prompts) for each, made in drawn.items()}

    def row(build: Build, setting: QualitySetting) -> ImageRow:
        own, exact, uncached = (build, setting), (Build(build.engine), setting), (Build(build.engine), compared[0])
        near = None if own == exact else metrics.psnr(drawn[own], drawn[exact])
        return ImageRow(
            engine=build.engine,
            precision=build.name,
            schedule=setting.schedule,
            accuracy=mean_of(right[own]),
            accuracy_change=None if own == exact else mean_of(right[own] - right[exact]),
            psnr=None if near is None else mean_of(near),
            psnr_worst=None if near is None else float(near.min()),
            psnr_uncached=None if own == uncached else mean_of(metrics.psnr(drawn[own], drawn[uncached])),
        )

    return Images(
        sampler=SAMPLER,
        steps=compared[0].steps,
        guidance=task.guidance,
        images=len(task.prompts),
        cut=CUTS[0],
        rows=[row(*each) for each in drawn],
    )
