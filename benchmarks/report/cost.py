"""The page's quality section: quality against speed with the Pareto front, samples, timelines, table, claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..quality.record import Claim, Quality, QualityRow
from ..stats import Estimate
from . import plots, samples, words
from .findings import reference, speed
from .markup import Markup, join, tag
from .tables import Column, table


@dataclass(frozen=True)
class Metric:
    """A figure of a row: the field's name, its heading, its unit, the places that it is written to."""

    field: str
    heading: str
    unit: str
    more_is_better: bool = True
    places: int = 3
    scale: float = 1.0

    def of(self, row: QualityRow) -> Estimate | None:
        value: Estimate | None = getattr(row, self.field)
        return value


METRICS = (
    Metric("psnr", "PSNR to the uncached image", "dB, higher is better", places=1),
    Metric("accuracy", "Prompts that came out right", "%, higher is better", places=0, scale=100),
    Metric("distance", "Perceptual distance to the uncached image", "lower is better", more_is_better=False),
    Metric("ssim", "SSIM to the uncached image", "higher is better"),
)


def section(quality: Quality, folder: Path, key: str) -> Markup:
    """``folder`` holds the sample images; ``key`` makes its ids unique on the page."""
    drawn = [plot for metric in METRICS if (plot := _plots(quality.rows, metric)) is not None]
    return tag(
        "section",
        tag("h2", "Quality"),
        tag("p", _task(quality), class_="lead"),
        drawn[0] if drawn else None,
        tag("details", tag("summary", "Other metrics against speed"), drawn[1:]) if len(drawn) > 1 else None,
        _grid(quality, folder),
        _timelines(quality.rows),
        _table(quality.rows),
        _claims(quality.claims),
        id=key,
    )


def _task(quality: Quality) -> str:
    return (
        f"{words.model(quality.model)} on {quality.engine}, guidance {quality.guidance:g}, {quality.images} images a "
        "row, each beside the uncached image of the same prompt and seed. Speed is counted in full UNet calls: a "
        f"shallow call counts as {words.percent(quality.shallow_over_full, 1)} of a full one, as measured on Stable "
        f"Diffusion 1.5; on this model it takes {words.percent(quality.shallow_over_full_here, 1)}. Intervals are 95 %."
    )


def _plots(rows: Sequence[QualityRow], metric: Metric) -> Markup | None:
    """One panel for each uncached row that others are measured against."""
    panels = []
    for against in (row for row in rows if row.kind == "uncached"):
        points = [_point(rows, row, metric) for row in rows if reference(rows, row) is against]
        known = [point for point in points if point is not None]
        if known:
            title = f"{metric.heading}, {against.sampler}, {against.steps} steps"
            plot = plots.scatter(known, title, metric.unit, more_is_better=metric.more_is_better)
            panels.append(tag("div", tag("h4", f"{against.sampler}, {against.steps} steps"), plot, class_="panel"))
    if not panels:
        return None
    caption = tag("figcaption", f"{metric.heading} against speed. Filled: nothing here is both faster and better.")
    entries = (("cached", "cached, N = interval"), ("fewer-steps", "fewer steps, uncached"), ("front", "Pareto front"))
    legend = tag("ul", [tag("li", tag("i", class_=kind), text) for kind, text in entries], class_="legend")
    return tag("figure", caption, legend, tag("div", panels, class_="panels"), class_="chart")


def _point(rows: Sequence[QualityRow], row: QualityRow, metric: Metric) -> plots.Point | None:
    value, faster = metric.of(row), speed(rows, row)
    if value is None or faster is None:
        return None
    mean, low, high = (metric.scale * each for each in (value.mean, value.low, value.high))
    return plots.Point(short(row), row.name, faster, mean, low, high, row.kind)


def short(row: QualityRow) -> str:
    """A few characters for a plot."""
    if row.kind == "uncached":
        return "uncached"
    if row.kind == "cached":
        kind = (row.schedule or "cached").partition(":")[0]
        interval = f"N={row.interval}" if kind == "uniform" else f"{kind} {row.interval or ''}".strip()
        if row.damping is not None:
            interval += f" forecast {row.damping:g}"
        return interval if row.cut in (None, "deepcache:0") else f"{interval} {row.cut}"
    return f"{row.steps} steps"


def _grid(quality: Quality, folder: Path) -> Markup | None:
    """Per uncached row with samples: prompts down, settings across, each cached image above its difference."""
    blocks = []
    for against in (row for row in quality.rows if row.kind == "uncached" and row.samples):
        others = [
            row
            for row in quality.rows
            if row is not against and row.samples and reference(quality.rows, row) is against
        ]
        heading = tag("h4", f"{against.sampler}, {against.steps} steps")
        blocks.append(join(heading, _samples(quality, against, others, folder)))
    if not blocks:
        return None
    note = (
        f"Above, the image; below, its difference to the uncached image of the same prompt and seed, {samples.GAIN:g} "
        "times as bright as it is."
    )
    first, rest = blocks[0], blocks[1:]
    return join(
        tag("h3", "Images"),
        tag("p", note, class_="note"),
        first,
        tag("details", tag("summary", "Other samplers"), rest) if rest else None,
    )


def _samples(quality: Quality, against: QualityRow, others: Sequence[QualityRow], folder: Path) -> Markup:
    columns = [Column("prompt", numeric=False), Column("uncached", numeric=False)]
    columns += [Column(_column(quality.rows, row), row.name, numeric=False) for row in others]
    lines = []
    for place, name in enumerate(against.samples):
        prompt = quality.sample_prompts[place] if place < len(quality.sample_prompts) else f"sample {place + 1}"
        truth = samples.opened(folder, name)
        cells = [Markup(samples.shown(truth, f"{prompt}, uncached"))]
        for row in others:
            image = samples.opened(folder, row.samples[place]) if place < len(row.samples) else None
            pair = (
                samples.shown(image, f"{prompt}, {row.name}"),
                samples.shown(samples.apart(truth, image), f"{prompt}, {row.name}: difference to the uncached image"),
            )
            cells.append(tag("div", pair, class_="pair"))
        lines.append([prompt, *cells])
    return tag("div", table(f"Samples of {against.name}", columns, lines), class_="samples")


def _column(rows: Sequence[QualityRow], row: QualityRow) -> str:
    faster = speed(rows, row)
    psnr = f", {row.psnr.mean:.1f} dB" if row.psnr else ""
    return f"{short(row)}{f', {words.times(faster)}' if faster else ''}{psnr}"


def _timelines(rows: Sequence[QualityRow]) -> Markup | None:
    """Each timeline once, whichever samplers follow it."""
    followers: dict[str, list[QualityRow]] = {}
    for row in rows:
        if row.timeline and row.kind != "fewer steps":
            followers.setdefault(row.timeline, []).append(row)
    if not followers:
        return None
    lines = []
    for calls, those in followers.items():
        label = those[0].schedule or "uncached"
        count = f"{calls.count('#')} of {len(calls)} full"
        title = f"{label}: {count}"
        followed = tag("span", label, class_="label", title=words.listed([row.name for row in those]))
        lines.append(tag("li", followed, plots.timeline(calls, title), tag("span", count, class_="value")))
    legend = [("full", "full UNet call"), ("shallow", "shallow call, deep features reused")]
    if any("_" in calls for calls in followers):
        legend.append(("skipped", "no engine, answer foretold"))
    return join(
        tag("h3", "Steps"),
        tag(
            "figure",
            tag("figcaption", "Which UNet calls of an image are full, in their order."),
            tag("ul", [tag("li", tag("i", class_=kind), text) for kind, text in legend], class_="legend"),
            tag("ol", lines, class_="bars"),
            class_="chart",
        ),
    )


def _table(rows: Sequence[QualityRow]) -> Markup:
    external = sorted({name for row in rows for name in row.external})
    columns = [
        Column("setting"),
        Column("full + shallow", "UNet calls of an image"),
        Column("speed", "full calls of the uncached row over this row's, with shallow calls at the reference ratio"),
        Column("PSNR, dB"),
        Column("worst", "of all images, in dB"),
        Column("SSIM"),
        Column("distance", "perceptual, by the judge network's features"),
        Column("right, %", "share of the prompts that came out right"),
        Column("change, points", "against the uncached run, paired by prompt and seed"),
        Column("by rules, %", "the same share by the rule-based judge"),
        Column("Fréchet", "distance to drawn scenes of the same captions"),
        *(Column(name, "by a network that was given to the run") for name in external),
    ]
    lines = [
        [
            join(row.name, " ", tag("span", row.kind, class_="badge") if row.kind == "fewer steps" else None),
            f"{row.full_calls} + {row.shallow_calls}" + (f", {row.skipped_calls} skipped" if row.skipped_calls else ""),
            words.times(speed(rows, row)),
            words.stacked(row.psnr),
            words.NONE if row.psnr_worst is None else f"{row.psnr_worst:.1f}",
            words.stacked(row.ssim, 4),
            words.stacked(row.distance, 4),
            words.stacked(row.accuracy, 0, 100),
            words.stacked(row.accuracy_change, 1, 100, sign=True),
            words.stacked(row.accuracy_by_rules, 0, 100),
            words.NONE if row.frechet is None else words.digits(row.frechet),
            *(words.digits(row.external[name]) if name in row.external else words.NONE for name in external),
        ]
        for row in rows
    ]
    marks = ["ours" if row.kind == "cached" else None for row in rows]
    return join(tag("h3", "Figures"), table("Means with 95 % intervals", columns, lines, marks))


def _claims(claims: Sequence[Claim]) -> Markup | None:
    if not claims:
        return None
    said = {True: ("agrees", "good"), False: ("disagrees", "bad"), None: ("cannot tell", "open")}
    items = []
    for claim in claims:
        verdict, kind = said[claim.agrees]
        items.append(
            tag("li", tag("span", verdict, class_=f"verdict {kind}"), " ", tag("strong", claim.text),
                tag("p", claim.evidence))
        )  # fmt: skip
    return join(tag("h3", "Claims of the literature, put to this run"), tag("ul", items, class_="claims"))
