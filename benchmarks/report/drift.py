"""The page's section on drift: how far features move, what the schedule misses of it, and where pictures change."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...runtime.generation.schedule import SKIP
from ..drift.record import Call, Drift, Walk
from . import samples, words
from .heatmap import SHADES, heatmap, steps
from .markup import Markup, join, tag
from .tables import Column, table


def section(drift: Drift, folder: Path, key: str) -> Markup:
    """``key`` makes its id unique on the page; ``folder`` has the images."""
    said = f"schedule {drift.schedule}" + ("" if drift.forecast is None else f", features predicted: {drift.forecast}")
    task = (
        f"{words.model(drift.model)} on {drift.engine} {drift.precision}, {drift.steps} steps of {drift.scheduler}, "
        f"guidance {drift.guidance:g}, {drift.images} image{'s' if drift.images != 1 else ''}; {said}. Cached are "
        f"{words.listed(drift.features)}."
    )
    return tag(
        "section",
        tag("h2", "Drift of the cached features"),
        tag("p", task, class_="lead"),
        _matrix(drift),
        _errors(drift),
        _pictures(drift, folder),
        _smoothness(drift),
        id=key,
    )


def _matrix(drift: Drift) -> Markup:
    furthest = max(max(row) for row in drift.distances)
    most = min(furthest, 1.0)
    above = " and above" if furthest > most else ""
    segments = list(_segments(drift.calls))
    title = (
        f"What the features of each call miss of those of later calls, none to {words.percent(furthest)}; "
        f"{len(segments)} full calls"
    )
    shades = [tag("i", class_=f"h{shade}") for shade in range(SHADES)]
    keys = [
        tag(
            "li",
            tag("span", shades, class_="shades"),
            f"0 to {words.percent(most)} of the features' size{above}",
        ),
        tag("li", tag("i", class_="full"), "full call"),
        tag("li", tag("i", class_="used"), "shallow calls that use its features"),
    ]
    varied = any(0 < call.fulls < 1 for call in drift.calls)
    note = (
        "Each row: the features of one call, and how much of a later call's they would miss if they were used there as "
        "they are (root mean square over uncached images)."
    )
    if varied:
        note += " The images have full calls at different places: drawn are those that most of them share."
    plot = heatmap(drift.distances, segments, most, title)
    return join(
        tag("h3", "How far features move"),
        tag("p", note, class_="note"),
        tag("figure", tag("ul", keys, class_="legend"), plot, class_="drift"),
    )


def _segments(calls: Sequence[Call]) -> Iterator[tuple[int, int]]:
    """Of each full call of most images, and where the next is."""
    full = [number for number, call in enumerate(calls) if call.fulls >= 0.5]
    yield from zip(full, [*full[1:], len(calls)], strict=True)


def _errors(drift: Drift) -> Markup:
    shallow = [call.cut not in (None, SKIP) for call in drift.calls]
    reused = [call.reused if is_shallow else None for call, is_shallow in zip(drift.calls, shallow, strict=True)]
    read = [call.read if is_shallow else None for call, is_shallow in zip(drift.calls, shallow, strict=True)]
    most = max((value for value in (*reused, *read) if value is not None), default=0.0)
    lines = [("full", reused)] + ([("shallow", read)] if drift.forecast is not None else [])
    keys = [tag("li", tag("i", class_="full"), "features of the last full call as they are")]
    told = f"What cached images' shallow calls miss: {_mean(reused)} of the features' size on average if they reuse"
    if drift.forecast is not None:
        keys.append(tag("li", tag("i", class_="shallow"), f"after prediction ({drift.forecast})"))
        told += f", {_mean(read)} as predicted"
    plot = steps(lines, most, told, "missed, % of the features' size")
    return join(
        tag("h3", "What each call misses"),
        tag("p", f"{told}. The truth is the full graph's on the same inputs.", class_="note"),
        tag("figure", tag("ul", keys, class_="legend"), tag("div", plot, class_="scroll", role="region",
            aria_label="What each call misses", tabindex=0), class_="drift"),
    )  # fmt: skip


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return words.percent(statistics.fmean(there), 1) if there else words.NONE


def _pictures(drift: Drift, folder: Path) -> Markup:
    columns = [Column("Prompt", numeric=False)] + [
        Column(name, numeric=False) for name in ("uncached", "cached", "where it changed")
    ]
    rows = [
        [
            join(sample.prompt, tag("br"), tag("small", f"seed {sample.seed}, {sample.psnr:.1f} dB")),
            *(
                samples.shown(samples.opened(folder, name), f"{kind}: {sample.prompt}")
                for kind, name in (("uncached", sample.uncached), ("cached", sample.cached), ("map", sample.changed))
            ),
        ]
        for sample in drift.samples
    ]
    if not rows:
        return Markup()
    rows.append(
        [
            join(f"mean of {drift.images} images"),
            Markup(),
            Markup(),
            samples.shown(samples.opened(folder, drift.mean_changed), "mean map"),
        ]
    )
    note = (
        f"Maps of the absolute difference, mean over the colours: dark is none, the lightest is "
        f"{words.percent(drift.samples[0].most, 1)} of an image's range for the images and "
        f"{words.percent(drift.mean_most, 1)} for their mean."
    )
    return join(
        tag("h3", "Where pictures change"),
        tag("p", note, class_="note"),
        tag("div", table("Images and where caching changed them", columns, rows), class_="samples"),
    )


def _smoothness(drift: Drift) -> Markup | None:
    if not drift.uncached_walks:
        return None
    columns = [
        Column("Prompt", numeric=False),
        Column("step, uncached", "mean distance of neighbouring images"),
        Column("cached"),
        Column("ISTD, uncached", "standard deviation of the distances"),
        Column("cached"),
    ]
    pairs = list(zip(drift.uncached_walks, drift.cached_walks, strict=True))
    rows = [[one.prompt, *_of([one], [other])] for one, other in pairs]
    if len(rows) > 1:
        rows.append(["mean", *_of(drift.uncached_walks, drift.cached_walks)])
    points = len(drift.uncached_walks[0].steps) + 1
    note = (
        f"{points} images along an interpolation of the start noise, all else fixed. The interpolation standard "
        "deviation (ISTD, of Smooth Diffusion) is that of the distances from one image to the next, in parts of an "
        "image's range: small if the image changes evenly, large if it jumps."
    )
    return join(
        tag("h3", "Smoothness over the start noise"),
        tag("p", note, class_="note"),
        table("Distances along interpolations", columns, rows),
    )


def _of(uncached: Sequence[Walk], cached: Sequence[Walk]) -> list[str]:
    step = [statistics.fmean(statistics.fmean(each.steps) for each in walks) for walks in (uncached, cached)]
    spread = [statistics.fmean(each.istd for each in walks) for walks in (uncached, cached)]
    return [f"{value:.4f}" for value in (*step, *spread)]
