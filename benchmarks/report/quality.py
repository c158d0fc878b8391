"""Report section on quality: plots of quality against speed, sample images and figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.images.picture import difference
from ..schema.quality import Quality, QualityRow
from ..stats import Estimate
from .blocks import Block, Cell, Column, Group, Note, Pair, Picture, Plot, Section, Table
from .findings import reference, speed
from .formatting import digits, fixed, interval, model, percent, times
from .plots import ScatterPoint, scatter

if TYPE_CHECKING:
    from PIL.Image import Image

GAIN = 4.0
"""Factor by which differences are brightened."""

_LARGEST = 384  # pixels; larger images are scaled down to keep the page small


@dataclass(frozen=True)
class Metric:
    """A figure that is plotted against speed."""

    field: str
    label: str
    more_is_better: bool = True
    scale: float = 1.0

    def of(self, row: QualityRow) -> Estimate | None:
        """Return the figure in the plot's unit."""
        value: Estimate | None = getattr(row, self.field)
        if value is None:
            return None
        return Estimate(mean=self.scale * value.mean, low=self.scale * value.low, high=self.scale * value.high)


METRICS = (
    Metric("psnr", "PSNR to the uncached image, dB"),
    Metric("accuracy", "prompts obeyed, %", scale=100),
    Metric("distance", "perceptual distance to the uncached image", more_is_better=False),
    Metric("ssim", "SSIM to the uncached image"),
)


def section(quality: Quality, folder: Path) -> Section:
    """Return the section of ``offcut bench quality``; ``folder`` holds the sample images."""
    main, *others = ([*_plots(quality.rows, metric)] for metric in METRICS)
    blocks: list[Block] = [*main]
    if any(others):
        blocks.append(Group("Other metrics against speed", [plot for plots in others for plot in plots], folded=True))
    blocks += [*_samples(quality, folder), _figures(quality.rows), *_calls(quality.rows)]
    task = (
        f"{model(quality.model)} on {quality.engine}, guidance {quality.guidance:g}, {quality.images} images a row, "
        "each compared with the uncached image of the same prompt and seed. Speed is counted in full UNet calls: a "
        f"shallow call counts as {percent(quality.shallow_over_full, 1)} of a full one, as measured on Stable "
        f"Diffusion 1.5; on this model it takes {percent(quality.shallow_over_full_here, 1)}. Intervals are 95 %."
    )
    return Section("Quality", "Quality", task, blocks)


def _plots(rows: Sequence[QualityRow], metric: Metric) -> list[Plot]:
    """Return a plot for each uncached row with which other rows are compared."""
    plots = []
    for against in (row for row in rows if row.kind == "uncached"):
        compared = [row for row in rows if reference(rows, row) is against]
        points = [
            ScatterPoint(short(row), faster, value, row.kind)
            for row in compared
            if (value := metric.of(row)) is not None and (faster := speed(rows, row)) is not None
        ]
        if points:
            title = f"{metric.label} against speed, {against.sampler}, {against.steps} steps"
            plots.append(Plot(title, partial(scatter, points, metric.label, more_is_better=metric.more_is_better)))
    return plots


def short(row: QualityRow) -> str:
    """Return a short name of a row for a plot."""
    if row.kind == "uncached":
        return "uncached"
    if row.kind != "cached":
        return f"{row.steps} steps"
    kind = (row.schedule or "cached").partition(":")[0]
    name = f"N={row.interval}" if kind == "uniform" else f"{kind} {row.interval or ''}".strip()
    if row.damping is not None:
        name += f" forecast {row.damping:g}"
    return name if row.cut in (None, "deepcache:0") else f"{name} {row.cut}"


def _samples(quality: Quality, folder: Path) -> list[Block]:
    """Return a table for each uncached row, with a row for each prompt and a column for each setting."""
    names = [name for row in quality.rows for name in row.samples]
    absent = [name for name in names if not (folder / name).is_file()]
    if not names:
        return []
    if len(absent) == len(names):
        return [Note(f"{len(names)} sample images are omitted, because their files are not with this result.")]
    tables = []
    for against in (row for row in quality.rows if row.kind == "uncached" and row.samples):
        others = [row for row in quality.rows if row is not against and reference(quality.rows, row) is against]
        tables.append(_sample_table(quality, against, [row for row in others if row.samples], folder))
    note = f"Each image and its difference to the uncached image of the same seed, brightened {GAIN:g} times."
    blocks: list[Block] = [Note(note), tables[0]]
    if tables[1:]:
        blocks.append(Group("Other samplers", tables[1:], folded=True))
    return [Group("Images", blocks)]


def _sample_table(quality: Quality, against: QualityRow, others: Sequence[QualityRow], folder: Path) -> Table:
    def prompt(place: int) -> str:
        return quality.sample_prompts[place] if place < len(quality.sample_prompts) else f"sample {place + 1}"

    def uncached(place: int) -> Picture:
        return _picture(_read(folder, against.samples[place]), f"{prompt(place)}, uncached")

    def cached(row: QualityRow, place: int) -> Cell:
        uncached_image = _read(folder, against.samples[place])
        image = _read(folder, row.samples[place]) if place < len(row.samples) else None
        text = f"{prompt(place)}, {row.name}"
        differences = _differences(uncached_image, image)
        return _picture(image, text), _picture(differences, f"{text}: difference to the uncached image")

    columns = [Column("prompt", prompt), Column("uncached", uncached, numeric=False)]
    for row in others:
        psnr = f", {row.psnr.mean:.1f} dB" if row.psnr else ""
        heading = f"{short(row)}, {times(speed(quality.rows, row))}{psnr}"
        columns.append(Column(heading, partial(cached, row), row.name, numeric=False))
    return Table(f"Samples of {against.name}", columns, range(len(against.samples)), terminal=False)


def _read(folder: Path, name: str) -> Image | None:
    """Return a sample image; None if the file is missing, is not a PNG, or lies outside the folder."""
    from PIL import Image, UnidentifiedImageError

    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    picture.thumbnail((_LARGEST, _LARGEST))
    return picture


def _differences(first: Image | None, second: Image | None) -> Image | None:
    """Return the brightened difference between two images; None if one is missing or their sizes differ."""
    if first is None or second is None or first.size != second.size:
        return None
    return difference(first, second, GAIN)


def _picture(image: Image | None, text: str) -> Picture:
    """Return an image for a table's cell; ``text`` describes it."""
    if image is None:
        return Picture(text)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    return Picture(text, address, image.width, image.height)


def _figures(rows: Sequence[QualityRow]) -> Table:
    def calls(row: QualityRow) -> str:
        skipped = f", {row.skipped_calls} skipped" if row.skipped_calls else ""
        return f"{row.full_calls} + {row.shallow_calls}{skipped}"

    def external(name: str, row: QualityRow) -> str:
        return digits(row.external.get(name))

    columns = [
        Column("setting", lambda row: Pair(row.name, row.kind) if row.kind == "fewer steps" else row.name),
        Column("full + shallow", calls, "UNet calls of an image"),
        Column("speed", lambda row: times(speed(rows, row)), "cost of the uncached row over this row's"),
        Column("PSNR, dB", lambda row: interval(row.psnr)),
        Column("worst", lambda row: fixed(row.psnr_worst, 1), "of all images, in dB", terminal=False),
        Column("SSIM", lambda row: interval(row.ssim, 4), terminal=False),
        Column("distance", lambda row: interval(row.distance, 4), "perceptual, of judge features", terminal=False),
        Column("right, %", lambda row: interval(row.accuracy, 0, 100), "prompts obeyed, by the judge network"),
        Column("change, points", lambda row: interval(row.accuracy_change, 1, 100, sign=True),
               "of the prompts obeyed, to the uncached run, paired by prompt and seed"),
        Column("by rules, %", lambda row: interval(row.accuracy_by_rules, 0, 100), "by the rule-based judge",
               terminal=False),
        Column("Fréchet", lambda row: digits(row.frechet), "distance to rendered scenes of the same captions"),
        *(Column(name, partial(external, name), "by a network of the user")
          for name in sorted({name for row in rows for name in row.external})),
    ]  # fmt: skip
    return Table("Means with 95 % intervals", columns, rows, ours=lambda row: row.kind == "cached")


def _calls(rows: Sequence[QualityRow]) -> list[Block]:
    """Return a table with the calls of each schedule."""
    schedules = {
        row.timeline: row.schedule or "uncached" for row in reversed(rows) if row.timeline and row.kind != "fewer steps"
    }
    if not schedules:
        return []
    columns = [
        Column("schedule", lambda calls: schedules[calls]),
        Column("full", lambda calls: f"{calls.count('#')} of {len(calls)}"),
        Column("calls", lambda calls: calls, numeric=False),
    ]
    caption = "UNet calls in their order: # full, . shallow, _ without an engine"
    return [Table(caption, columns, list(schedules)[::-1], terminal=False)]
