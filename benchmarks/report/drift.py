"""Report section on drift: how far features move, what a schedule misses of that, and where images change."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from ...runtime.generation.schedule import SKIP
from ..schema.drift import Drift, Sample
from . import samples
from .blocks import Block, Column, Group, Note, Pair, Picture, Plot, Section, Table
from .formatting import count, fixed, listed, model, percent
from .plots import heatmap, lines


def section(drift: Drift, folder: Path) -> Section:
    """Return the section of ``offcut bench drift``; ``folder`` holds the images."""
    schedule = f"schedule {drift.schedule}" + (f", features predicted: {drift.forecast}" if drift.forecast else "")
    task = (
        f"{model(drift.model)} on {drift.engine} {drift.precision}, {drift.steps} steps of {drift.scheduler}, "
        f"guidance {drift.guidance:g}, {count(drift.images, 'image')}; {schedule}. Cached features: "
        f"{listed(drift.features)}."
    )
    blocks = [_matrix(drift), _errors(drift), *_images(drift, folder)]
    return Section("Drift", "Drift of the cached features", task, blocks)


def _matrix(drift: Drift) -> Block:
    furthest = max(max(row) for row in drift.distances)
    most = min(furthest, 1.0)
    above = " and above" if furthest > most else ""
    note = (
        "Each row: the features of one call, and what they miss of those of each later call if reused there (root mean "
        f"square over uncached images), from none to {percent(most)} of the features' size{above}. Filled squares are "
        "full calls of the schedule; frames hold the shallow calls that use their features."
    )
    if any(0 < call.fulls < 1 for call in drift.calls):
        note += " The images have full calls at different places: those that most images share are drawn."
    full = [number for number, call in enumerate(drift.calls) if call.fulls >= 0.5]
    segments = list(zip(full, [*full[1:], len(drift.calls)], strict=True))
    plot = Plot("Distance of each call's features from those of later calls",
                lambda: heatmap(drift.distances, segments, most))  # fmt: skip
    return Group("How far features move", [Note(note), plot])


def _errors(drift: Drift) -> Block:
    shallow = [call if call.cut not in (None, SKIP) else None for call in drift.calls]
    errors = {"reused": [None if call is None else call.reused for call in shallow]}
    text = f"Shallow calls of cached images miss {_mean(errors['reused'])} of the features' size on average if reused"
    if drift.forecast is not None:
        errors["predicted"] = [None if call is None else call.read for call in shallow]
        text += f", {_mean(errors['predicted'])} as predicted"
    colours = {"reused": "full", "predicted": "shallow"}
    series = {
        name: (colours[name], [(call, None if value is None else 100 * value) for call, value in enumerate(values)])
        for name, values in errors.items()
    }
    plot = Plot("Error of each shallow call", lambda: lines(series, "call", "% of the features' size"))
    table = Table(
        "Errors of each call, relative to the features' size",
        [
            Column("call", lambda number: str(number)),
            Column("cut", lambda number: "full" if drift.calls[number].fulls == 1 else drift.calls[number].cut or ""),
            Column("drift", lambda number: fixed(drift.distances[number - 1][0] if number else None, 3),
                   "from the call before"),
            Column("reused", lambda number: fixed(errors["reused"][number], 3), "features of the last full call"),
            Column("predicted", lambda number: fixed(errors.get("predicted", errors["reused"])[number], 3)),
        ],
        range(len(drift.calls)),
    )  # fmt: skip
    note = Note(f"{text}. The truth is the full graph's output on the same inputs.")
    return Group("What each call misses", [note, plot, Group("Table", [table], folded=True)])


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return percent(statistics.fmean(known), 1) if known else "nothing"


def _images(drift: Drift, folder: Path) -> list[Block]:
    if not drift.samples:
        return []
    files = [name for sample in drift.samples for name in (sample.uncached, sample.cached, sample.changed)]
    if not any((folder / name).is_file() for name in files):
        return [Note(f"Left out: {len(files) + 1} images, whose files are missing.")]

    def shown(field: str, text: str) -> Callable[[Sample], Picture]:
        return lambda sample: samples.picture(samples.read(folder, getattr(sample, field)), f"{text}: {sample.prompt}")

    columns = [
        Column("prompt", lambda sample: Pair(sample.prompt, f"seed {sample.seed}, {sample.psnr:.1f} dB")),
        Column("uncached", shown("uncached", "uncached"), numeric=False),
        Column("cached", shown("cached", "cached"), numeric=False),
        Column("where it changed", shown("changed", "map"), numeric=False),
    ]
    note = (
        "Maps of the absolute difference, mean over the colours: dark is none, the lightest is "
        f"{percent(drift.samples[0].most, 1)} of an image's range; for the mean of all images "
        f"{percent(drift.mean_most, 1)}."
    )
    mean = Column("mean map", lambda name: samples.picture(samples.read(folder, name), "mean map"), numeric=False)
    label = Column("", lambda name: f"mean of {drift.images} images")
    tables = [
        Table("Samples", columns, drift.samples, terminal=False),
        Table("All images", [label, mean], [drift.mean_changed], terminal=False),
    ]
    return [Group("Where images change", [Note(note), *tables])]
