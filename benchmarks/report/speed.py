"""The page's latency section: bars of the loops with the ideal marked, the table of ratios, what was not run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..latency.record import Contestant, Latency
from . import plots, words
from .findings import OURS, Rivals, gain, measured, uncached_twin
from .markup import Markup, join, tag
from .tables import Cell, Column, table


def section(latency: Latency, key: str) -> Markup:
    """``key`` makes its id unique on the page."""
    rows = sorted(measured(latency.contestants), key=lambda row: row.loop or 0.0)
    return tag(
        "section",
        tag("h2", "Latency"),
        tag("p", _task(latency), class_="lead"),
        _bars(rows) if rows else tag("p", "Nothing could be measured."),
        _ratios(latency, rows) if rows else None,
        _calls(latency, rows) if rows else None,
        _not_run([row for row in latency.contestants if not row.loops]),
        _settings(latency.contestants),
        id=key,
    )


def _task(latency: Latency) -> str:
    threads = f", {latency.threads} thread{'s' if latency.threads != 1 else ''}" if latency.threads else ""
    made = "image" if latency.frames is None else f"video of {latency.frames} frames"
    images = f"1 {made}" if latency.images_per_call == 1 else f"{latency.images_per_call} {made.replace(' ', 's ', 1)}"
    rises = latency.frames is not None and latency.guidance > 1
    guidance = f"{'rising from 1 to ' if rises else ''}{latency.guidance:g}"
    return (
        f"{words.model(latency.model)}: {latency.steps} steps of {latency.scheduler}, {latency.width} by "
        f"{latency.height} pixels, {images} a call, guidance {guidance}{threads}. {latency.rounds} round"
        f"{'s' if latency.rounds != 1 else ''}, each running every contestant once, in turn."
    )


def _bars(rows: Sequence[Contestant]) -> Markup:
    parts = {row.name: parts_of(row) for row in rows}
    end = 1.02 * max(max(part.most, part.total, part.ideal or 0) for part in parts.values())
    ticks = plots.nice_ticks(0, end, 5)
    groups = (
        ("offcut", [row for row in rows if row.family == OURS]),
        ("Peers", [row for row in rows if row.family != OURS]),
    )
    drawn = []
    for heading, members in groups:
        if members:
            drawn.append(tag("h3", heading))
            drawn.append(tag("ol", [_bar_row(row, parts[row.name], end, ticks) for row in members], class_="bars"))
    # Only the ends of the axis and its middle are written: the bars carry their figures.
    marks = [
        tag("span", words.digits(tick, 2) if tick else "0", style=f"left:{100 * tick / end:.2f}%") for tick in ticks
    ]
    axis = tag("div", tag("div", marks, class_="scale"), class_="axis", aria_hidden="true")
    caption = tag(
        "figcaption", "Seconds of one denoising loop: median, and the range over the rounds. Shorter is better."
    )
    return tag("figure", caption, _legend(rows), drawn, axis, class_="chart")


def parts_of(row: Contestant) -> plots.Bar:
    """What a loop is made of, by the medians of the calls inside it."""
    full = row.full_calls * statistics.median(row.full) if row.full else None
    shallow = row.shallow_calls * statistics.median(row.shallow) if row.shallow else None
    if row.ideal(row.full, row.shallow) is None:
        full = shallow = None
    return plots.Bar(statistics.median(row.loops), min(row.loops), max(row.loops), full, shallow)


def _bar_row(row: Contestant, parts: plots.Bar, end: float, ticks: Sequence[float]) -> Markup:
    said = f"{row.name}: {words.seconds(parts.total)}, {words.seconds(parts.least)} to {words.seconds(parts.most)}"
    if parts.ideal is not None:
        said += f"; ideal {words.seconds(parts.ideal)}"
    badge = tag("span", "caching", class_="badge") if row.caching else None
    label = tag("span", row.name, " ", badge, class_="label")
    value = tag("span", words.seconds(parts.total), class_="value")
    return tag("li", label, plots.bar(parts, end, ticks, said), value, title=row.caching)


def _legend(rows: Sequence[Contestant]) -> Markup:
    entries = [("full", "full UNet calls")]
    if any(row.shallow for row in rows):
        entries.append(("shallow", "shallow calls"))
    entries.append(("rest", "everything else in the loop"))
    if any(row.ideal(row.full, row.shallow) is None for row in rows):
        entries.append(("whole", "not taken apart"))
    entries += [("ideal", "ideal: the calls alone"), ("range", "fastest to slowest round")]
    return tag("ul", [tag("li", tag("i", class_=kind), text) for kind, text in entries], class_="legend")


def _ratios(latency: Latency, rows: Sequence[Contestant]) -> Markup:
    base = Rivals.of(latency).base
    columns = [
        Column("contestant"),
        Column("loop p50"),
        Column("p90"),
        Column("p99"),
        Column("vs base", f"times as fast as {base.name if base else 'nothing'}: median of the ratios within a round"),
        Column("vs uncached", "times as fast as the same engine and precision without caching"),
        Column("vs best peer", "times as fast as the fastest peer of the same precision that does not cache"),
        Column("vs best caching peer", "times as fast as the fastest peer of the same precision that caches"),
        Column("wall / ideal", "the loop over the sum of its engine calls, timed inside it; 1 is the limit"),
        Column("alone", "the same with the calls timed back to back outside the loop"),
        Column("difference", "of its final latents from the reference's: norm of the difference over the norm"),
        Column("memory", "largest resident memory of its process"),
        Column("load", "to open it, before the first call"),
        Column("size", "of what it reads from disk"),
    ]

    def cells(row: Contestant) -> list[Cell]:
        ranks, rivals = row.percentiles(), Rivals.of(latency, row.precision)
        twin = uncached_twin(latency, row) if row.caching else None
        memory = row.host_peak_bytes if row.device_peak_bytes is None else row.device_peak_bytes
        return [
            _name(row),
            *(words.seconds(ranks[percent]) for percent in (50, 90, 99)),
            *(_times(row, other) for other in (base, twin, rivals.peer, rivals.caching_peer)),
            *(
                words.NONE if each is None else f"{each:.3f}"
                for each in (row.wall_over_ideal, row.wall_over_ideal_alone)
            ),
            words.NONE if row.difference is None else f"{row.difference:.1e}",
            words.size(memory),
            words.seconds(row.load_seconds),
            words.size(row.size_bytes),
        ]

    few = min(len(row.loops) for row in rows)
    note = f"Times as fast: above 1 is faster. Base is {base.name}. " if base else ""
    note += "Peers are compared within a precision; their names show on hover. "
    if few <= 10:
        note += f"Of {few} round{'s' if few != 1 else ''} p90 and p99 say little: they lie between the slowest two."
    marks = ["ours" if row.family == OURS else None for row in rows]
    return join(
        tag("h3", "Ratios"),
        tag("p", note, class_="note"),
        table("Loops, fastest first", columns, [cells(row) for row in rows], marks),
    )


def _times(row: Contestant, other: Contestant | None) -> Cell:
    more = gain(row, other) if other is not None else None
    return words.NONE if more is None or other is None else tag("span", words.times(more.times), title=other.name)


def _calls(latency: Latency, rows: Sequence[Contestant]) -> Markup:
    columns = [
        Column("contestant"),
        Column("full calls"),
        Column("t_full in loop"),
        Column("t_full alone"),
        Column("GFLOP/s", "of the full calls in the loop"),
        Column("of the limit", "of what a large matrix product of PyTorch's reaches in this precision on this machine"),
        Column("shallow calls"),
        Column("t_shallow in loop"),
        Column("t_shallow alone"),
        Column("shallow / full", "in the loop"),
        Column("forecast / shallow", "what predicting the features adds at the most; both alone, and in no loop here"),
        Column("whole image", "median of whole pipeline calls"),
        Column("warm-up", "calls that were not measured, compilation included"),
    ]

    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    def cells(row: Contestant) -> list[Cell]:
        full, shallow = median(row.full), median(row.shallow)
        rate, share = latency.rate(row), latency.of_product(row)
        return [
            _name(row),
            str(row.full_calls) if row.full_calls else words.NONE,
            words.seconds(full),
            words.seconds(median(row.full_alone)),
            words.NONE if rate is None else f"{rate / 1e9:.0f}",
            words.NONE if share is None else words.percent(share),
            str(row.shallow_calls) if row.shallow_calls else words.NONE,
            words.seconds(shallow),
            words.seconds(median(row.shallow_alone)),
            words.percent(shallow / full, 1) if shallow is not None and full else words.NONE,
            words.NONE if row.forecast_over_shallow is None else words.percent(row.forecast_over_shallow, 1),
            words.seconds(median(row.images)),
            words.seconds(row.warm_up_seconds),
        ]

    marks = ["ours" if row.family == OURS else None for row in rows]
    note = None
    if latency.work:
        limits = words.listed([f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in latency.products.items()])
        note = tag(
            "p",
            f"A full call computes {latency.work['full'] / 1e9:.0f} GFLOP, a shallow one "
            f"{latency.work['shallow'] / 1e9:.0f}. A large matrix product reaches {limits} on this machine.",
            class_="note",
        )
    return join(
        tag("h3", "Engine calls"), note, table("Medians of single calls", columns, [cells(row) for row in rows], marks)
    )


def _name(row: Contestant) -> Markup:
    return join(row.name, " ", tag("span", "caching", class_="badge", title=row.caching) if row.caching else None)


def _not_run(rows: Sequence[Contestant]) -> Markup | None:
    if not rows:
        return None
    listed = [
        join(tag("dt", row.name), tag("dd", row.not_run or "no loop was measured, and no reason was given"))
        for row in rows
    ]
    return join(tag("h3", "Not run"), tag("dl", listed, class_="facts"))


def _settings(rows: Sequence[Contestant]) -> Markup:
    blocks = []
    for row in rows:
        fixed = {
            "family": row.family,
            "engine": row.engine,
            "precision": row.precision,
            "caching": row.caching or "none",
        }
        pairs = [join(tag("dt", name), tag("dd", value)) for name, value in (fixed | row.settings).items()]
        blocks.append(tag("details", tag("summary", row.name), tag("dl", pairs, class_="facts")))
    return join(
        tag("h3", "Settings"), tag("p", "Fixed before the run.", class_="note"), tag("div", blocks, class_="settings")
    )
