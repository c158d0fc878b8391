"""``tune``: record uncached images, find the schedule for a target, fit its predictions, and say what they are worth.

Three disjoint sets of images: coefficients are fitted to the first, choices are made on the second, and the third
enters the report only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ..draw import draws_from_prompts
from ..forecast import Extrapolate
from ..schedule import Steps, Uniform
from .artifact import Document, Measured, Tuned, key_of
from .images import Studio, three_sets
from .moments import Moments
from .predictors import Predictor, Predictors
from .record import Recorder
from .report import Costs, measured, rows
from .search import Array, Found, best_of_each, last_two, within

if TYPE_CHECKING:
    from ...engines.bundle import Bundle

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What the schedule should reach; exactly one of them.

    Attributes:
        speed_up: of the UNet's calls, over uncached.
        seconds: of a whole pipeline call of one image, on this machine.
        psnr: mean, in dB, to the uncached images; the fastest schedule that reaches it.
    """

    speed_up: float | None = None
    seconds: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.speed_up, self.seconds, self.psnr) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise UserError("give one target above 0: a speed-up, seconds, or a PSNR")


@dataclass(frozen=True)
class Wanted:
    """What to tune for.

    Attributes:
        target: what to reach.
        steps: of the pipeline's scheduler.
        guidance: the range of scales, from which the images' are drawn.
        samples: images in all: half to fit, a quarter each to select and to test.
        prompts: drawn in turn; each set has its own where there are three or more.
        cut: of the shallow calls; None for the bundle's first.
        size: the images' height and width in pixels; None is the model's own.
        longest: calls from one full call to the next, at most.
        probes: calls whose influence on the image is measured.
        positions: of a feature that are kept of each call.
        seed: of the first image.
        pareto: also measure so many schedules from fast to slow; 0 for none.
    """

    target: Target
    steps: int = 50
    guidance: tuple[float, float] = (7.5, 7.5)
    samples: int = 16
    prompts: tuple[str, ...] = ()
    cut: str | None = None
    size: int | None = None
    longest: int = 20
    probes: int = 8
    positions: int = 1024
    seed: int = 0
    pareto: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 4), ("samples", 4), ("longest", 2), ("probes", 1), ("positions", 16)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, and tuning needs at least {least}")
        if not self.prompts:
            raise UserError("there is no prompt to draw: give at least one")


def tune(pipe: Any, bundle: Bundle, name: str, wanted: Wanted, progress: Progress) -> Tuned:
    """Find the schedule of a pipeline of ``offcut.load`` with its present scheduler.

    Args:
        bundle: that the pipeline was loaded from.
        name: of the schedule.

    Raises:
        UserError: the pipeline draws from more than a prompt, or the target cannot be reached.
        CutError: there is no such cut.
    """
    if not draws_from_prompts(pipe.__call__):
        raise UserError(
            f"{type(pipe).__name__} draws from more than a prompt, and tuning makes images from prompts only"
        )
    pipe.set_progress_bar_config(disable=True)
    advises, pipe.unet.advise = pipe.unet.advise, False
    timed, pipe.unet.record_times = pipe.unet.record_times, True
    try:
        return _Tuning(pipe, bundle, name, wanted, progress).run()
    finally:
        pipe.unet.advise, pipe.unet.record_times = advises, timed
        pipe.unet.set_schedule(None)


class _Tuning:
    """One search; see ``tune``."""

    def __init__(self, pipe: Any, bundle: Bundle, name: str, wanted: Wanted, progress: Progress) -> None:
        unet = pipe.unet
        unet.set_schedule(Uniform(2), wanted.cut)
        self._name, self._wanted, self._progress = name, wanted, progress
        self._studio = Studio(pipe, wanted.steps, wanted.size, unet.cut)
        self._features: tuple[str, ...] = unet._cuts[unet.cut]
        self._key = key_of(bundle, pipe.scheduler, wanted.steps, wanted.guidance)
        self._fit, self._select, self._test = three_sets(wanted.prompts, wanted.samples, wanted.guidance, wanted.seed)

    def run(self) -> Tuned:
        self._costs = self._record()
        weights = self._influence()
        reuse = Predictors(self._fit.moments, self._select.moments, kinds=())
        better = Predictors(self._fit.moments, self._select.moments)
        self._progress("search the schedules")
        calls, ratio = self._costs.calls, self._costs.ratio
        found = {
            kind: best_of_each(calls, _weighted(each, weights), ratio, min(self._wanted.longest, calls))
            for kind, each in (("reuse", reuse), ("predict", better))
        }
        budget = self._budget(found["predict"], better)
        self._progress("compare predictions with reuse")
        tried = [
            self._predicting(within(found["reuse"], budget).full, reuse),
            self._predicting(within(found["predict"], budget).full, better),
            *(self._extrapolating(budget, damping) for damping in (0.5, 1.0)),
        ]
        tuned = self._again(self._best(tried))
        pareto = self._pareto(found["predict"], better)
        self._progress("draw the test images")
        report = rows(self._studio, self._costs, tuned, self._test, self._fit)
        document = tuned.document.model_copy(update={"measured": tuple(report), "pareto": tuple(pareto)})
        return replace(tuned, document=document)

    # What there is to see

    def _record(self) -> Costs:
        """Uncached images, their features, and the times of the engine's calls."""
        studio, done = self._studio, 0
        recorder = self._recorder()
        full: list[float] = []
        self._progress("draw uncached images")
        for each in (self._fit, self._select, self._test):
            for image in each.images:
                done += 1
                self._progress(f"  {done} of {self._wanted.samples}")
                with recorder.watch():
                    each.pictures.append(studio.draw(image))
                if each is not self._test:
                    each.moments = each.moments or recorder.empty()
                    recorder.add_to(each.moments)
                full += studio.run.seconds
        calls = len(studio.run.full)
        if calls != self._key.calls:
            raise UserError(
                f"{type(studio.pipe).__name__} calls its UNet {calls} times in {studio.steps} steps, not "
                f"{self._key.calls} times as its scheduler says: this pipeline cannot be tuned"
            )
        studio.draw(self._select.images[0], Uniform(2))
        run = studio.run
        shallow = [seconds for seconds, whole in zip(run.seconds, run.full, strict=True) if not whole]
        whole = statistics.median(full)
        return Costs(calls, statistics.median(shallow) / whole, whole)

    def _influence(self) -> Array:
        """How far an error of the feature, relative to its size, moves the final latent at each call.

        Measured at a few calls: there alone the feature of the call before is reused. The others are interpolated.
        """
        self._progress("measure each call's influence on the image")
        studio, total = self._studio, self._costs.calls
        count = min(self._wanted.probes, total - 1)
        calls = sorted({round(place) for place in np.linspace(1, total - 1, count)})
        images = self._select.images[:2]
        errors = Predictors(self._fit.moments, self._select.moments, kinds=())
        moved = np.zeros(len(calls))
        for number, image in enumerate(images):
            whole = studio.draw(image, output="latent").float()
            for index, call in enumerate(calls):
                self._progress(f"  call {call}, image {number + 1} of {len(images)}")
                schedule = Steps([other for other in range(total) if other != call])
                latent = studio.draw(image, schedule, output="latent").float()
                moved[index] += float((latent - whole).norm() / whole.norm()) / len(images)
        missed = [math.sqrt(float(errors.reuse_errors(call - 1, call + 1)[0])) for call in calls]
        influence = np.maximum(moved, 1e-9) / np.maximum(missed, 1e-9)
        return np.exp(np.interp(np.arange(total), calls, np.log(influence)))

    # The choice

    def _budget(self, found: Sequence[Found], predictors: Predictors) -> float:
        """The target as full calls' time."""
        target, calls = self._wanted.target, self._costs.calls
        if target.speed_up is not None:
            return calls / target.speed_up
        if target.seconds is not None:
            began = time.perf_counter()
            self._studio.draw(self._select.images[0])
            rest = time.perf_counter() - began - sum(self._studio.run.seconds)
            least = rest + found[0].cost * self._costs.full_seconds
            if target.seconds < least:
                raise UserError(
                    f"an image takes {least:.2f} s with the fewest full calls here ({rest:.2f} s outside the UNet), "
                    f"more than {target.seconds:g} s: give at least that, or fewer steps"
                )
            return (target.seconds - rest) / self._costs.full_seconds
        assert target.psnr is not None
        self._progress(f"find the fastest schedule that reaches {target.psnr:g} dB")
        low, high = 0, len(found) - 1  # the last has no shallow call
        while low < high:
            middle = (low + high) // 2
            self._progress(f"  {len(found[middle].full)} full calls")
            if self._psnr(self._predicting(found[middle].full, predictors)) >= target.psnr:
                high = middle
            else:
                low = middle + 1
        return found[low].cost

    def _extrapolating(self, budget: float, damping: float) -> Tuned:
        """What needs no tuning: two calls to warm up, then a uniform interval, extrapolated."""
        forecast, calls = Extrapolate(damping), self._costs.calls
        choices = (Uniform(n, warmup=2).full_calls(calls) for n in range(2, calls))
        full = next((each for each in choices if self._costs.of(len(each)) <= budget + 1e-9), (0,))
        predictors = {}
        for call in (each for each in range(calls) if each not in full):
            made = forecast.at("", call, *last_two(full, call))
            coefficients = None if made is None else dict.fromkeys(self._features, made)
            predictors[call] = Predictor("reuse" if made is None else f"forecast {damping:g}", 0.0, coefficients)
        return self._tuned(full, predictors)

    def _predicting(self, full: Sequence[int], predictors: Predictors) -> Tuned:
        """A schedule with the best prediction for each of its shallow calls."""
        shallow = [call for call in range(self._costs.calls) if call not in full]
        return self._tuned(full, {call: predictors.best(call, *last_two(full, call)) for call in shallow})

    def _again(self, tuned: Tuned) -> Tuned:
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
        return self._best([tuned, self._predicting(tuned.document.full, Predictors(moments[0], moments[1]))])

    def _pareto(self, found: Sequence[Found], predictors: Predictors) -> list[Measured]:
        """So many schedules, from the fewest full calls to the most, on the selecting images."""
        count = min(self._wanted.pareto, len(found) - 1)
        if count == 0:
            return []
        self._progress("measure the Pareto front")
        made = []
        for place in sorted({round(place) for place in np.geomspace(1, len(found) - 1, count)}):
            full = found[place - 1].full
            self._progress(f"  {len(full)} full calls")
            tuned = self._predicting(full, predictors)
            made.append(measured(self._studio, self._costs, "tuned", tuned.schedule, tuned.forecast, self._select))
        return made

    def _best(self, tried: Sequence[Tuned]) -> Tuned:
        """That with the best images among those that choices are made on."""
        return max(tried, key=self._psnr)

    def _psnr(self, tuned: Tuned) -> float:
        return self._studio.psnr(self._select, tuned.schedule, tuned.forecast)[0]

    def _recorder(self) -> Recorder:
        return Recorder(self._studio.pipe.unet, self._features, self._wanted.positions, self._wanted.seed)

    def _tuned(self, full: Sequence[int], predictors: Mapping[int, Predictor]) -> Tuned:
        kinds = [predictors[call].kind if call in predictors else "full" for call in range(self._costs.calls)]
        document = Document(
            key=self._key,
            cut=self._studio.cut,
            full=tuple(full),
            predictors=tuple(kinds),
            engine=self._studio.pipe.unet.engine,
            shallow_over_full=self._costs.ratio,
            samples={
                "fit": len(self._fit.images),
                "select": len(self._select.images),
                "test": len(self._test.images),
            },
            measured=(),
        )
        coefficients = {call: dict(each.coefficients) for call, each in predictors.items() if each.coefficients}
        return Tuned(self._name, document, coefficients)


def _weighted(predictors: Predictors, weights: Array) -> Callable[[int, int | None, int], Array]:
    """A segment's errors as the search takes them: root mean squares, weighted by their calls' influence."""

    def errors(last: int, before: int | None, until: int) -> Array:
        missed = predictors.errors(last, before, until).sqrt().numpy()
        return np.asarray(missed * weights[last + 1 : until])

    return errors
