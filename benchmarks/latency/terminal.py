"""A latency run as tables for the terminal, and every single time as CSV."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ...errors import UserError
from ..schema.latency import TIMES, Contestant, Latency


def tables(latency: Latency, percents: Sequence[float]) -> list[Table]:
    """Return the loops with their speed-ups, the calls inside them, memory and loading, and what was not measured."""
    rows = [row for row in latency.contestants if row.not_run is None]
    found = [_loops(rows, percents), _calls(latency, rows), _memory(rows)]
    if failed := [row for row in latency.contestants if row.not_run]:
        table = Table("not measured", "because", box=SIMPLE)
        for row in failed:
            table.add_row(escape(row.name), escape(row.not_run or ""))
        found.append(table)
    return found


def _loops(rows: Sequence[Contestant], percents: Sequence[float]) -> Table:
    images = any(row.images for row in rows)
    headings = [f"p{percent:g} s" for percent in percents] + ["image s"] * images + ["x eager", "x peer", "x cached"]
    table = _table("denoising loop", headings)
    for row in rows:
        percentiles = row.percentiles(percents)
        cells = [_short(percentiles[percent]) for percent in percents]
        if images:
            cells.append(_median(row.images))
        bases = [_eager(row), row.best_peer, row.best_caching_peer]
        cells += [_short(row.speed_ups.get(base)) if base else "" for base in bases]
        table.add_row(_name(row), *cells)
    return table


def _calls(latency: Latency, rows: Sequence[Contestant]) -> Table:
    table = _table("UNet calls", ("full ms", "alone", "peak", "shallow", "alone", "/ideal", "alone", "of it"))
    for row in rows:
        share = latency.of_product(row)
        ratios = (row.wall_over_ideal, row.wall_over_ideal_alone, row.of_ideal)
        full, shallow = (
            [_median([1e3 * seconds for seconds in each]) for each in pair]
            for pair in ((row.full, row.full_alone), (row.shallow, row.shallow_alone))
        )
        cells = [*full, "" if share is None else f"{share:.2f}", *shallow]
        table.add_row(_name(row), *cells, *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios))
    return table


def _memory(rows: Sequence[Contestant]) -> Table:
    device = any(row.device_peak_bytes for row in rows)
    table = _table("", ["GiB", *["device"] * device, "on disk", "load s", "warm-up", "calls", "diff."])
    for row in rows:
        sizes = [row.host_peak_bytes, *[row.device_peak_bytes] * device, row.size_bytes]
        cells = ["" if size is None else f"{size / 2**30:.2f}" for size in sizes]
        cells += [_short(seconds) for seconds in (row.load_seconds, row.warm_up_seconds)]
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        table.add_row(_name(row), *cells, f"{row.full_calls}+{row.shallow_calls}", difference)
    return table


def notes(latency: Latency) -> list[str]:
    """Return the sentences that explain the tables' headings and the run's setting."""
    videos = latency.frames is not None
    rising = "1 to " if videos and latency.guidance > 1 else ""
    lines = [
        f"{latency.model}: {f'{latency.frames} frames of ' if videos else ''}{latency.width}x{latency.height}, "
        f"{latency.steps} steps of {latency.scheduler}, guidance {rising}{latency.guidance:g}, "
        f"{latency.images_per_call} {'video' if videos else 'image'}(s) a call, {latency.threads} threads, "
        f"{latency.rounds} rounds, contestants in turn.",
        f"Clock: {latency.clock}.",
        "x eager: speed-up over diffusers eager of the same precision, round by round; x peer, x cached: over the "
        "fastest peer of the same precision, and the fastest that caches. /ideal: the loop over the sum of its UNet "
        "calls, timed inside the loop and alone; of it: the share reached of the speed-up over the uncached engine "
        "that those calls allow.",
        "GiB: peak resident memory of the process, which may be shared (the result's settings name the others); on "
        "disk: GiB of the files it reads; load s: without the first call, files' digests checked; warm-up in seconds.",
    ]
    if latency.work and latency.products:
        limits = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in latency.products.items())
        lines.append(
            f"peak: the full call's {latency.work['full'] / 1e9:.0f} GFLOP over its time, as a share of a large matrix "
            f"product's rate on this machine ({limits} GFLOP/s); no engine can be much above 1."
        )
    shares = [row.forecast_over_shallow for row in latency.contestants if row.forecast_over_shallow is not None]
    if shares:
        lines.append(
            f"A forecast would add up to {max(shares):.1%} to a shallow call: the largest share of all engines, with "
            "the copy that it needs of each full call's features."
        )
    if latency.reference is not None:
        lines.append(f"diff.: difference of the final latents from those of {latency.reference}, norm over norm.")
    if latency.interrupted:
        lines.append(f"Interrupted: {latency.rounds} round(s) were complete, and later times are left out.")
    if latency.reopened:
        lines.append(f"Memory was short: {latency.reopened} times a process was closed and opened again.")
    if latency.idle_cpu_share is not None:
        lines.append(f"While one ran, the waiting processes used at most {latency.idle_cpu_share:.1%} of a core.")
    return lines


def times(latency: Latency) -> Iterator[tuple[str, str, int, float]]:
    """Yield every time of the run: contestant, kind, its index in that kind, seconds."""
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


def _table(first: str, headings: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 0, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _name(row: Contestant) -> str:
    return f"[bold]{escape(row.name)}[/]" if row.family == "offcut" else escape(row.name)


def _eager(row: Contestant) -> str | None:
    """Return the name of the eager row of the same precision, else of fp32."""
    names = (f"diffusers eager {row.precision}", "diffusers eager fp32")
    return next((name for name in names if name in row.speed_ups), None)


def _median(seconds: Sequence[float]) -> str:
    return _short(statistics.median(seconds)) if seconds else ""


def _short(value: float | None) -> str:
    """Return the value with three significant digits, or all digits before the decimal point; empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
