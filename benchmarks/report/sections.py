"""Report sections of precision, ControlNet, LoadGen, LoRAs and serving, which consist of tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from ..schema.controlnet import ControlNetReuse
from ..schema.mlperf import MlPerf, ScenarioRun
from ..schema.precision import Calls, Images, Joint, Precision
from ..schema.serving import Percentiles, ServingLoad
from ..swap import Swap, SwapRow
from .blocks import NONE, Block, Column, Note, Section, Table
from .formatting import count, digits, fixed, interval, model, percent, seconds, seconds_range, size, times


def precision(measured: Precision) -> Section:
    """Return the section of ``offcut bench precision``."""
    threads = f", {count(measured.threads, 'thread')}" if measured.threads else ""
    blocks: list[Block] = []
    if measured.calls:
        blocks.append(_precision_calls(measured.calls))
    if measured.images:
        blocks.append(_precision_images(measured.images))
    if measured.joint:
        blocks += _precision_joint(measured.joint)
    task = f"{model(measured.model)}{threads}: builds in low precision compared with fp32."
    return Section("Precision", "Precision", task, blocks)


def _precision_calls(calls: Calls) -> Table:
    sizes = ", ".join(f"{name} {value}" for name, value in calls.sizes.items())
    columns = [
        Column("engine", lambda row: row.engine),
        Column("precision", lambda row: row.precision, "of the graphs, then of the computation", numeric=False),
        Column("call", lambda row: row.call, numeric=False),
        Column("time", lambda row: seconds(row.median), "median of the rounds"),
        Column("of fp32", lambda row: fixed(row.to_fp32, 2), "median of the ratios within a round"),
    ]
    return Table(f"Time of a call ({sizes}; {count(calls.rounds, 'round')})", columns, calls.rows)


def _precision_images(images: Images) -> Table:
    columns = [
        Column("engine", lambda row: row.engine),
        Column("precision", lambda row: row.precision, "of the graphs, then of the computation", numeric=False),
        Column("schedule", lambda row: row.schedule or "uncached", numeric=False),
        Column("PSNR, dB", lambda row: interval(row.psnr), "to the image in fp32 with the same schedule"),
        Column("worst, dB", lambda row: fixed(row.psnr_worst, 1), terminal=False),
        Column("to uncached fp32, dB", lambda row: interval(row.psnr_uncached)),
        Column("right, %", lambda row: interval(row.accuracy, 1, 100), "prompts obeyed, by the judge network"),
        Column(
            "change, points", lambda row: interval(row.accuracy_change, 1, 100, sign=True), "from fp32", terminal=False
        ),
    ]
    task = f"{images.steps} steps of {images.sampler}, guidance {images.guidance:g}, {images.cut}"
    return Table(f"Quality of the images ({task}; {images.images} images a row)", columns, images.rows)


def _precision_joint(joint: Joint) -> Iterator[Block]:
    columns = [
        Column("precision", lambda row: row.precision),
        Column("caching", lambda row: row.way, numeric=False),
        Column("calls", lambda row: row.timeline, "# full, . shallow, _ without an engine", numeric=False),
        Column("PSNR, dB", lambda row: interval(row.psnr), "to the uncached image in fp32"),
        Column("worst, dB", lambda row: fixed(row.psnr_worst, 1)),
    ]
    task = f"{joint.steps} steps of {joint.scheduler}, guidance {joint.guidance:g}, {joint.cut}"
    caption = f"Caching and low precision together on {joint.engine} ({task}; {joint.images} images a row)"
    yield Table(caption, columns, joint.rows)
    yield Note(
        f"Reuse: one call in {joint.interval} full, evenly. DP: as many full calls, placed by CacheQuant's dynamic "
        "programming; correction: with its scale and shift for each call and channel. Ours: offcut tune at that cost, "
        f"where a shallow call counts as {digits(joint.shallow_over_full, 2)} of a full one. Corrections are fitted to "
        f"{joint.samples} images and schedules are tuned with {joint.samples} images; none of these is judged."
    )


def controlnet(measured: ControlNetReuse) -> Section:
    """Return the section of ``offcut bench controlnet``."""
    columns = [
        Column("images", lambda row: row.name),
        Column("full calls", lambda row: f"{row.full_calls} of {row.full_calls + row.shallow_calls}", "of the UNet"),
        Column("passes", lambda row: str(row.passes) if row.control else NONE, "of the ControlNet"),
        Column("PSNR, dB", lambda row: interval(row.psnr), "to the uncached image"),
        Column("worst, dB", lambda row: fixed(row.psnr_worst, 1), terminal=False),
        Column("by reuse, dB", lambda row: interval(row.change.psnr, 2, sign=True) if row.change else NONE,
               "difference to the same schedule with the ControlNet at every call, paired"),
        Column("overlap, %", lambda row: interval(row.overlap, 1, 100), "intersection over union with the silhouette"),
        Column("right, %", lambda row: interval(row.accuracy, 1, 100), "prompts obeyed, by the judge network"),
        Column("time", lambda row: times(row.to_uncached), "of the pipeline's call, over the uncached one's"),
        Column("ControlNet", lambda row: percent(row.share) if row.control else NONE, "of the time",
               terminal=False),
    ]  # fmt: skip
    task = (
        f"{model(measured.model)} on {measured.engine} under a ControlNet for silhouettes in eager PyTorch: "
        f"{measured.steps} steps of {measured.scheduler}, guidance {measured.guidance:g}, cut {measured.cut}, "
        f"{measured.images} images a row, {measured.batch} a call. Reused: the ControlNet runs on full calls only. "
        f"Rendered scenes overlap with their silhouettes by {percent(measured.drawn_overlap, 1)}."
    )
    table = Table("Cost and gain of skipping the ControlNet on shallow calls", columns, measured.rows)
    return Section("ControlNet", "ControlNet", task, [table])


def mlperf(measured: MlPerf) -> Section:
    """Return the section of ``offcut bench mlperf``."""

    def right(run: ScenarioRun) -> str:
        return NONE if run.accuracy is None else f"{run.accuracy:.0%} of {run.accuracy_images}"

    columns = [
        Column("scenario", lambda run: run.scenario),
        Column("caching", lambda run: run.caching or "none", numeric=False),
        Column("LoadGen says", lambda run: "VALID" if run.valid else f"INVALID: {'; '.join(run.reasons)}",
               "LoadGen's verdict, for the shortened setting", numeric=False),
        Column("result", lambda run: seconds(run.value) if "latency" in run.metric else f"{run.value:.2f} images/s"),
        Column("of", lambda run: run.metric, "LoadGen's name of the result", numeric=False, terminal=False),
        Column("images", lambda run: str(run.images)),
        Column("prompts right", right, "prompts obeyed, by the judge network"),
        Column("setting", lambda run: "; ".join(f"{name}: {value}" for name, value in run.settings.items()),
               "where MLPerf's rules ask for something else", numeric=False, terminal=False),
    ]  # fmt: skip
    task = (
        f"{model(measured.model)} on {measured.engine}, {measured.steps} steps of {measured.scheduler}, guidance "
        f"{measured.guidance:g}, at most {measured.batch} images a UNet call, LoadGen {measured.loadgen}. Model, data "
        "set, durations and numbers of queries are not MLPerf's: this is no submission."
    )
    return Section("LoadGen", "MLPerf's load generator", task, [Table("LoadGen's results", columns, measured.runs)])


def swap(measured: Swap) -> Section:
    """Return the section of ``offcut bench swap``."""

    def rebuilt(row: SwapRow) -> float | None:
        return None if row.rebuilt is None or row.rebuilt_opened is None else row.rebuilt + row.rebuilt_opened

    def over_load(row: SwapRow) -> str:
        whole = rebuilt(row)
        return NONE if whole is None else f"{whole / row.swap:.1f}"

    columns = [
        Column("engine", lambda row: f"{row.engine} {row.precision}"),
        Column("load", lambda row: seconds_range(row.loaded), "unet.load_lora"),
        Column("another scale", lambda row: seconds_range(row.rescaled), "unet.set_loras"),
        Column("unload", lambda row: seconds_range(row.unloaded), "unet.unload_lora"),
        Column("first calls", lambda row: seconds_range(row.first_calls), "a full and a shallow call after a load"),
        Column("later calls", lambda row: seconds_range(row.later_calls), "the same calls once more, with the LoRA"),
        Column("without", lambda row: seconds(row.calls), "the same calls before any LoRA was loaded"),
        Column("back bit for bit", lambda row: "yes" if row.restored else "NO", "outputs after loading and unloading"),
        Column("rebuild", lambda row: seconds(rebuilt(row)), "offcut build with the LoRA fused, and opening it"),
        Column("rebuild / load", over_load),
    ]
    sizes = ", ".join(f"{name} {value}" for name, value in measured.sizes.items())
    task = (
        f"{model(measured.model)}: a LoRA ({measured.lora}; {measured.layers} layers) is loaded into open engines and "
        f"unloaded, {count(measured.rounds, 'time')}. The calls are full and {measured.cut}, with {sizes}."
    )
    return Section("LoRAs", "LoRAs", task, [Table("Medians with the range of the rounds", columns, measured.rows)])


BATCHING = {"steps": "offcut", "single": "one at a time", "whole": "whole requests"}
"""Labels of the ways to batch, by name."""


def serving(measured: ServingLoad) -> Section:
    """Return the section of ``offcut bench serve``."""
    request = ", ".join(f"{name} {value:g}" for name, value in measured.request.items() if not isinstance(value, str))
    task = (
        f"{model(measured.model)} on {measured.engine}; a request has {request}. At most {measured.in_flight} requests "
        f"in flight, {measured.queue} waiting, {measured.rows} rows a call. Servers run in their own processes and get "
        "requests over HTTP; the ways to batch take turns."
    )
    return Section("Serving", "The server under load", task, list(_serving_tables(measured)))


def _serving_tables(measured: ServingLoad) -> Iterator[Block]:
    way = Column("batching", lambda row: BATCHING[row.way], numeric=False)
    ends = [Column(rank, partial(_rank, rank)) for rank in ("p50", "p99")]
    if measured.batches:
        columns = [Column("requests that share a call", lambda row: str(row.requests))]
        columns += [Column(name, partial(_per_request, name)) for name in ("full", "shallow", "between")]
        yield Table("Engine calls, seconds divided by the requests", columns, measured.batches)
        if measured.allowed is not None:
            yield Note(f"By these times sharing calls can gain at most {times(measured.allowed)} in throughput.")
        if measured.allowed_latency is not None:
            yield Note(
                "By the engine calls alone, the p50 of batches of whole requests is "
                f"{times(measured.allowed_latency)} that of shared steps, at 70 % load."
            )
    if measured.closed:
        rate = Column("images a second", lambda row: fixed(statistics.median(row.throughput), 2))
        columns = [Column("clients", lambda row: str(row.clients)), way, rate, *ends]
        rows = sorted(measured.closed, key=lambda row: row.clients)
        yield Table("Closed loops: each client waits for its image", columns, rows)
    if measured.open:
        rate = Column("requests a second", lambda row: fixed(statistics.median(row.rates), 2))
        columns = [Column("load", lambda row: percent(row.load)), way, rate, *ends]
        columns.append(Column("refused", lambda row: str(row.refused)))
        loads = sorted(measured.open, key=lambda row: row.load)
        yield Table("Open loops: requests come at random moments", columns, loads)
    if (overload := measured.overload) is not None:
        overloads = [
            OverloadRow("every place taken", overload.capacity, overload.at_capacity),
            OverloadRow("overload", overload.throughput, overload.accepted),
            OverloadRow("refusals", None, overload.refusals),
        ]
        columns = [Column("", lambda row: row.name), Column("images a second", lambda row: fixed(row.rate, 2)), *ends]
        yield Table(f"Overload: {overload.title}", columns, overloads)
        yield Note(
            f"At most {overload.taken} requests were in the server, which has {overload.places} places. Replies that "
            f"were neither an image nor a refusal: {overload.unexpected}."
        )
    soaks = [("offcut", measured.soak), ("with a leak on purpose", measured.control)]
    if soaks := [(name, soak) for name, soak in soaks if soak is not None]:
        columns = [
            Column("", lambda row: row[0]),
            Column("time", lambda row: seconds(row[1].seconds)),
            Column("requests", lambda row: str(row[1].requests)),
            Column("clients gone", lambda row: str(row[1].left)),
            Column("after warm-up", lambda row: size(row[1].first_bytes)),
            Column("at the end", lambda row: size(row[1].last_bytes)),
            Column("growth", lambda row: f"{row[1].growth / 1e6:+.1f} MB"),
            Column("held", lambda row: str(row[1].held), "requests and cache slots that the idle server still held"),
            Column("unexpected", lambda row: str(row[1].unexpected), "replies other than an image or a refusal"),
        ]
        yield Table("Soak: resident memory", columns, soaks)


class OverloadRow(NamedTuple):
    """Throughput and latency of one phase of an overload."""

    name: str
    rate: float | None
    latency: Percentiles | None


def _rank(rank: str, row: Any) -> str:
    return seconds(getattr(row.latency, rank, None))


def _per_request(name: str, row: Any) -> str:
    return seconds(getattr(row, name) / row.requests)
