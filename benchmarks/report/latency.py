"""Report section on latency: denoising loops of all contestants, ratios between them, and engine calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..schema.latency import Contestant, Latency
from .blocks import NONE, Block, Cell, Column, Facts, Group, Note, Pair, Plot, Section, Table
from .findings import OURS, Rivals, gain, measured, uncached_twin
from .formatting import count, digits, fixed, listed, median_seconds, model, percent, seconds, size, times
from .plots import Bar, bars


def section(latency: Latency, percents: Sequence[float] = (50, 90, 99)) -> Section:
    """Return the report section of ``offcut bench latency`` with these percentiles of the loops."""
    rows = sorted(measured(latency.contestants), key=lambda row: row.loop or 0.0)
    blocks: list[Block] = (
        [_loops(latency, rows, percents), _calls(latency, rows)] if rows else [Note("Nothing was measured.")]
    )
    blocks += [Note(text) for text in _notes(latency)]
    if rows:
        blocks.insert(0, Plot("Denoising loops, fastest first", lambda: bars([bar_of(row) for row in rows])))
    if skipped := [row for row in latency.contestants if not row.loops]:
        reason = Column("reason", lambda row: row.not_run or "no loop was measured", numeric=False)
        blocks.append(Table("Not run", [Column("contestant", lambda row: row.name), reason], skipped))
    blocks.append(Group("Settings, fixed before the run", [Group(row.name, [_settings(row)]) for row in
                                                           latency.contestants], folded=True))  # fmt: skip
    return Section("Latency", "Latency", _task(latency), blocks)


def _task(latency: Latency) -> str:
    threads = f", {count(latency.threads, 'thread')}" if latency.threads else ""
    noun = "image" if latency.frames is None else "video"
    frames = "" if latency.frames is None else f" of {latency.frames} frames"
    rises = latency.frames is not None and latency.guidance > 1
    guidance = f"{'rising from 1 to ' if rises else ''}{latency.guidance:g}"
    return (
        f"{model(latency.model)}: {latency.steps} steps of {latency.scheduler}, {latency.width} by {latency.height} "
        f"pixels, {count(latency.images_per_call, noun)}{frames} a call, guidance {guidance}{threads}. "
        f"{count(latency.rounds, 'round')}, each running every contestant once, in turn."
    )


def _notes(latency: Latency) -> Iterator[str]:
    """Yield the sentences that a reader needs to understand the tables."""
    yield f"Clock: {latency.clock}."
    shares = [row.forecast_over_shallow for row in latency.contestants if row.forecast_over_shallow is not None]
    if shares:
        yield (
            f"A forecast would add up to {percent(max(shares), 1)} to a shallow call, including the copy of each full "
            "call's features: the largest share of all engines."
        )
    if latency.reference is not None:
        yield f"Difference: between the final latents and those of {latency.reference}, relative to their norm."
    if latency.interrupted:
        yield f"Interrupted: {count(latency.rounds, 'round')} complete; later times are omitted."
    if latency.reopened:
        yield f"Memory was short: processes were closed and opened again {count(latency.reopened, 'time')}."
    if latency.idle_cpu_share is not None:
        yield f"While one ran, the waiting processes used at most {percent(latency.idle_cpu_share, 1)} of a core."


def bar_of(row: Contestant) -> Bar:
    """Return the bar of a loop; its parts are the medians of the calls inside the loop."""
    full = row.full_calls * statistics.median(row.full) if row.full else None
    shallow = row.shallow_calls * statistics.median(row.shallow) if row.shallow else None
    if row.ideal(row.full, row.shallow) is None:
        full = shallow = None
    loop = statistics.median(row.loops)
    return Bar(f"{row.name}   {seconds(loop)}", loop, min(row.loops), max(row.loops), full, shallow)


def _loops(latency: Latency, rows: Sequence[Contestant], percents: Sequence[float]) -> Table:
    base = Rivals.of(latency).base

    def over(rival: Callable[[Contestant], Contestant | None], *, named: bool = True) -> Callable[[Contestant], Cell]:
        def cell(row: Contestant) -> Cell:
            other = rival(row)
            ratio = gain(row, other) if other else None
            if ratio is None or other is None:
                return NONE
            return Pair(times(ratio), other.name) if named else times(ratio)

        return cell

    def rivals(row: Contestant) -> Rivals:
        return Rivals.of(latency, row.precision)

    def memory(row: Contestant) -> str:
        return size(row.host_peak_bytes if row.device_peak_bytes is None else row.device_peak_bytes)

    few = min(len(row.loops) for row in rows)
    caption = f"Denoising loops. Base: {base.name}." if base else "Denoising loops."
    if few <= 10:
        caption += f" Percentiles of {count(few, 'round')} say little: p90 and p99 lie between the slowest two."
    columns = [
        Column("contestant", lambda row: Pair(row.name, f"caching: {row.caching}") if row.caching else row.name),
        *(Column(f"p{rank:g}", partial(_percentile, rank)) for rank in percents),
        Column("vs base", over(lambda row: base, named=False), "times as fast: median of the ratios within a round"),
        Column("vs uncached", over(lambda row: uncached_twin(latency, row) if row.caching else None, named=False),
               "times as fast as the same engine and precision without caching"),
        Column("vs best peer", over(lambda row: rivals(row).peer),
               "times as fast as the fastest peer of the same precision that does not cache"),
        Column("vs best caching peer", over(lambda row: rivals(row).caching_peer),
               "times as fast as the fastest peer of the same precision that caches"),
        Column("wall / ideal", lambda row: fixed(row.wall_over_ideal, 3),
               "loop over the sum of its engine calls, timed in the loop; 1 is the limit"),
        Column("alone", lambda row: fixed(row.wall_over_ideal_alone, 3), "the same, with calls timed back to back",
               terminal=False),
        Column("difference", lambda row: NONE if row.difference is None else f"{row.difference:.1e}",
               "of the final latents to the reference's, relative to their norm", terminal=False),
        Column("memory", memory, "largest resident memory of the process, or of the device", terminal=False),
        Column("load", lambda row: seconds(row.load_seconds), "to open the engine", terminal=False),
        Column("size", lambda row: size(row.size_bytes), "of the files read", terminal=False),
    ]  # fmt: skip
    return Table(caption, columns, rows, ours=lambda row: row.family == OURS)


def _percentile(rank: float, row: Contestant) -> str:
    return seconds(row.percentiles((rank,))[rank])


def _calls(latency: Latency, rows: Sequence[Contestant]) -> Block:
    def share_of_full(row: Contestant) -> str:
        if not row.full or not row.shallow:
            return NONE
        return percent(statistics.median(row.shallow) / statistics.median(row.full), 1)

    columns = [
        Column("contestant", lambda row: row.name),
        Column("full calls", lambda row: str(row.full_calls) if row.full_calls else NONE, "of a loop"),
        Column("full", lambda row: median_seconds(row.full), "in the loop"),
        Column("alone", lambda row: median_seconds(row.full_alone), "back to back, outside of the loop"),
        Column("GFLOP/s", lambda row: digits((latency.rate(row) or 0) / 1e9, 3) if latency.rate(row) else NONE),
        Column("of a product", lambda row: percent(latency.of_product(row)),
               "of the FLOP/s of a large matrix product in the same precision: about the limit"),
        Column("shallow calls", lambda row: str(row.shallow_calls) if row.shallow_calls else NONE, "of a loop"),
        Column("shallow", lambda row: median_seconds(row.shallow), "in the loop"),
        Column("alone", lambda row: median_seconds(row.shallow_alone), "back to back, outside of the loop"),
        Column("shallow / full", share_of_full, "in the loop"),
        Column("forecast / shallow", lambda row: percent(row.forecast_over_shallow, 1),
               "upper bound of what predicting features adds, measured alone; no loop here predicts", terminal=False),
        Column("warm-up", lambda row: seconds(row.warm_up_seconds), "calls before the first round, with compilation",
               terminal=False),
    ]  # fmt: skip
    notes = []
    if latency.work:
        limits = listed([f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in latency.products.items()])
        notes.append(Note(
            f"A full call computes {latency.work['full'] / 1e9:.0f} GFLOP, a shallow one "
            f"{latency.work['shallow'] / 1e9:.0f}. A large matrix product reaches {limits} on this machine."
        ))  # fmt: skip
    table = Table("Medians of single calls", columns, rows, ours=lambda row: row.family == OURS)
    return Group("Engine calls", [*notes, table])


def _settings(row: Contestant) -> Facts:
    caching = row.caching or "none"
    own = {"family": row.family, "engine": row.engine, "precision": row.precision, "caching": caching}
    return Facts(own | row.settings)
