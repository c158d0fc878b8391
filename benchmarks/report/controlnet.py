"""The page's section on a ControlNet that rests on shallow calls: what that costs and saves."""

from __future__ import annotations

from ..controlnet.record import ControlNetReuse, ControlNetRow
from . import words
from .markup import Markup, tag
from .tables import Cell, Column, table

_COLUMNS = (
    Column("Images", numeric=False),
    Column("Full calls", "of the UNet"),
    Column("Passes", "of the ControlNet"),
    Column("PSNR, dB", "to the uncached image; mean and 95 % interval"),
    Column("Worst, dB"),
    Column("By reuse, dB", "the same schedule with the ControlNet at every call is 0; paired"),
    Column("Overlap, %", "intersection over union of the objects' pixels and the silhouette's"),
    Column("Right, %", "prompts obeyed in full, by the judge network"),
    Column("Time", "of the pipeline's call, over the uncached one's; the median of the rounds"),
    Column("In the ControlNet", "share of the time"),
)


def section(measured: ControlNetReuse, key: str) -> Markup:
    """``key`` makes its id unique on the page."""
    task = (
        f"{words.model(measured.model)} on {measured.engine} under a ControlNet for silhouettes in eager PyTorch: "
        f"{measured.steps} steps of {measured.scheduler}, guidance {measured.guidance:g}, cut {measured.cut}, "
        f"{measured.images} images a row, {measured.batch} a call. Reused: the ControlNet runs on full calls only."
    )
    note = f"The scenes as the renderer draws them overlap by {words.percent(measured.drawn_overlap, 1)}."
    return tag(
        "section",
        tag("h2", "ControlNet"),
        tag("p", task, class_="lead"),
        table("What resting the ControlNet costs and saves", _COLUMNS, [_row(row) for row in measured.rows]),
        tag("p", note, class_="note"),
        id=key,
    )


def _row(row: ControlNetRow) -> list[Cell]:
    return [
        row.name,
        f"{row.full_calls} of {row.full_calls + row.shallow_calls}",
        str(row.passes) if row.control else words.NONE,
        words.stacked(row.psnr),
        words.NONE if row.psnr_worst is None else f"{row.psnr_worst:.1f}",
        words.stacked(row.change.psnr, 2, sign=True) if row.change else words.NONE,
        words.stacked(row.overlap, 1, 100),
        words.stacked(row.accuracy, 1, 100),
        words.times(row.to_uncached),
        words.NONE if row.share is None or not row.control else words.percent(row.share),
    ]
