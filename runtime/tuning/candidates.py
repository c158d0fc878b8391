"""Schedules to choose from, made of calls and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..generation.forecast import Extrapolate
from ..generation.schedule import SKIP, Uniform
from .artifact import Tuned
from .cuts import ByCall, at_cut, full_of
from .document import Document, Key
from .images import Studio
from .predictors import Predictor, Predictors
from .report import Costs
from .search import last_two

ByCut = Mapping[str, Predictors]


@dataclass(frozen=True)
class Candidates:
    """What all schedules of one search have in common.

    Attributes:
        name: of the schedule that is searched.
        key: for what.
        samples: images to fit, to select and to test.
        reference: engine and precision that predictions aim at, if others than these.
    """

    name: str
    key: Key
    studio: Studio
    costs: Costs
    samples: Mapping[str, int]
    reference: str | None

    def predicting(self, cuts: ByCall, predictors: ByCut) -> Tuned:
        """A schedule with the best prediction for each of its shallow calls."""
        full, shallow = full_of(cuts), [(call, cut) for call, cut in enumerate(cuts) if cut not in (None, SKIP)]
        return self.of(cuts, {call: predictors[cut].best(call, *last_two(full, call)) for call, cut in shallow})

    def untuned(self, cut: str, budget: float, warmup: int, damping: float | None) -> Tuned:
        """A uniform interval after some calls to warm up, reused or extrapolated."""
        forecast, calls = None if damping is None else Extrapolate(damping), self.costs.calls
        choices = (Uniform(n, warmup=warmup).full_calls(calls) for n in range(2, calls))
        within_it = (each for each in choices if self.costs.of(at_cut(each, calls, cut)) <= budget + 1e-9)
        full = next(within_it, (0,))
        predictors = {}
        for call in (each for each in range(calls) if each not in full):
            made = None if forecast is None else forecast.at("", call, *last_two(full, call))
            coefficients = None if made is None else dict.fromkeys(self.studio.cuts[cut], made)
            predictors[call] = Predictor("reuse" if made is None else f"forecast {damping:g}", 0.0, coefficients)
        return self.of(at_cut(full, calls, cut), predictors)

    def of(self, cuts: ByCall, predictors: Mapping[int, Predictor]) -> Tuned:
        """A schedule of these calls, with the prediction of each shallow one."""
        kinds = [
            predictors[call].kind if call in predictors else "full" if cut is None else cut
            for call, cut in enumerate(cuts)
        ]
        default, ratios = self.studio.cut, self.costs.ratios
        used = [cut for cut in self.studio.cuts if cut in cuts]
        cut = default if default in used or not used else used[0]
        document = Document(
            key=self.key,
            cut=cut,
            cuts=cuts if set(cuts) - {None, cut} else (),
            full=full_of(cuts),
            predictors=tuple(kinds),
            engine=self.studio.pipe.unet.engine,
            shallow_over_full=ratios[cut],
            ratios=dict(ratios) if len(ratios) > 1 else {},
            reference=self.reference,
            measured_ratios=dict(self.costs.measured),
            samples=dict(self.samples),
            measured=(),
        )
        coefficients = {call: dict(each.coefficients) for call, each in predictors.items() if each.coefficients}
        return Tuned(self.name, document, coefficients)
