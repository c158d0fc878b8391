"""The run as tables on the terminal, and every single time as CSV."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ...errors import UserError
from .record import TIMES, Contestant, Latency


def tables(latency: Latency, percents: Sequence[float]) -> list[Table]:
    """The loops with their ratios, then the calls inside them, then memory and loading."""
    rows = [row for row in latency.contestants if row.not_run is None]
    made = [_loops(rows, percents), _calls(latency, rows), _memory(rows)]
    if any(row.not_run for row in latency.contestants):
        made.append(_not_run([row for row in latency.contestants if row.not_run]))
    return made


def _loops(rows: Sequence[Contestant], percents: Sequence[float]) -> Table:
    images = any(row.images for row in rows)
    table = _table("denoising loop", *(f"p{percent:g} s" for percent in percents))
    for heading in (*(("image s",) if images else ()), "x eager", "x peer", "x cached"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        found = row.percentiles(percents)
        cells = [_short(found[percent]) for percent in percents]
        if images:
            cells.append(_median(row.images))
        ratios = [_eager(row), row.best_peer, row.best_caching_peer]
        cells += [_ratio(row.speed_ups.get(base)) if base else "" for base in ratios]
        table.add_row(_name(row), *cells)
    return table


def _calls(latency: Latency, rows: Sequence[Contestant]) -> Table:
    table = _table("UNet calls", "full ms", "alone", "peak", "shallow", "alone", "/ideal", "alone", "of it")
    for row in rows:
        share = latency.of_product(row)
        ratios = (row.wall_over_ideal, row.wall_over_ideal_alone, row.of_ideal)
        cells = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        full, shallow = (
            [_median([1e3 * seconds for seconds in each]) for each in pair]
            for pair in ((row.full, row.full_alone), (row.shallow, row.shallow_alone))
        )
        table.add_row(_name(row), *full, "" if share is None else f"{share:.2f}", *shallow, *cells)
    return table


def _memory(rows: Sequence[Contestant]) -> Table:
    device = any(row.device_peak_bytes for row in rows)
    heads = ("GiB", *(("device",) if device else ()), "on disk", "load s", "warm-up", "calls", "diff.")
    table = _table("", *heads)
    for row in rows:
        cells = [_gib(row.host_peak_bytes), *([_gib(row.device_peak_bytes)] if device else []), _gib(row.size_bytes)]
        times = (row.load_seconds, row.warm_up_seconds)
        cells += ["" if seconds is None else _short(seconds) for seconds in times]
        differs = "" if row.difference is None else f"{row.difference:.0e}"
        table.add_row(_name(row), *cells, f"{row.full_calls}+{row.shallow_calls}", differs)
    return table


def _not_run(rows: Sequence[Contestant]) -> Table:
    table = Table("not measured", "because", box=SIMPLE)
    for row in rows:
        table.add_row(escape(row.name), escape(row.not_run or ""))
    return table


def notes(latency: Latency) -> list[str]:
    """What the tables' headings leave unsaid."""
    of_videos = latency.frames is not None
    rises = of_videos and latency.guidance > 1  # from frame to frame
    said = [
        f"{latency.model}: {f'{latency.frames} frames of ' if of_videos else ''}{latency.width}x{latency.height}, "
        f"{latency.steps} steps of {latency.scheduler}, guidance {'1 to ' if rises else ''}{latency.guidance:g}, "
        f"{latency.images_per_call} {'video' if of_videos else 'image'}(s) a call, {latency.threads} threads, "
        f"{latency.rounds} rounds, contestants in turn.",
        f"Clock: {latency.clock}.",
        "x eager: over diffusers eager of the same precision, round by round; x peer, x cached: over the "
        "fastest of the same precision that is not offcut, and that caches. /ideal: the loop over the sum of its "
        "UNet calls, as timed in it and alone; of it: the speed-up over the same engine uncached, of what those calls "
        "allow.",
        "GiB: largest resident memory of the process, which may be shared (settings in the result say with whom); on "
        "disk: GiB of the files it reads; load s: without the first call, files' digests checked; warm-up in seconds.",
    ]
    if latency.work and latency.products:
        limits = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in latency.products.items())
        said.append(
            f"peak: the full call's {latency.work['full'] / 1e9:.0f} GFLOP over its time, of what a large matrix "
            f"product reaches on this machine ({limits} GFLOP/s); no engine can be much above 1."
        )
    shares = [row.forecast_over_shallow for row in latency.contestants if row.forecast_over_shallow is not None]
    if shares:
        said.append(
            f"A forecast would add up to {max(shares):.1%} to a shallow call: the most of all engines, with the copy "
            "that it needs of each full call's features."
        )
    if latency.reference is not None:
        said.append(f"diff.: the final latents from those of {latency.reference}, norm over norm.")
    if latency.interrupted:
        said.append(f"Interrupted: {latency.rounds} round(s) were complete, and the times of a later one are left out.")
    if latency.reopened:
        said.append(f"Memory was short: {latency.reopened} times a process was closed and opened again.")
    if latency.idle_cpu_share is not None:
        said.append(f"While one ran, the waiting processes used at most {latency.idle_cpu_share:.1%} of a core.")
    return said


def times(latency: Latency) -> Iterator[tuple[str, str, int, float]]:
    """Every time of the run: contestant, kind, its index in that kind, seconds."""
    for row in latency.contestants:
        for kind in TIMES:
            for index, seconds in enumerate(getattr(row, kind)):
                yield row.name, kind, index, seconds


def export_times(latency: Latency, path: Path) -> None:
    """Write every time as CSV.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("contestant", "kind", "index", "seconds"))
            writer.writerows(times(latency))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file with --export-times") from error


def _table(first: str, *headings: str) -> Table:
    table = Table(box=SIMPLE, padding=(0, 0, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _name(row: Contestant) -> str:
    return f"[bold]{escape(row.name)}[/]" if row.family == "offcut" else escape(row.name)


def _eager(row: Contestant) -> str | None:
    """The eager row of the same precision, or else of fp32."""
    names = (f"diffusers eager {row.precision}", "diffusers eager fp32")
    return next((name for name in names if name in row.speed_ups), None)


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else _short(ratio)


def _median(seconds: Sequence[float]) -> str:
    return _short(statistics.median(seconds)) if seconds else ""


def _short(value: float) -> str:
    """With three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"
