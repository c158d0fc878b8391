"""``offcut bench precision``: cost and gain of low precision, alone and with caching, on the shapes model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Json, Threads
from ..shell import calls_bar, quiet_libraries, stages
from .outcome import BenchRun

if TYPE_CHECKING:
    from ...benchmarks.precision.builds import Build
    from ...benchmarks.quality.pictures import ImageTask
    from ...benchmarks.quality.plan import QualitySetting
    from ...benchmarks.schema.precision import Calls, Images
    from ...engines.bundle.bundle import Bundle

_PACKAGES = ("offcut", "torch", "diffusers", "transformers", "onnxruntime", "openvino", "numpy")
_OWN = Path("shapes-precision.offcut")


class PrecisionPart(StrEnum):
    """Parts of the benchmark."""

    CALLS = "calls"
    IMAGES = "images"
    JOINT = "joint"


def precision(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Bundle of the shapes model, to which missing builds are added (shapes-precision.offcut); with "
            "--part calls any bundle, unchanged."
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Directory to write result.json to; images in it are reused."),
    ] = Path("bench-precision"),
    part: Annotated[
        list[PrecisionPart] | None,
        typer.Option(help="Times of calls, images of each build, or caching and int8 together; repeatable."),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="onnxruntime or openvino; repeatable; the joint part uses the first.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="bf16 (OpenVINO's hint) or int8, compared with fp32; repeatable.")
    ] = None,
    interval: Annotated[
        list[int] | None,
        typer.Option(help="3 and 5 by default; repeatable; the joint part uses the largest. Costs quality.", min=2),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of DDIM.", min=4)] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.")] = 3.0,
    images: Annotated[int, typer.Option(help="Images of each row.", min=2)] = 96,
    samples: Annotated[
        int, typer.Option(help="Number of images that a schedule of the joint part is tuned with.", min=4)
    ] = 32,
    size: Annotated[
        int | None, typer.Option(help="Image size in pixels for the timed calls; the model's own by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of timing, calls in turns.", min=1)] = 7,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the first image's noise.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images of one pipeline call.", min=1)] = 16,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time every build's calls, compare their images, and combine caching and int8 as CacheQuant's ablation does."""
    from ...benchmarks.precision import images as images_of
    from ...benchmarks.precision import joint
    from ...benchmarks.precision.builds import builds_of, make
    from ...benchmarks.quality.plan import CUTS
    from ...benchmarks.schema.precision import Precision
    from ...benchmarks.shapes.model import model_path
    from ...engines.bundle.bundle import Bundle

    outcome = BenchRun(_PACKAGES)
    asked = list(part or PrecisionPart)
    intervals = interval or [3, 5]
    builds: list[Build] = []
    quiet_libraries()
    if bundle is not None and asked == [PrecisionPart.CALLS]:
        opened = Bundle.open(bundle)
        model = opened.manifest.source.model
    else:
        builds = builds_of(engine or [], precision or [])
        with stages() as stage:
            opened, model = make(model_path(), bundle or _OWN, builds, CUTS[0], stage), "shapes"
    measured = Precision(model=model, threads=threads)
    if PrecisionPart.CALLS in asked:
        measured.calls = _calls(opened, engine or [], size, rounds, threads)
    if PrecisionPart.IMAGES in asked:
        versions = " ".join(f"{name} {version}" for name, version in outcome.environment.packages.items())
        tasks = images_of.tasks(opened, builds, images, guidance=guidance, seed=seed, batch=batch, versions=versions)
        measured.images = _images(opened, tasks, images_of.settings(steps, intervals), output / "pictures", threads)
    if PrecisionPart.JOINT in asked:
        own = [each for each in builds if each.engine == builds[0].engine]
        task = joint.AblationTask(max(intervals), steps, guidance, samples, images, seed=seed)
        with stages() as stage:
            computed = [each.computes_in for each in own]
            measured.joint = joint.ablation(opened, own[0].engine, computed, task, stage, threads=threads)
    outcome.finish(output, f"Low precision on {opened.path.name}", as_json, precision=measured)


def _calls(bundle: Bundle, engines: list[str], size: int | None, rounds: int, threads: int | None) -> Calls:
    from ...benchmarks.latency.loop import vae_scale
    from ...benchmarks.precision.calls import measure
    from ...engines.profiles import trained_side

    side = size or trained_side(bundle.unet_config.get("sample_size"), vae_scale(bundle))
    with stages() as stage:
        return measure(bundle, engines, size=side, rounds=rounds, threads=threads, progress=stage)


def _images(
    bundle: Bundle,
    tasks: Mapping[Build, ImageTask],
    compared: Sequence[QualitySetting],
    folder: Path,
    threads: int | None,
) -> Images:
    from ...benchmarks.precision.images import generate
    from ...benchmarks.quality.pictures import missing

    total = sum(setting.steps * missing(task, setting, folder) for task in tasks.values() for setting in compared)
    with calls_bar(total) as (on_call, stage):
        return generate(bundle, tasks, compared, folder, threads=threads, on_call=on_call, stage=stage)
