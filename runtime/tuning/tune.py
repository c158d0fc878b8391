"""``tune``: record uncached images, find the schedule for a target, fit its predictions, and say what they are worth.

Three disjoint sets of images: predictions of features are fitted to the first, and of which kind they are is chosen on
the second. Corrections of answers are fitted to both, and schedules chosen by both, where no image is judged with a
correction that was fitted to it. The third enters the report only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ..generation.schedule import Uniform
from ..text_to_image import is_text_to_image
from . import lockstep
from .artifact import Tuned
from .candidates import ByCut, Candidates
from .choice import key_of
from .cuts import ByCall, full_of, search
from .document import Measured
from .gauge import Gauge
from .images import Studio, three_sets
from .measure import Progress, influence, record
from .moments import Moments
from .predictors import Predictors, by_cut
from .record import Recorder
from .reference import beside, named
from .report import Costs, measured, rows
from .search import Array, Found, within
from .skipping import between, evenly, ladder, mixed, moved, to_the_end, within_budget
from .wanted import Wanted
from .watched import Watch, watched

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

_PATIENCE = 2
"""Numbers of full calls, one below the other, that may be worse than the best before no other is tried."""

_MOVES = 16
"""Schedules that are tried with one full call moved."""

_PROMISING = 2
"""Schedules with predictions that are tried with a correction too."""

_UNTUNED = ((0, None), (2, None), (2, 0.5), (2, 1.0))
"""What anybody would try: calls to warm up, and damping of a forecast. What is found is not to be worse."""


def tune(pipe: Any, bundle: Bundle, name: str, wanted: Wanted, progress: Progress, reference: Any = None) -> Tuned:
    """Find the schedule of a pipeline of ``offcut.load`` with its present scheduler.

    Args:
        bundle: that the pipeline was loaded from.
        name: of the schedule.
        reference: the same pipeline with another engine, e.g. in fp32 where this one is in int8. Predictions then aim
            at its features, and so correct the mean error of this one's; images are held against its own.

    Raises:
        UserError: the pipeline draws from more than a prompt, or the target cannot be reached, or the reference has
            other weights or features.
        CutError: there is no such cut.
    """
    if not is_text_to_image(pipe.__call__):
        raise UserError(
            f"{type(pipe).__name__} draws from more than a prompt, and tuning makes images from prompts only"
        )
    for each in (pipe, *([] if reference is None else [reference])):
        each.set_progress_bar_config(disable=True)
    advises, pipe.unet.advise = pipe.unet.advise, False
    timed, pipe.unet.record_times = pipe.unet.record_times, True
    try:
        with watched(pipe) as watch:  # and the reference, which gets a scheduler of the same class
            return _Tuning(pipe, bundle, name, wanted, watch, progress, reference).run()
    finally:
        pipe.unet.advise, pipe.unet.record_times = advises, timed
        pipe.unet.set_schedule(None)


class _Tuning:
    """One search; see ``tune``."""

    def __init__(
        self,
        pipe: Any,
        bundle: Bundle,
        name: str,
        wanted: Wanted,
        watch: Watch,
        progress: Progress,
        reference: Any,
    ) -> None:
        unet = pipe.unet
        cuts: dict[str, tuple[str, ...]] = {}
        for cut in wanted.cuts or (None,):
            unet.set_schedule(Uniform(2), cut)  # says if there is none
            cuts[unet.cut] = unet.cut_features[unet.cut]
        self._name, self._wanted, self._watch, self._progress = name, wanted, watch, progress
        self._studio = Studio(pipe, wanted.steps, wanted.size, cuts)
        if wanted.ratios:
            Costs(0, dict.fromkeys(cuts, 0.0), 0.0).given(wanted.ratios)  # says what is missing before any image
        self._reference = None if reference is None else beside(self._studio, reference)
        corrected = None if reference is None else unet.precision
        self._key = key_of(bundle, pipe.scheduler, wanted.steps, wanted.guidance, corrected)
        self._fit, self._select, self._test = three_sets(wanted.prompts, wanted.samples, wanted.guidance, wanted.seed)
        self._gauge = Gauge(self._studio, watch, self._fit, self._select)

    def run(self) -> Tuned:
        cuts, fit, select = self._studio.cuts, self._fit, self._select
        sets = (fit, select, self._test)
        self._costs = record(
            self._studio, sets, self._recorder(), self._key.calls, self._progress, self._reference, self._watch
        )
        if self._wanted.ratios:
            self._costs = self._costs.given(self._wanted.ratios)
        self._candidates = Candidates(
            self._name,
            self._key,
            self._studio,
            self._costs,
            samples={"fit": len(fit.images), "select": len(select.images), "test": len(self._test.images)},
            reference=None if self._reference is None else named(self._reference.pipe.unet),
        )
        refers = self._reference is not None
        reuse = by_cut(cuts, fit.moments, select.moments, kinds=(), reference=refers)
        better = by_cut(cuts, fit.moments, select.moments, reference=refers)
        # Influence is that of an error of this engine's images, so its own features are the truth.
        alike = {name: each.first(self._key.calls) for name, each in select.moments.items()} if refers else {}
        own = by_cut(cuts, alike, alike, kinds=()) if refers else reuse
        self._weights = influence(self._studio, select, own, self._wanted.probes, self._progress)
        self._progress("search the schedules")
        found = self._search(better, tuple(cuts))
        skips = self._wanted.skip and lockstep.possible(self._key.calls, fit, select)
        rungs = [ladder(self._key.calls, self._costs.ratios[cut], cut) for cut in cuts] if skips else []
        budget = self._budget([found, *rungs], better)
        self._progress("compare predictions with reuse")
        tried = [each for cut in cuts for each in self._at(cut, budget, reuse, better)]
        tuned = self._finished([*tried, self._again(self._gauge.best(tried))])
        less: dict[str, Tuned] = {}
        if len(cuts) > 1:
            self._progress("let each call have a cut of its own")
            plain = self._candidates.predicting(within(self._search(reuse, tuple(cuts)), budget).cuts, reuse)
            several = self._gauge.best([plain, self._candidates.predicting(within(found, budget).cuts, better)])
            less[f"one cut only, {tuned.document.cut}"] = tuned
            tuned = self._gauge.best([tuned, self._finished([several, self._again(several)])])
        if skips:
            self._progress("let calls run no engine")
            skipping = self._gauge.best([self._skipping(cut, budget, better) for cut in cuts])
            skipping = self._mended(skipping.without_correction(), skipping)
            if self._gauge.best([tuned, skipping]) is skipping:
                less["tuned, no call skipped"] = tuned
                tuned = skipping
        pareto = self._pareto([found, *rungs], better)
        self._progress("draw the test images")
        report = rows(self._studio, self._costs, tuned, less, self._test, fit, reference=refers)
        document = tuned.document.model_copy(update={"measured": tuple(report), "pareto": tuple(pareto)})
        return replace(tuned, document=document)

    # The choice

    def _search(self, predictors: ByCut, cuts: Sequence[str]) -> list[Found]:
        """The schedules whose shallow calls are at these cuts; see ``cuts.search``."""
        errors = {cut: _weighted(predictors[cut], self._weights[cut]) for cut in cuts}
        calls = self._costs.calls
        return search(calls, errors, self._costs.ratios, min(self._wanted.longest, calls))

    def _at(self, cut: str, budget: float, reuse: ByCut, better: ByCut) -> list[Tuned]:
        """What there is to choose from with one cut."""
        return [
            *(
                self._candidates.predicting(within(self._search(predictors, [cut]), budget).cuts, predictors)
                for predictors in (reuse, better)
            ),
            *(self._candidates.untuned(cut, budget, *each) for each in _UNTUNED),
        ]

    def _skipping(self, cut: str, budget: float, predictors: ByCut) -> Tuned:
        """The best with calls that run no engine; nobody knows it before they are tried."""
        calls = self._costs.calls
        made: dict[ByCall, Tuned] = {}

        def tried(cuts: ByCall) -> Tuned:
            if cuts not in made:
                made[cuts] = self._corrected(cuts, predictors)
            return made[cuts]

        best, worse = None, 0
        for choices in within_budget(calls, budget, self._costs.ratios[cut], cut):
            self._progress(f"  {len(full_of(choices[0]))} full calls")
            tuned = self._gauge.best([tried(cuts) for cuts in choices])
            if best is None or self._gauge.best([best, tuned]) is tuned:
                best, worse = tuned, 0
            else:
                worse += 1
            if worse == _PATIENCE:
                break
        assert best is not None
        shallow, count = best.document.by_call.count(cut), len(best.document.full)
        placed = [each.full for each in self._search(predictors, [cut]) if len(each.full) == count]  # by the features
        placed.append(between(evenly(calls, count), to_the_end(calls, count)))
        best = self._gauge.best([best, *(tried(mixed(full, calls, shallow, cut)) for full in placed)])
        best = self._moved(best, lambda full: tried(mixed(full, calls, shallow, cut)))
        refitted = self._refitted(best)
        return best if refitted is best else self._gauge.best([best, self._gauge.corrected(refitted)])

    def _moved(self, best: Tuned, made: Callable[[tuple[int, ...]], Tuned]) -> Tuned:
        """The best that moving one full call after the other leads to, as long as images surely come nearer.

        Args:
            made: a schedule with these full calls.
        """
        known, before = {best.document.full}, None
        while before is not best and len(known) <= _MOVES:
            before = best
            for place, by in itertools.product(range(1, len(best.document.full)), (-1, 1)):
                while (full := moved(best.document.full, self._costs.calls, place, by)) is not None:
                    if full in known or len(known) > _MOVES:
                        break
                    known.add(full)
                    self._progress(f"  move full call {place + 1}")
                    if not self._gauge.surely(tried := made(full), best):
                        break
                    best = tried
        return best

    def _budget(self, families: Sequence[Sequence[Found]], predictors: ByCut) -> float:
        """The target as full calls' time.

        Args:
            families: of schedules to choose from, in each the cheapest first and last one without a shallow call.
        """
        target, calls = self._wanted.target, self._costs.calls
        if target.speed_up is not None:
            return calls / target.speed_up
        if target.seconds is not None:
            began = time.perf_counter()
            self._studio.draw(self._select.images[0])
            rest = time.perf_counter() - began - sum(self._studio.run.seconds)
            least = rest + min(family[0].cost for family in families) * self._costs.full_seconds
            if target.seconds < least:
                raise UserError(
                    f"an image takes {least:.2f} s with the fewest full calls here ({rest:.2f} s outside the UNet), "
                    f"more than {target.seconds:g} s: give at least that, or fewer steps"
                )
            return (target.seconds - rest) / self._costs.full_seconds
        assert target.psnr is not None
        self._progress(f"find the fastest schedule that reaches {target.psnr:g} dB")
        return min(self._cheapest(family, target.psnr, predictors) for family in families)

    def _cheapest(self, family: Sequence[Found], psnr: float, predictors: ByCut) -> float:
        """The cost of a family's first schedule with such images, as bisection finds it."""
        low, high = 0, len(family) - 1
        while low < high:
            middle = (low + high) // 2
            self._progress(f"  {len(family[middle].full)} full calls")
            if self._gauge.psnr(self._corrected(family[middle].cuts, predictors)) >= psnr:
                high = middle
            else:
                low = middle + 1
        return family[low].cost

    def _again(self, tuned: Tuned) -> Tuned:
        return self._gauge.best([tuned, self._refitted(tuned)])

    def _refitted(self, tuned: Tuned) -> Tuned:
        """Fit once more, on the cached trajectory: errors feed back, and features there are others."""
        if not tuned.coefficients:
            return tuned
        self._progress("fit again on cached images")
        recorder = self._recorder()
        moments: list[dict[str, Moments]] = []
        for each in (self._fit, self._select):
            sums: dict[str, Moments] = {}
            for number, image in enumerate(each.images):
                self._progress(f"  {number + 1} of {len(each.images)}")
                with recorder.watch():
                    self._studio.draw(image, tuned.schedule, tuned.forecast, output="latent")
                sums = sums or recorder.empty()
                recorder.add_to(sums)
            moments.append(sums)
        predictors = by_cut(self._studio.cuts, moments[0], moments[1], reference=self._reference is not None)
        return self._candidates.predicting(tuned.document.by_call, predictors)

    def _pareto(self, families: Sequence[Sequence[Found]], predictors: ByCut) -> list[Measured]:
        """So many schedules, from the fewest full calls to the most, on the selecting images.

        Args:
            families: the first gives the costs, and each of the others its dearest schedule within them.
        """
        found, *others = families
        count = min(self._wanted.pareto, len(found) - 1)
        if count == 0:
            return []
        self._progress("measure the Pareto front")
        made = []
        for place in sorted({round(place) for place in np.geomspace(1, len(found) - 1, count)}):
            within_it = [each for family in others for each in family if each.cost <= found[place - 1].cost + 1e-9]
            tried = [found[place - 1], *sorted(within_it, key=lambda each: each.cost)[-1:]]
            self._progress(f"  {len(tried[0].full)} full calls")
            tuned = self._gauge.best([self._corrected(each.cuts, predictors) for each in tried])
            made.append(measured(self._studio, self._costs, "tuned", tuned.schedule, tuned.forecast, self._select))
        return made

    def _corrected(self, cuts: ByCall, predictors: ByCut) -> Tuned:
        """A schedule with the best predictions, and corrected answers where that is possible."""
        return self._gauge.corrected(self._candidates.predicting(cuts, predictors))

    def _finished(self, tried: Sequence[Tuned]) -> Tuned:
        """The best of the most promising, with corrected answers where that helps."""
        self._progress("correct what the UNet answers")
        promising = sorted(tried, key=self._gauge.psnr, reverse=True)[:_PROMISING]
        return self._gauge.best([self._mended(tuned, self._gauge.corrected(tuned)) for tuned in promising])

    def _mended(self, tuned: Tuned, corrected: Tuned) -> Tuned:
        """The corrected one if its images are surely nearer: of prompts far apart, one mends what another spoils."""
        return corrected if self._gauge.surely(corrected, tuned) else tuned

    def _recorder(self) -> Recorder:
        return Recorder(
            self._studio.pipe.unet,
            self._studio.features,
            self._wanted.positions,
            self._wanted.seed,
            reference=None if self._reference is None else self._reference.pipe.unet,
        )


def _weighted(predictors: Predictors, weights: Array) -> Callable[[int, int | None, int], Array]:
    """A segment's errors as the search takes them: root mean squares, weighted by their calls' influence."""

    def errors(last: int, before: int | None, until: int) -> Array:
        missed = predictors.errors(last, before, until).sqrt().numpy()
        return np.asarray(missed * weights[last + 1 : until])

    return errors
