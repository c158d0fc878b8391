"""Candidate schedules: their construction from calls and predictions, and their comparison by image quality."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..generation.forecast import Extrapolate
from ..generation.schedule import SKIP, Uniform
from . import lockstep
from .artifact import Tuned
from .document import TunedDocument, TuningKey
from .images import ImageSet, TuningPipeline
from .prediction import Predictor, Predictors
from .scheduler_tap import SchedulerTap
from .search import CallCosts, CutsByCall, cuts_with, full_calls, last_two

PredictorsByCut = Mapping[str, Predictors]


@dataclass(frozen=True)
class CandidateFactory:
    """Makes the candidate schedules of one search.

    Attributes:
        name: name of the schedule that is searched.
        key: conditions that the schedules are tuned for.
        pipeline: pipeline that is tuned.
        costs: durations of the engine's calls.
        samples: number of images in the fit, selection and test sets.
        reference: engine and precision of the reference whose features are predicted; None without a reference.
    """

    name: str
    key: TuningKey
    pipeline: TuningPipeline
    costs: CallCosts
    samples: Mapping[str, int]
    reference: str | None

    def with_predictions(self, cuts: CutsByCall, predictors: PredictorsByCut) -> Tuned:
        """Return the schedule with these cuts by call and the best prediction for each of its shallow calls."""
        full, shallow = full_calls(cuts), [(call, cut) for call, cut in enumerate(cuts) if cut not in (None, SKIP)]
        return self._make(cuts, {call: predictors[cut].best(call, *last_two(full, call)) for call, cut in shallow})

    def untuned(self, cut: str, budget: float, warmup: int, damping: float | None) -> Tuned:
        """Return the uniform schedule with the shortest interval within a budget, without fitted predictions.

        Args:
            cut: cut of the shallow calls.
            budget: time of a generation, in units of a full call's time.
            warmup: number of warm-up calls.
            damping: damping of the extrapolation; None to reuse features.
        """
        forecast, calls = None if damping is None else Extrapolate(damping), self.costs.calls
        chains = (Uniform(interval, warmup=warmup).full_calls(calls) for interval in range(2, calls))
        affordable = (chain for chain in chains if self.costs.cost_of(cuts_with(chain, calls, cut)) <= budget + 1e-9)
        full = next(affordable, (0,))
        predictors = {}
        for call in range(calls):
            if call in full:
                continue
            coefficients = None if forecast is None else forecast.at("", call, *last_two(full, call))
            by_feature = None if coefficients is None else dict.fromkeys(self.pipeline.cuts[cut], coefficients)
            kind = "reuse" if coefficients is None else f"forecast {damping:g}"
            predictors[call] = Predictor(kind, 0.0, by_feature)
        return self._make(cuts_with(full, calls, cut), predictors)

    def _make(self, cuts: CutsByCall, predictors: Mapping[int, Predictor]) -> Tuned:
        kinds = [
            predictors[call].kind if call in predictors else "full" if cut is None else cut
            for call, cut in enumerate(cuts)
        ]
        default, ratios = self.pipeline.cut, self.costs.ratios
        used = [cut for cut in self.pipeline.cuts if cut in cuts]
        cut = default if default in used or not used else used[0]
        document = TunedDocument(
            key=self.key,
            cut=cut,
            cuts=cuts if set(cuts) - {None, cut} else (),
            full=full_calls(cuts),
            predictors=tuple(kinds),
            engine=self.pipeline.pipe.unet.engine,
            shallow_over_full=ratios[cut],
            ratios=dict(ratios) if len(ratios) > 1 else {},
            reference=self.reference,
            measured_ratios=dict(self.costs.measured),
            samples=dict(self.samples),
            measured=(),
        )
        coefficients = {
            call: dict(predictor.coefficients) for call, predictor in predictors.items() if predictor.coefficients
        }
        return Tuned(self.name, document, coefficients)


class CandidateJudge:
    """Compares schedules by the PSNR of their images; each schedule's images are generated once.

    Schedules without a correction are judged on the selection set. Corrected schedules are judged on the fit and
    selection sets, each image with kernels that were fitted without it: see ``lockstep``.

    Args:
        pipeline: pipeline that is tuned.
        tap: tap of the pipeline's scheduler.
        fit: fit set.
        select: selection set.
    """

    def __init__(self, pipeline: TuningPipeline, tap: SchedulerTap, fit: ImageSet, select: ImageSet) -> None:
        self._pipeline, self._tap, self._fit, self._select = pipeline, tap, fit, select
        # PSNR of each image of the selection set, or of both sets, by the schedule's `id`, which is unique while the
        # dictionary holds the schedule.
        self._results: dict[int, tuple[Tuned, tuple[float, ...]]] = {}

    def with_correction(self, tuned: Tuned) -> Tuned:
        """Return the schedule with a correction of its noise predictions, or unchanged if no correction helps."""
        corrected, psnrs = lockstep.fit(self._pipeline, self._tap, tuned, self._fit, self._select)
        if psnrs is not None:
            self._results[id(corrected)] = corrected, psnrs
        return corrected

    def significantly_better(self, candidate: Tuned, other: Tuned) -> bool:
        """Return whether a schedule's PSNR is higher than that of another schedule by more than chance."""
        return significantly_better(*self._psnrs(candidate, other))

    def best(self, candidates: Sequence[Tuned]) -> Tuned:
        """Return the schedule with the highest mean PSNR."""
        means = [statistics.fmean(psnrs) for psnrs in self._psnrs(*candidates)]
        return candidates[means.index(max(means))]

    def psnr(self, tuned: Tuned) -> float:
        """Return the mean PSNR of a schedule in dB."""
        return statistics.fmean(self._psnrs(tuned)[0])

    def _psnrs(self, *candidates: Tuned) -> list[tuple[float, ...]]:
        """Return for each schedule the PSNR in dB of each image on which all these schedules were judged."""
        for tuned in candidates:
            if id(tuned) not in self._results:
                psnrs = self._pipeline.psnr(self._select, tuned.schedule, tuned.forecast)
                self._results[id(tuned)] = tuned, psnrs
        results = [self._results[id(tuned)][1] for tuned in candidates]
        common = min(map(len, results))  # the selection set comes last
        return [psnrs[-common:] for psnrs in results]


def significantly_better(psnrs: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether the mean gain in PSNR is larger than its standard error.

    Args:
        psnrs, others: PSNR of the same images with two schedules, in dB.
    """
    gains = np.subtract(psnrs, others)
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return bool(gains.mean() > error)
