"""Comparisons between the measured rows: differences of latents, contestants that did not cache, and speed-ups."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..schema.latency import Contestant, Latency

NOT_CACHED = "nothing was cached: its latents are those of the uncached run, bit for bit"
REFERENCE = "diffusers eager fp32"


def fill_in(latency: Latency, latents: Mapping[str, Path], twins: Mapping[str, str | None]) -> None:
    """Add differences and speed-ups to the rows, and withdraw cached contestants that did not cache.

    Args:
        latents: safetensors file with the final latents of each measured contestant.
        twins: for a cached contestant the uncached one of the same process.
    """
    from safetensors.torch import load_file

    tensors = {name: load_file(path)["latents"] for name, path in latents.items()}
    rows = {row.name: row for row in latency.contestants}
    for name, twin in twins.items():
        if name in tensors and twin in tensors and tensors[name].equal(tensors[twin]):
            rows[name].withdraw(NOT_CACHED)
    latency.reference = _reference(latency, tensors)
    if latency.reference is not None:
        for name, tensor in tensors.items():
            rows[name].difference = relative_difference(tensor, tensors[latency.reference])
    for row in latency.contestants:
        if row.loops:
            _compare(latency, row)


def relative_difference(ours: Any, theirs: Any) -> float:
    """Return the norm of the difference over the norm of ``theirs``; infinite where a value is not finite."""
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    return difference if difference == difference else float("inf")


def _reference(latency: Latency, tensors: Mapping[str, Any]) -> str | None:
    """Return eager fp32, else the first uncached contestant in fp32, else the first uncached one."""
    uncached = [row for row in latency.contestants if row.caching is None and row.name in tensors]
    exact = [row.name for row in uncached if row.precision == "fp32"]
    eager = [REFERENCE] if REFERENCE in tensors else []
    return next(iter([*eager, *exact, *(row.name for row in uncached)]), None)


def _compare(latency: Latency, row: Contestant) -> None:
    measured = [other for other in latency.contestants if other.loops and other is not row]
    peers = [other for other in measured if other.family != "offcut" and other.precision == row.precision]
    bases = [other.name for other in measured if other.family == "diffusers"]
    if row.family == "offcut":
        row.best_peer = _fastest(peers, lambda peer: True)
        row.best_caching_peer = _fastest(peers, lambda peer: peer.caching is not None)
        uncached = _fastest(peers, lambda peer: peer.family == row.engine and peer.caching is None)
        bases += [name for name in (row.best_peer, row.best_caching_peer, uncached) if name]
        if uncached is not None:
            row.of_ideal = _of_ideal(latency, row, uncached)
    ratios = {base: latency.speed_up(row.name, base) for base in dict.fromkeys(bases)}
    row.speed_ups = {base: ratio for base, ratio in ratios.items() if ratio is not None}


def _fastest(rows: list[Contestant], fits: Callable[[Contestant], bool]) -> str | None:
    times = {row.name: statistics.median(row.loops) for row in rows if fits(row)}
    return min(times, key=lambda name: times[name]) if times else None


def _of_ideal(latency: Latency, row: Contestant, uncached: str) -> float | None:
    """Return the speed-up as a share of ``calls * t_full / ideal``, with times inside the cached loop."""
    ideal, speed_up = row.ideal(row.full, row.shallow), latency.speed_up(row.name, uncached)
    if ideal is None or speed_up is None:
        return None
    return speed_up / ((row.full_calls + row.shallow_calls) * statistics.median(row.full) / ideal)
