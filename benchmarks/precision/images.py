"""Images of the same prompts with every build and schedule, compared with fp32 and judged."""

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
    """Return the uncached setting, then a setting for each interval with two warm-up calls."""
    rows = [cached(SAMPLER, steps, "uniform", interval, CUTS[0], WARMUP) for interval in intervals]
    return [QualitySetting(SAMPLER, steps), *rows]


def tasks(
    bundle: Bundle, builds: Sequence[Build], count: int, *, guidance: float, seed: int, batch: int, versions: str
) -> dict[Build, pictures.ImageTask]:
    """Return the task of every build; all have the same prompts and seeds.

    Args:
        versions: versions of the packages; the key of stored images contains them and the name of the build.
    """
    prompts = pictures.prompts(count, 1000 + seed)
    return {
        build: pictures.ImageTask(
            prompts, guidance, seed, batch, f"{bundle.built_digest} {build.engine} {build.name} {versions}"
        )
        for build in builds
    }


def generate(
    bundle: Bundle,
    tasks: Mapping[Build, pictures.ImageTask],
    compared: Sequence[QualitySetting],
    folder: Path,
    *,
    threads: int | None,
    on_call: pictures.Progress,
    stage: Callable[[str], None],
) -> Images:
    """Generate and judge the images; images that `folder` has already are read from there.

    Args:
        tasks: the task of every build, with the fp32 build of each engine.
        compared: result of ``settings``.

    Raises:
        UserError: `folder` cannot be written, or a file in it is damaged.
        EngineError: a build cannot be opened here.
    """
    images: dict[tuple[Build, QualitySetting], metrics.Pictures] = {}
    for build, task in tasks.items():
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
                images[build, setting] = pictures.make(pipe, task, setting, folder, on_call).pictures
        finally:
            pipe.unet.close()
    stage("scores")
    net, task = JudgeNet.load(), next(iter(tasks.values()))
    right = {key: obeyed(net, pixels, task.prompts) for key, pixels in images.items()}

    def row(build: Build, setting: QualitySetting) -> ImageRow:
        own, exact, uncached = (build, setting), (Build(build.engine), setting), (Build(build.engine), compared[0])
        to_fp32 = None if own == exact else metrics.psnr(images[own], images[exact])
        return ImageRow(
            engine=build.engine,
            precision=build.name,
            schedule=setting.schedule,
            accuracy=mean_of(right[own]),
            accuracy_change=None if own == exact else mean_of(right[own] - right[exact]),
            psnr=None if to_fp32 is None else mean_of(to_fp32),
            psnr_worst=None if to_fp32 is None else float(to_fp32.min()),
            psnr_uncached=None if own == uncached else mean_of(metrics.psnr(images[own], images[uncached])),
        )

    return Images(
        sampler=SAMPLER,
        steps=compared[0].steps,
        guidance=task.guidance,
        images=len(task.prompts),
        cut=CUTS[0],
        rows=[row(*key) for key in images],
    )
