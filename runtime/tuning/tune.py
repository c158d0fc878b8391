"""``tune``: find the schedule for a target, fit its predictions and corrections, and report its quality.

Tuning uses three disjoint sets of images. Predictions of features are fitted to the fit set, and their kind is chosen
on the selection set. Corrections of noise predictions are fitted to both sets. Corrected schedules are compared on both
sets, each image with a correction that was fitted without it. The test set is used in the report only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ..generation.schedule import Uniform
from ..prompts import bundle_prompts
from ..text_to_image import is_text_to_image
from . import lockstep
from .artifact import Tuned, make_key
from .candidates import CandidateFactory, CandidateJudge, PredictorsByCut
from .document import ReportRow
from .images import TuningPipeline, engine_label, reference_pipeline, split_images
from .prediction import FeatureMoments, Predictors, predictors_by_cut
from .recording import FeatureRecorder, OnStage, measure_influence, record
from .report import report_row, report_rows
from .scheduler_tap import SchedulerTap, tapped
from .search import Array, CallCosts, CutsByCall, ScoredSchedule, best_within, search_schedules
from .skipping import search_skipping, skipping_schedules
from .tuning_request import TuningRequest

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

_PROMISING = 2
"""Number of schedules, the best ones without a correction, that are also tried with one."""

_UNTUNED = ((0, None), (2, None), (2, 0.5), (2, 1.0))
"""Warm-up calls and damping of the untuned schedules among the candidates, so that tuning is not worse than these."""


def tune(
    pipe: Any, bundle: Bundle, name: str, request: TuningRequest, on_stage: OnStage, reference: Any = None
) -> Tuned:
    """Find a schedule for a pipeline of ``offcut.load`` with its present scheduler.

    Args:
        pipe: the pipeline.
        bundle: bundle that the pipeline was loaded from.
        name: name of the schedule.
        request: target and settings.
        on_stage: called with lines of progress.
        reference: pipeline of the same model with another engine, e.g. in fp32 if this engine is in int8. Predictions
            are then fitted to the reference's features, which corrects the mean error of this engine. Images are
            compared with the reference's uncached images.

    Raises:
        UserError: the pipeline needs more than a prompt, the target cannot be reached, or the reference has other
            features.
        CutError: the bundle does not have a cut of the request.
    """
    if not is_text_to_image(pipe.__call__):
        raise UserError(
            f"{type(pipe).__name__} needs more than a prompt, and tuning generates images from prompts only"
        )
    for pipeline in (pipe, *([] if reference is None else [reference])):
        pipeline.set_progress_bar_config(disable=True)
    advise, pipe.unet.advise = pipe.unet.advise, False
    record_times, pipe.unet.record_times = pipe.unet.record_times, True
    try:
        with tapped(pipe) as tap:  # also for the reference, which gets a scheduler of the same class
            return _TuningRun(pipe, bundle, name, request, tap, on_stage, reference).run()
    finally:
        pipe.unet.advise, pipe.unet.record_times = advise, record_times
        pipe.unet.set_schedule(None)


class _TuningRun:
    """State and steps of one search; see ``tune``."""

    def __init__(
        self,
        pipe: Any,
        bundle: Bundle,
        name: str,
        request: TuningRequest,
        tap: SchedulerTap,
        on_stage: OnStage,
        reference: Any,
    ) -> None:
        unet = pipe.unet
        cuts: dict[str, tuple[str, ...]] = {}
        for cut in request.cuts or (None,):
            unet.set_schedule(Uniform(2), cut)  # raises if there is no such cut
            cuts[unet.cut] = unet.cut_features[unet.cut]
        self._name, self._request, self._tap, self._on_stage = name, request, tap, on_stage
        self._pipeline = TuningPipeline(pipe, request.steps, request.size, cuts)
        if request.ratios:
            CallCosts(0, dict.fromkeys(cuts, 0.0), 0.0).with_ratios(
                request.ratios
            )  # raises before images are generated
        self._reference = None if reference is None else reference_pipeline(self._pipeline, reference)
        corrected_precision = None if reference is None else unet.precision
        self._key = make_key(bundle, pipe.scheduler, request.steps, request.guidance, corrected_precision)
        prompts = bundle_prompts(bundle) if request.prompts is None else request.prompts
        self._fit, self._select, self._test = split_images(prompts, request.samples, request.guidance, request.seed)
        self._judge = CandidateJudge(self._pipeline, tap, self._fit, self._select)

    def run(self) -> Tuned:
        """Run the search."""
        cuts, fit, select = self._pipeline.cuts, self._fit, self._select
        sets = (fit, select, self._test)
        self._costs = record(
            self._pipeline, sets, self._recorder(), self._key.calls, self._on_stage, self._reference, self._tap
        )
        if self._request.ratios:
            self._costs = self._costs.with_ratios(self._request.ratios)
        self._candidates = CandidateFactory(
            self._name,
            self._key,
            self._pipeline,
            self._costs,
            samples={"fit": len(fit.images), "select": len(select.images), "test": len(self._test.images)},
            reference=None if self._reference is None else engine_label(self._reference.pipe.unet),
        )
        with_reference = self._reference is not None
        reuse = predictors_by_cut(cuts, fit.moments, select.moments, kinds=(), reference=with_reference)
        fitted = predictors_by_cut(cuts, fit.moments, select.moments, reference=with_reference)
        # Influence is measured on this engine's images, so errors of reuse refer to its own features here.
        own = {name: moments.first_calls(self._key.calls) for name, moments in select.moments.items()}
        own_reuse = predictors_by_cut(cuts, own, own, kinds=()) if with_reference else reuse
        self._influence = measure_influence(self._pipeline, select, own_reuse, self._request.probes, self._on_stage)
        self._on_stage("search the schedules")
        schedules = self._search(fitted, tuple(cuts))
        skip = self._request.skip and lockstep.can_fit(self._key.calls, fit, select)
        skipping_families = (
            [skipping_schedules(self._key.calls, self._costs.ratios[cut], cut) for cut in cuts] if skip else []
        )
        budget = self._budget([schedules, *skipping_families], fitted)
        self._on_stage("compare predictions with reuse")
        candidates = [tuned for cut in cuts for tuned in self._with_one_cut(cut, budget, reuse, fitted)]
        tuned = self._best_corrected([*candidates, self._refit_if_better(self._judge.best(candidates))])
        restricted: dict[str, Tuned] = {}
        if len(cuts) > 1:
            self._on_stage("choose a cut for each call")
            reused = best_within(self._search(reuse, tuple(cuts)), budget)
            predicted = best_within(schedules, budget)
            best = self._judge.best(
                [
                    self._candidates.with_predictions(reused.cuts, reuse),
                    self._candidates.with_predictions(predicted.cuts, fitted),
                ]
            )
            restricted[f"one cut only, {tuned.document.cut}"] = tuned
            tuned = self._judge.best([tuned, self._best_corrected([best, self._refit_if_better(best)])])
        if skip:
            self._on_stage("try calls without an engine")
            skipping = self._judge.best([self._skipping(cut, budget, fitted) for cut in cuts])
            skipping = self._corrected_if_better(skipping.without_correction(), skipping)
            if self._judge.best([tuned, skipping]) is skipping:
                restricted["tuned, no call skipped"] = tuned
                tuned = skipping
        pareto = self._pareto([schedules, *skipping_families], fitted)
        self._on_stage("generate the test images")
        rows = report_rows(self._pipeline, self._costs, tuned, restricted, self._test, fit, reference=with_reference)
        document = tuned.document.model_copy(update={"measured": tuple(rows), "pareto": tuple(pareto)})
        return replace(tuned, document=document)

    def _search(self, predictors: PredictorsByCut, cuts: Sequence[str]) -> list[ScoredSchedule]:
        """Return the schedules with these cuts among which a budget decides; see ``search_schedules``."""
        errors = {cut: _weighted_errors(predictors[cut], self._influence[cut]) for cut in cuts}
        calls = self._costs.calls
        return search_schedules(calls, errors, self._costs.ratios, min(self._request.longest, calls))

    def _with_one_cut(self, cut: str, budget: float, reuse: PredictorsByCut, fitted: PredictorsByCut) -> list[Tuned]:
        """Return the candidates with one cut: with reuse, with fitted predictions, and untuned."""
        return [
            *(
                self._candidates.with_predictions(best_within(self._search(predictors, [cut]), budget).cuts, predictors)
                for predictors in (reuse, fitted)
            ),
            *(self._candidates.untuned(cut, budget, *settings) for settings in _UNTUNED),
        ]

    def _skipping(self, cut: str, budget: float, predictors: PredictorsByCut) -> Tuned:
        """Return the best schedule with skipped calls."""
        best = search_skipping(
            cut,
            budget,
            self._costs,
            self._judge,
            lambda cuts: self._corrected(cuts, predictors),
            self._search(predictors, [cut]),
            self._on_stage,
        )
        refitted = self._refit(best)
        return best if refitted is best else self._judge.best([best, self._judge.with_correction(refitted)])

    def _budget(self, families: Sequence[Sequence[ScoredSchedule]], predictors: PredictorsByCut) -> float:
        """Return the target as the time of a generation, in units of a full call's time.

        Args:
            families: lists of schedules, the cheapest first; the last one of each has only full calls.
            predictors: predictors of the schedules.
        """
        request, calls = self._request, self._costs.calls
        if request.speed_up is not None:
            return calls / request.speed_up
        if request.seconds is not None:
            begin = time.perf_counter()
            self._pipeline.generate(self._select.images[0])
            other_seconds = time.perf_counter() - begin - sum(self._pipeline.last_run.seconds)
            minimum = other_seconds + min(family[0].cost for family in families) * self._costs.full_seconds
            if request.seconds < minimum:
                raise UserError(
                    f"an image takes {minimum:.2f} s with the fewest full calls here "
                    f"({other_seconds:.2f} s outside the UNet), more than {request.seconds:g} s: "
                    "give at least that, or fewer steps"
                )
            return (request.seconds - other_seconds) / self._costs.full_seconds
        assert request.psnr is not None
        self._on_stage(f"find the fastest schedule that reaches {request.psnr:g} dB")
        return min(self._cheapest_cost(family, request.psnr, predictors) for family in families)

    def _cheapest_cost(self, family: Sequence[ScoredSchedule], psnr: float, predictors: PredictorsByCut) -> float:
        """Return the cost of the cheapest schedule of a family that reaches a PSNR, found by bisection."""
        low, high = 0, len(family) - 1
        while low < high:
            middle = (low + high) // 2
            self._on_stage(f"  {len(family[middle].full)} full calls")
            if self._judge.psnr(self._corrected(family[middle].cuts, predictors)) >= psnr:
                high = middle
            else:
                low = middle + 1
        return family[low].cost

    def _refit_if_better(self, tuned: Tuned) -> Tuned:
        """Return the schedule with refitted predictions if they are better."""
        return self._judge.best([tuned, self._refit(tuned)])

    def _refit(self, tuned: Tuned) -> Tuned:
        """Return the schedule with predictions fitted to its own images, which contain earlier errors."""
        if not tuned.coefficients:
            return tuned
        self._on_stage("fit again on cached images")
        recorder = self._recorder()
        moments: list[dict[str, FeatureMoments]] = []
        for images in (self._fit, self._select):
            sums: dict[str, FeatureMoments] = {}
            for number, image in enumerate(images.images):
                self._on_stage(f"  {number + 1} of {len(images.images)}")
                with recorder.watch():
                    self._pipeline.generate(image, tuned.schedule, tuned.forecast, output="latent")
                sums = sums or recorder.empty_moments()
                recorder.add_to(sums)
            moments.append(sums)
        predictors = predictors_by_cut(
            self._pipeline.cuts, moments[0], moments[1], reference=self._reference is not None
        )
        return self._candidates.with_predictions(tuned.document.by_call, predictors)

    def _pareto(self, families: Sequence[Sequence[ScoredSchedule]], predictors: PredictorsByCut) -> list[ReportRow]:
        """Return rows of several schedules on the selection set, the fewest full calls first.

        Args:
            families: lists of schedules, the cheapest first. The costs of the rows are those of schedules of the first
                list; the most expensive schedule of the other lists within such a cost competes for the row.
            predictors: predictors of the schedules.
        """
        schedules, *others = families
        count = min(self._request.pareto, len(schedules) - 1)
        if count == 0:
            return []
        self._on_stage("measure the Pareto front")
        rows = []
        for place in sorted({round(place) for place in np.geomspace(1, len(schedules) - 1, count)}):
            first = schedules[place - 1]
            affordable = [schedule for family in others for schedule in family if schedule.cost <= first.cost + 1e-9]
            options = [first, *sorted(affordable, key=lambda schedule: schedule.cost)[-1:]]
            self._on_stage(f"  {len(first.full)} full calls")
            tuned = self._judge.best([self._corrected(schedule.cuts, predictors) for schedule in options])
            rows.append(report_row(self._pipeline, self._costs, "tuned", tuned.schedule, tuned.forecast, self._select))
        return rows

    def _corrected(self, cuts: CutsByCall, predictors: PredictorsByCut) -> Tuned:
        """Return the schedule with the best predictions and, if a correction helps, corrected noise predictions."""
        return self._judge.with_correction(self._candidates.with_predictions(cuts, predictors))

    def _best_corrected(self, candidates: Sequence[Tuned]) -> Tuned:
        """Return the best of the most promising schedules, with a correction if it is significantly better."""
        self._on_stage("correct the noise predictions")
        promising = sorted(candidates, key=self._judge.psnr, reverse=True)[:_PROMISING]
        return self._judge.best(
            [self._corrected_if_better(tuned, self._judge.with_correction(tuned)) for tuned in promising]
        )

    def _corrected_if_better(self, tuned: Tuned, corrected: Tuned) -> Tuned:
        """Return the corrected schedule if it is significantly better, since corrections can harm other prompts."""
        return corrected if self._judge.significantly_better(corrected, tuned) else tuned

    def _recorder(self) -> FeatureRecorder:
        return FeatureRecorder(
            self._pipeline.pipe.unet,
            self._pipeline.features,
            self._request.positions,
            self._request.seed,
            reference=None if self._reference is None else self._reference.pipe.unet,
        )


def _weighted_errors(predictors: Predictors, influence: Array) -> Callable[[int, int | None, int], Array]:
    """Return the errors of segments for the search: root mean square errors, weighted by each call's influence."""

    def errors(last: int, before: int | None, until: int) -> Array:
        rms_errors = predictors.errors(last, before, until).sqrt().numpy()
        return np.asarray(rms_errors * influence[last + 1 : until])

    return errors
