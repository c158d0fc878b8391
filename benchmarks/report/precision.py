"""The page's section on low precision: what it saves and costs, alone and together with caching."""

from __future__ import annotations

from collections.abc import Iterator

from ..precision.record import CallRow, Calls, ImageRow, Images, Joint, JointRow, Precision
from . import words
from .markup import Markup, tag
from .tables import Cell, Column, table

_CALLS = (
    Column("Engine", numeric=False),
    Column("Precision", "of the graphs, and what they are computed in where that is another", numeric=False),
    Column("Call", numeric=False),
    Column("Time", "the median of the rounds"),
    Column("Of fp32", "over the same call of the same engine in fp32, the median of the rounds' ratios"),
)
_IMAGES = (
    Column("Engine", numeric=False),
    Column("Precision", "of the graphs, and what they are computed in where that is another", numeric=False),
    Column("Schedule", numeric=False),
    Column("PSNR, dB", "to the same engine's image in fp32 with the same schedule; mean and 95 % interval"),
    Column("Worst, dB"),
    Column("To uncached fp32, dB", "to the same engine's image in fp32 with every call full"),
    Column("Right, %", "prompts obeyed in full, by the judge network"),
    Column("By precision, %", "the same schedule in fp32 is 0; paired"),
)
_JOINT = (
    Column("Precision", numeric=False),
    Column("Caching", numeric=False),
    Column("Calls", "# full, . shallow, _ without an engine", numeric=False),
    Column("PSNR, dB", "to the uncached image in fp32; mean and 95 % interval"),
    Column("Worst, dB"),
)


def section(measured: Precision, key: str) -> Markup:
    """``key`` makes its id unique on the page."""
    threads = f", {measured.threads} thread{'s' if measured.threads != 1 else ''}" if measured.threads else ""
    lead = f"{words.model(measured.model)}{threads}: builds in low precision beside fp32."
    parts = [*_of_calls(measured.calls), *_of_images(measured.images), *_of_joint(measured.joint)]
    return tag("section", tag("h2", "Precision"), tag("p", lead, class_="lead"), parts, id=key)


def _of_calls(calls: Calls | None) -> Iterator[Markup]:
    if calls is None:
        return
    sizes = ", ".join(f"{name} {size}" for name, size in calls.sizes.items())
    yield table(f"What a call takes ({sizes}; {calls.rounds} rounds)", _CALLS, [_call(row) for row in calls.rows])


def _of_images(images: Images | None) -> Iterator[Markup]:
    if images is None:
        return
    task = f"{images.steps} steps of {images.sampler}, guidance {images.guidance:g}, {images.cut}"
    caption = f"What the images lose ({task}; {images.images} a row)"
    yield table(caption, _IMAGES, [_image(row) for row in images.rows])


def _of_joint(joint: Joint | None) -> Iterator[Markup]:
    if joint is None:
        return
    task = f"{joint.steps} steps of {joint.scheduler}, guidance {joint.guidance:g}, {joint.cut}"
    caption = f"Caching and low precision together on {joint.engine} ({task}; {joint.images} images a row)"
    yield table(caption, _JOINT, [_joint(row) for row in joint.rows])
    yield tag(
        "p",
        f"Reuse: one call in {joint.interval} full, evenly. DP: as many, where CacheQuant's dynamic programming puts "
        "them; correction: with its scale and shift for each call and channel. Ours: offcut tune at that cost, where a "
        f"shallow call is {words.digits(joint.shallow_over_full, 2)} of a full one. Corrections are fitted to "
        f"{joint.samples} images, and tuning sees as many; none of them is judged.",
        class_="note",
    )


def _call(row: CallRow) -> list[Cell]:
    ratio = words.NONE if row.to_fp32 is None else f"{row.to_fp32:.2f}"
    return [row.engine, row.precision, row.call, words.seconds(row.median), ratio]


def _image(row: ImageRow) -> list[Cell]:
    return [
        row.engine,
        row.precision,
        row.schedule or "uncached",
        words.stacked(row.psnr),
        words.NONE if row.psnr_worst is None else f"{row.psnr_worst:.1f}",
        words.stacked(row.psnr_uncached),
        words.stacked(row.accuracy, 1, 100),
        words.stacked(row.accuracy_change, 1, 100, sign=True),
    ]


def _joint(row: JointRow) -> list[Cell]:
    return [row.precision, row.way, tag("code", row.timeline), words.stacked(row.psnr), f"{row.psnr_worst:.1f}"]
