"""Drift on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from ..schema.drift import Drift


def table(drift: Drift) -> Table:
    """Each call: full or shallow, how far features move from the call before, and what the call misses."""
    made = Table("call", "", "drift from the last call", "reused", "read", box=SIMPLE)
    for number, call in enumerate(drift.calls):
        moved = "" if number == 0 else f"{drift.distances[number - 1][0]:.3f}"
        errors = ("", "") if call.cut is None else (f"{call.reused:.3f}", f"{call.read:.3f}")
        kind = "full" if call.fulls == 1 else call.cut or ""
        made.add_row(str(number), kind, moved, *errors)
    return made


def notes(drift: Drift) -> Iterator[str]:
    """Sentences below it."""
    yield (
        "Root mean squares relative to the features' size: reused is what the last full call's features miss, read "
        "what the shallow call's do after prediction."
    )
    if drift.samples:
        mean = statistics.fmean(sample.psnr for sample in drift.samples)
        yield f"The {len(drift.samples)} images kept: {mean:.1f} dB to the uncached ones on average."
    if drift.uncached_walks:
        spreads = (
            statistics.fmean(walk.istd for walk in walks) for walks in (drift.uncached_walks, drift.cached_walks)
        )
        yield "Latent smoothness, ISTD: {:.4f} uncached, {:.4f} cached.".format(*spreads)
