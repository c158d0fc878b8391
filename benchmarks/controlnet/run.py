"""Draws the same scenes in every way, and says how near to the uncached picture, how obedient and how fast each is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from ...runtime.generation.state import Run
from ...runtime.images.picture import Tile, sheet
from ..quality import metrics
from ..quality.pictures import Progress
from ..schema.controlnet import ControlNetReuse, ControlNetRow, ReuseChange
from ..shapes import silhouettes
from ..shapes.judge_net.reader import JudgeNet, obeyed
from ..stats import mean_of
from .draw import ControlNetMeter, Drawn, Pipelines, make
from .ways import CUT, UNCACHED, ControlNetSetting, SceneTask

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE = "scenes.png"
SHOWN = 4
"""Scenes in the picture."""


@dataclass(frozen=True)
class _Scored:
    """One value for each scene, (N,)."""

    psnr: metrics.Values
    overlap: metrics.Values
    right: metrics.Values


@dataclass(frozen=True)
class _Times:
    """Seconds per image, one a round: of the pipeline's call, and in the ControlNet."""

    seconds: list[float]
    controlnet: list[float]


def run(
    pipes: Pipelines,
    task: SceneTask,
    ways: Sequence[ControlNetSetting],
    folder: Path,
    *,
    rounds: int,
    model: str,
    controlnet: str,
    on_step: Progress = lambda count: None,
    stage: Callable[[str], None] = lambda text: None,
) -> ControlNetReuse:
    """Draws and scores all ways, then times a batch of each in turns.

    Args:
        ways: the uncached one with the ControlNet among them, and beside each reused one its twin.
        folder: of ``result.json``; gets the pictures (``pictures/``) and the picture of some scenes.
        rounds: of the times; 0 takes none.
        model, controlnet: their names in the result.
        on_step: told of every denoising step.
        stage: told what is being done.

    Raises:
        UserError: `folder` cannot be written, or something in it is damaged.
    """
    drawn: dict[ControlNetSetting, Drawn] = {}
    for way in ways:
        stage(way.name)
        drawn[way] = make(pipes, task, way, folder / "pictures", on_step)
    stage("times")
    times = _times(pipes, task, ways, rounds, on_step)
    stage("scores")
    net = JudgeNet.load()
    base = drawn[UNCACHED].pictures
    scored = {
        way: _Scored(
            psnr=metrics.psnr(made.pictures, base),
            overlap=silhouettes.overlaps(made.pictures, task.silhouettes),
            right=obeyed(net, made.pictures, task.prompts),
        )
        for way, made in drawn.items()
    }
    rows = [_row(way, drawn[way], scored, times) for way in ways]
    _picture(folder / PICTURE, task, rows, drawn, scored)
    return ControlNetReuse(
        model=model,
        controlnet=controlnet,
        engine=pipes.unet.engine,
        scheduler=pipes.scheduler,
        steps=task.steps,
        guidance=task.guidance,
        cut=CUT,
        images=len(task.prompts),
        batch=task.batch,
        rounds=rounds,
        drawn_overlap=float(silhouettes.overlaps(task.drawn, task.silhouettes).mean()),
        rows=rows,
        picture=PICTURE,
    )


def _times(
    pipes: Pipelines, task: SceneTask, ways: Sequence[ControlNetSetting], rounds: int, on_step: Progress
) -> Mapping[ControlNetSetting, _Times]:
    """The first batch of scenes in every way, one after the other in each round; a first round only warms up."""
    places = range(min(task.batch, len(task.prompts)))
    times = {way: _Times([], []) for way in ways}
    for turn in range(rounds + 1 if rounds else 0):
        for way in ways:
            watch = ControlNetMeter()
            began = time.perf_counter()
            pipes.draw(task, way, places, on_step, watch)
            seconds = time.perf_counter() - began
            if turn:
                times[way].seconds.append(seconds / len(places))
                times[way].controlnet.append(watch.seconds / len(places))
    return times


def _row(
    way: ControlNetSetting,
    made: Drawn,
    scored: Mapping[ControlNetSetting, _Scored],
    times: Mapping[ControlNetSetting, _Times],
) -> ControlNetRow:
    own, base, taken = scored[way], times[UNCACHED].seconds, times[way]
    cached = way.interval is not None
    ratios = [one / other for one, other in zip(taken.seconds, base, strict=True)]
    return ControlNetRow(
        name=way.name,
        control=way.control,
        interval=way.interval,
        schedule=None if way.schedule is None else str(way.schedule),
        reused=way.reused,
        full_calls=made.timeline.count("#"),
        shallow_calls=made.timeline.count("."),
        passes=made.passes,
        overlap=mean_of(own.overlap),
        accuracy=mean_of(own.right),
        psnr=mean_of(own.psnr) if cached else None,
        psnr_worst=float(own.psnr.min()) if cached else None,
        change=_change(own, scored[replace(way, reused=False)]) if way.reused else None,
        seconds=taken.seconds,
        controlnet_seconds=taken.controlnet,
        to_uncached=statistics.median(ratios) if ratios else None,
    )


def _change(own: _Scored, twin: _Scored) -> ReuseChange:
    return ReuseChange(
        psnr=mean_of(own.psnr - twin.psnr),
        overlap=mean_of(own.overlap - twin.overlap),
        accuracy=mean_of(own.right - twin.right),
    )


def _picture(
    path: Path,
    task: SceneTask,
    rows: Sequence[ControlNetRow],
    drawn: Mapping[ControlNetSetting, Drawn],
    scored: Mapping[ControlNetSetting, _Scored],
) -> None:
    """Silhouette and pictures side by side, a row for each scene."""
    lines = []
    for place in range(min(SHOWN, len(task.prompts))):
        tiles = [Tile(_image(task.silhouettes[place]), "silhouette", "")]
        for row, (way, made) in zip(rows, drawn.items(), strict=True):
            own = scored[way]
            near = "" if row.psnr is None else f"{own.psnr[place]:.1f} dB, "
            passes = f", {row.passes} passes" if row.control else ""
            note = f"{near}overlap {own.overlap[place]:.2f}{passes}"
            tiles.append(Tile(_image(made.pictures[place]), way.name, note, _ran(way, made.timeline)))
        lines.append((task.prompts[place], tiles))
    try:
        sheet(lines).save(path, optimize=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another directory with -o") from error


def _image(picture: metrics.Pictures) -> Image:
    from PIL import Image

    return Image.fromarray(picture)


def _ran(way: ControlNetSetting, timeline: str) -> Run:
    full = tuple(call == "#" for call in timeline)
    cuts = tuple(None if call else CUT for call in full)
    return Run(full, (), way.schedule, None if way.schedule is None else CUT, len(full), cuts)
