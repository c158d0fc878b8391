"""What a team asks first, answered in sentences that are computed from the figures; what no figure backs is said so."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..latency.record import Contestant, Latency
from ..quality.record import Estimate, Quality, QualityRow
from ..swap import Swap
from . import words
from .findings import OURS, Gain, Rivals, fastest, gain, measured, reference, speed, uncached_twin
from .noise import Interval, difference

_SPACE = "\N{NO-BREAK SPACE}"

ASKED = 0.25
"""The share of the time that has to be saved."""


@dataclass(frozen=True)
class Answer:
    """``verdict`` is a word or two: the answer before its reasons."""

    question: str
    verdict: str
    sentences: tuple[str, ...]


def answers(latencies: Sequence[Latency], qualities: Sequence[Quality], swaps: Sequence[Swap] = ()) -> list[Answer]:
    """Always the same three questions."""
    return [
        _faster(latencies),
        _quality(latencies, qualities),
        _on_top(latencies, swaps),
    ]


def _ours(latency: Latency) -> Contestant | None:
    return fastest(latency.contestants, lambda row: row.family == OURS and bool(row.caching))


def _faster(latencies: Sequence[Latency]) -> Answer:
    question = f"Is it at least {words.percent(ASKED)} faster?"
    sentences: list[str] = []
    verdicts: list[str] = []
    for latency in latencies:
        row, rivals = _ours(latency), Rivals.of(latency)
        if row is None or rivals.base is None:
            sentences.append(
                f"{words.model(latency.model)}: nothing of offcut's that caches was measured beside another row."
            )
            continue
        over = gain(row, rivals.base)
        assert over is not None  # both are measured
        verdicts.append(_verdict(over))
        model = words.model(latency.model)
        sentences.append(f"{model}: {row.name}, caching, {_less(over)} a denoising loop than {rivals.base.name}.")
        twin, told = uncached_twin(latency, row), [rivals.base]
        others = [("the same engine and precision without caching", twin)]
        others += [("the fastest peer without caching", rivals.peer), ("the fastest caching peer", rivals.caching_peer)]
        for kind, other in others:
            against = gain(row, other) if other else None
            if other is None or against is None:
                sentences.append(f"Against {kind}: not measured.")
            elif other in told:
                sentences.append(f"{other.name} is also {kind}.")
            else:
                sentences.append(f"Against {kind}, {other.name}, it {_less(against)}.")
                told.append(other)
    if not latencies:
        sentences.append("These results have no latency figures.")
    verdict = "Not measured" if not verdicts else verdicts[0] if len(set(verdicts)) == 1 else "It depends"
    return Answer(question, verdict, tuple(sentences))


def _verdict(over: Gain) -> str:
    if 1 - 1 / over.least >= ASKED:
        return "Yes"
    return "At the median only" if over.less_time >= ASKED else "No"


def _less(over: Gain) -> str:
    said = "less" if over.less_time >= 0 else "more"
    share = words.percent(abs(over.less_time), 1 if over.less_time > 0.95 else 0)
    return (
        f"takes {share} {said} time ({words.times(over.times)} as fast; "
        f"{words.times(over.least)} to {words.times(over.most)} over the rounds)"
    )


def _quality(latencies: Sequence[Latency], qualities: Sequence[Quality]) -> Answer:
    question = "What does it cost in quality?"
    if not qualities:
        return Answer(question, "Not measured", ("These results have no quality figures.",))
    sentences: list[str] = []
    lows: list[float] = []
    for quality in qualities:
        if elsewhere := [words.model(latency.model) for latency in latencies if latency.model != quality.model]:
            sentences.append(
                f"Quality was measured on another model than the latency: {words.model(quality.model)}, not "
                f"{words.listed(elsewhere)}. The order of settings is likelier to carry over than the figures."
            )
        for against in (row for row in quality.rows if row.kind == "uncached"):
            for sentence, psnr in _of_sampler(quality.rows, against):
                sentences.append(sentence)
                lows += [psnr] if psnr is not None else []
        sentences += _timed(latencies, quality)
    if not lows:
        return Answer(question, "See the sentences", tuple(sentences))
    span = [f"{low:.0f}" for low in sorted({round(low) for low in lows})]
    verdict = f"PSNR {span[0]} to {span[-1]}" if len(span) > 1 else f"PSNR {span[0]}"
    return Answer(question, f"{verdict}{_SPACE}dB", tuple(sentences))


def _of_sampler(rows: Sequence[QualityRow], against: QualityRow) -> Iterator[tuple[str, float | None]]:
    """The best cached setting that saves enough, and the fewer steps that cost about as much."""
    kin = [row for row in rows if reference(rows, row) is against]
    enough = [row for row in kin if row.kind == "cached" and (speed(rows, row) or 0) >= 1 / (1 - ASKED)]
    scored = [(row, row.psnr) for row in enough if row.psnr is not None]
    place = f"{against.sampler}, {against.steps} steps"
    if not scored:
        yield f"{place}: no cached row with a PSNR saves {words.percent(ASKED)}.", None
        return
    best, psnr = max(scored, key=lambda pair: pair[1].mean)
    faster = speed(rows, best)
    said = (
        f"{place}: of the settings that save at least {words.percent(ASKED)}, {best.name} is closest to the uncached "
    )
    said += f"images: {words.times(faster)} as fast, PSNR {words.estimate(psnr)} dB"
    said += f", {best.psnr_worst:.1f} dB for the worst image" if best.psnr_worst is not None else ""
    if best.accuracy_change is not None:
        change = words.estimate(best.accuracy_change, 1, 100, sign=True)
        told = "" if best.accuracy_change.low > 0 or best.accuracy_change.high < 0 else ", which is within noise"
        said += f"; prompts that come out right change by {change} points{told}"
    if (rival := _as_fast(rows, kin, best)) and rival.psnr is not None:
        said += f". Fewer steps instead, {rival.name}, are {words.times(speed(rows, rival))} as fast, with "
        said += f"{words.estimate(rival.psnr)} dB: {_told(psnr, rival.psnr)}"
    yield said + ".", psnr.mean


def _as_fast(rows: Sequence[QualityRow], kin: Sequence[QualityRow], best: QualityRow) -> QualityRow | None:
    fewer = [row for row in kin if row.kind == "fewer steps" and row.psnr is not None]
    return min(fewer, key=lambda row: abs((speed(rows, row) or 0) - (speed(rows, best) or 0)), default=None)


def _told(cached: Estimate, fewer: Estimate) -> str:
    ours, theirs = (Interval(each.mean, each.low, each.high) for each in (cached, fewer))
    apart = difference(theirs, ours)
    if not apart.excludes(0):
        return "their intervals do not tell which is closer"
    return "caching is closer" if apart.estimate > 0 else "fewer steps are closer"


def _timed(latencies: Sequence[Latency], quality: Quality) -> Iterator[str]:
    """The quality of the very setting that was timed, where a row has it."""
    ours = [_ours(latency) for latency in latencies]
    timed = [contestant.caching for contestant in ours if contestant is not None and contestant.caching]
    for row in quality.rows:
        matched = any(_names(text, row.schedule) and _names(text, row.cut) for text in timed)
        if matched and row.psnr is not None:
            yield f"The setting that was timed above, {row.name}: PSNR {words.estimate(row.psnr)} dB."


def _names(text: str, part: str | None) -> bool:
    """Whether a text names a schedule or a cut, and not just one that begins alike."""
    return bool(part) and re.search(rf"(?<![\w:]){re.escape(part or '')}(?![\w:=])", text) is not None


def _on_top(latencies: Sequence[Latency], swaps: Sequence[Swap]) -> Answer:
    question = "What happens with LoRA or another method on top?"
    sentences: list[str] = []
    rows = [row for latency in latencies for row in latency.contestants]
    for latency in latencies:
        found = []
        for row in measured(latency.contestants):
            twin = uncached_twin(latency, row)
            if row.family == OURS and row.caching and twin and (more := gain(row, twin)):
                found.append(f"{words.times(more.times)} on {row.engine} {row.precision}")
        if found:
            sentences.append(f"Caching on top of compiled engines and their precisions: {words.listed(found)}.")
        base = Rivals.of(latency).base
        ours = _ours(latency)
        alone = uncached_twin(latency, ours) if ours else None
        if base and ours and alone and (first := gain(alone, base)) and (both := gain(ours, base)):
            sentences.append(
                f"From {base.name}, {alone.name} alone is {words.times(first.times)} as fast, with caching on top "
                f"{words.times(both.times)}."
            )
    with_lora = [row.name for row in rows if row.loops and "lora" in f"{row.name} {row.settings}".lower()]
    if with_lora:
        sentences.append(f"With a LoRA: {words.listed(with_lora)}; see their rows below.")
    sentences += [sentence for swap in swaps for sentence in _swapped(swap)]
    measured_all = bool(sentences) and bool(with_lora or swaps)
    verdict = "Measured" if measured_all else "Partly measured" if sentences else "Not measured"
    if not with_lora and not swaps:
        sentences.append("LoRA on top was not measured: no row of these results has one.")
    return Answer(question, verdict, tuple(sentences))


def _swapped(swap: Swap) -> Iterator[str]:
    """How long a LoRA takes to go onto open engines, and what it costs from then on."""
    for row in swap.rows:
        said = f"{words.model(swap.model)}, {row.engine} {row.precision}: a LoRA on {swap.layers} layers goes onto the "
        said += f"open full and shallow graphs in {words.seconds(row.swap)}"
        if row.rebuilt is not None:
            rebuilt = row.rebuilt + (row.rebuilt_opened or 0)
            said += f", a rebuild with it takes {words.seconds(rebuilt)}"
        if row.later_calls:
            share = statistics.median(row.later_calls) / row.calls
            said += f"; calls then take {words.times(share)} the time of those without"
        said += ". Taken off, the built answers " + (
            "come back bit for bit." if row.restored else "did NOT come back bit for bit."
        )
        yield said
