"""``tune``: record uncached images, find the schedule for a target, fit its predictions, and say what they are worth.

Three disjoint sets of images: coefficients are fitted to the first, choices are made on the second, and the third only
enters the report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import UserError
from ..draw import draw, draws_from_prompts
from ..forecast import Coefficients, Forecast
from ..schedule import Schedule, Steps, Uniform
from .artifact import Document, Measured, Tuned, key_of
from .moments import Moments
from .predictors import Predictors
from .record import Recorder
from .search import Array, Found, best_of_each, cachequant, within

if TYPE_CHECKING:
    from ...engines.bundle import Bundle

Progress = Callable[[str], None]
Picture = Any


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


@dataclass(frozen=True)
class Image:
    """One of the images to draw."""

    prompt: str
    seed: int
    guidance: float


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


@dataclass
class _Set:
    """Images, what they look like uncached, and the moments of their features."""

    images: list[Image]
    pictures: list[Picture] = field(default_factory=list)
    moments: dict[str, Moments] = field(default_factory=dict)


@dataclass
class _Tuning:
    pipe: Any
    bundle: Bundle
    name: str
    wanted: Wanted
    progress: Progress

    def run(self) -> Tuned:
        unet, wanted = self.pipe.unet, self.wanted
        unet.set_schedule(Uniform(2), wanted.cut)
        self.cut: str = unet.cut
        self.features: tuple[str, ...] = unet._cuts[self.cut]
        self.key = key_of(self.bundle, self.pipe.scheduler, wanted.steps, wanted.guidance)
        self.fit, self.select, self.test = self._sets()
        self._record()
        weights = self._influence()
        reuse = Predictors(self.fit.moments, self.select.moments, kinds=())
        better = Predictors(self.fit.moments, self.select.moments)
        self.progress("search the schedules")
        found = {
            kind: best_of_each(self.calls, _weighted(each, weights), self.ratio, min(wanted.longest, self.calls))
            for kind, each in (("reuse", reuse), ("predict", better))
        }
        budget = self._budget(found["predict"], better)
        chosen = self._choose(found, {"reuse": reuse, "predict": better}, budget)
        tuned = self._again(chosen)
        pareto = self._pareto(found["predict"], better)
        return self._report(tuned, pareto)

    # The images

    def _sets(self) -> tuple[_Set, _Set, _Set]:
        wanted = self.wanted
        select = test = max(1, wanted.samples // 4)
        counts = (wanted.samples - select - test, select, test)
        low, high = wanted.guidance
        sets, seed = [], wanted.seed
        for index, count in enumerate(counts):
            prompts = wanted.prompts[index::3] if len(wanted.prompts) >= 3 else wanted.prompts
            images = []
            for number in range(count):
                share = (number + 0.5) / count
                images.append(Image(prompts[number % len(prompts)], seed, low + share * (high - low)))
                seed += 1
            sets.append(_Set(images))
        return sets[0], sets[1], sets[2]

    def _draw(
        self, image: Image, schedule: Schedule | None, forecast: Forecast | None = None, output: str = "np"
    ) -> Picture:
        self.pipe.unet.set_schedule(schedule, self.cut if schedule else None, forecast)
        made = draw(
            self.pipe,
            image.prompt,
            steps=self.wanted.steps,
            guidance=image.guidance,
            seed=image.seed,
            size=self.wanted.size,
            output=output,
        )
        return made.images[0] if output == "np" else made.images

    def _record(self) -> None:
        """Uncached images, their features, and the times of the engine's calls."""
        recorder = Recorder(self.pipe.unet, self.features, self.wanted.positions, self.wanted.seed)
        total, done = self.wanted.samples, 0
        full: list[float] = []
        self.progress("draw uncached images")
        for each in (self.fit, self.select, self.test):
            for image in each.images:
                self.progress(f"  {done + 1} of {total}")
                with recorder.watch():
                    each.pictures.append(self._draw(image, None))
                if each is not self.test:
                    each.moments = each.moments or recorder.empty()
                    recorder.add_to(each.moments)
                full += self.pipe.unet.last_run.seconds
                done += 1
        self.calls = len(self.pipe.unet.last_run.full)
        if self.calls != self.key.calls:
            raise UserError(
                f"{type(self.pipe).__name__} calls its UNet {self.calls} times in {self.wanted.steps} steps, not "
                f"{self.key.calls} times as its scheduler says: this pipeline cannot be tuned"
            )
        self._draw(self.select.images[0], Uniform(2))
        run = self.pipe.unet.last_run
        shallow = [seconds for seconds, whole in zip(run.seconds, run.full, strict=True) if not whole]
        self.full_seconds = statistics.median(full)
        self.ratio = statistics.median(shallow) / self.full_seconds

    def _influence(self) -> Array:
        """How far an error of the feature, relative to its size, moves the final latent at each call.

        Measured at a few calls: there alone the feature of the call before is reused. The others are interpolated.
        """
        self.progress("measure each call's influence on the image")
        calls = sorted(
            {round(place) for place in np.linspace(1, self.calls - 1, min(self.wanted.probes, self.calls - 1))}
        )
        images = self.select.images[:2]
        errors = Predictors(self.fit.moments, self.select.moments, kinds=())
        moved = np.zeros(len(calls))
        for number, image in enumerate(images):
            whole = self._draw(image, None, output="latent").float()
            for index, call in enumerate(calls):
                self.progress(f"  call {call}, image {number + 1} of {len(images)}")
                schedule = Steps([other for other in range(self.calls) if other != call])
                latent = self._draw(image, schedule, output="latent").float()
                moved[index] += float((latent - whole).norm() / whole.norm()) / len(images)
        missed = [math.sqrt(float(errors.reuse_errors(call - 1, call + 1)[0])) for call in calls]
        influence = np.maximum(moved, 1e-9) / np.maximum(missed, 1e-9)
        return np.exp(np.interp(np.arange(self.calls), calls, np.log(influence)))

    # The choice

    def _budget(self, found: Sequence[Found], predictors: Predictors) -> float:
        """The target as full calls' time."""
        target = self.wanted.target
        if target.speed_up is not None:
            return self.calls / target.speed_up
        if target.seconds is not None:
            import time

            began = time.perf_counter()
            self._draw(self.select.images[0], None)
            rest = time.perf_counter() - began - sum(self.pipe.unet.last_run.seconds)
            budget = float(target.seconds - rest) / self.full_seconds
            least = rest + found[0].cost * self.full_seconds
            if budget < found[0].cost:
                raise UserError(
                    f"an image takes {least:.2f} s with the fewest full calls here ({rest:.2f} s outside the UNet), "
                    f"more than {target.seconds:g} s: give at least that, or fewer steps"
                )
            return budget
        assert target.psnr is not None
        self.progress(f"find the fastest schedule that reaches {target.psnr:g} dB")
        low, high = 0, len(found) - 1  # the last has no shallow call
        while low < high:
            middle = (low + high) // 2
            self.progress(f"  {len(found[middle].full)} full calls")
            if self._psnr(self._predicting(found[middle], predictors), self.select)[0] >= target.psnr:
                high = middle
            else:
                low = middle + 1
        return found[low].cost

    def _choose(
        self, found: Mapping[str, Sequence[Found]], predictors: Mapping[str, Predictors], budget: float
    ) -> Tuned:
        """Of the best schedule with predictions and the best with reuse the one with the better images."""
        self.progress("compare predictions with reuse")
        tried = [self._predicting(within(found[kind], budget), predictors[kind]) for kind in found]
        return max(tried, key=lambda each: self._psnr(each, self.select)[0])

    def _predicting(self, found: Found, predictors: Predictors) -> Tuned:
        """A schedule with the best prediction for each of its shallow calls."""
        kinds, coefficients = [], {}
        for call in range(self.calls):
            if call in found.full:
                kinds.append("full")
                continue
            earlier = [each for each in found.full if each < call]
            best = predictors.best(call, earlier[-1], earlier[-2] if len(earlier) > 1 else None)
            kinds.append(best.kind)
            if best.coefficients is not None:
                coefficients[call] = dict(best.coefficients)
        return self._tuned(found.full, tuple(kinds), coefficients)

    def _again(self, tuned: Tuned) -> Tuned:
        """Fit once more, on the cached trajectory: errors feed back, and features there are others."""
        if not tuned.coefficients:
            return tuned
        self.progress("fit again on cached images")
        recorder = Recorder(self.pipe.unet, self.features, self.wanted.positions, self.wanted.seed)
        moments: list[dict[str, Moments]] = []
        for each in (self.fit, self.select):
            sums: dict[str, Moments] = {}
            for number, image in enumerate(each.images):
                self.progress(f"  {number + 1} of {len(each.images)}")
                with recorder.watch():
                    self._draw(image, tuned.schedule, tuned.forecast, output="latent")
                sums = sums or recorder.empty()
                recorder.add_to(sums)
            moments.append(sums)
        full = tuned.document.full
        again = self._predicting(Found(full, 0.0, 0.0), Predictors(moments[0], moments[1]))
        return max((tuned, again), key=lambda each: self._psnr(each, self.select)[0])

    def _pareto(self, found: Sequence[Found], predictors: Predictors) -> list[Measured]:
        """So many schedules, from the fewest full calls to the most, on the selecting images."""
        count = min(self.wanted.pareto, len(found) - 1)
        if count == 0:
            return []
        self.progress("measure the Pareto front")
        places = sorted({round(place) for place in np.geomspace(1, len(found) - 1, count)})
        rows = []
        for place in places:
            each = found[place - 1]
            self.progress(f"  {len(each.full)} full calls")
            tuned = self._predicting(each, predictors)
            rows.append(self._measured("tuned", tuned.schedule, tuned.forecast, self.select))
        return rows

    # What it is worth

    def _report(self, tuned: Tuned, pareto: Sequence[Measured]) -> Tuned:
        self.progress("draw the test images")
        count = len(tuned.document.full)
        interval = max(2, math.ceil(self.calls / count))
        rows = [self._measured("tuned", tuned.schedule, tuned.forecast, self.test)]
        rows.append(self._measured("tuned schedule, features reused", tuned.schedule, None, self.test))
        for label, schedule in (
            ("CacheQuant's schedule", Steps(cachequant(self.calls, interval, self._differences))),
            (f"every {interval}th call full", Uniform(interval)),
            (f"every {interval}th call full, 2 to warm up", Uniform(interval, warmup=2)),
        ):
            rows.append(self._measured(label, schedule, None, self.test))
        rows.append(self._fewer_steps(rows[0]))
        document = tuned.document.model_copy(update={"measured": tuple(rows), "pareto": tuple(pareto)})
        return replace(tuned, document=document)

    def _fewer_steps(self, ours: Measured) -> Measured:
        """Uncached with as many steps as take the same time."""
        cost = self.calls / ours.speed_up
        steps = max(1, round(cost * self.wanted.steps / self.calls))
        less = replace(self, wanted=replace(self.wanted, steps=max(4, steps)))
        psnrs = [
            _psnr(less._draw(image, None), whole)
            for image, whole in zip(self.test.images, self.test.pictures, strict=True)
        ]
        calls = len(self.pipe.unet.last_run.full)
        return Measured(
            name=f"uncached, {less.wanted.steps} steps",
            full_calls=calls,
            shallow_calls=0,
            speed_up=self.calls / calls,
            psnr=statistics.fmean(psnrs),
            worst=min(psnrs),
        )

    def _differences(self, begin: int, end: int) -> float:
        """CacheQuant's D: how far the features from ``begin`` to ``end`` - 1 are from that of ``begin``.

        Its norm is the L1; the moments have the L2, whose square root is taken call by call.
        """
        if end - begin < 2:
            return 0.0
        total = torch.zeros(end - begin - 1, dtype=torch.float64)
        for each in self.fit.moments.values():
            total += each.errors(range(begin + 1, end), begin, begin, Coefficients())
        return float(total.sqrt().sum())

    def _measured(self, name: str, schedule: Schedule, forecast: Forecast | None, on: _Set) -> Measured:
        psnr, worst = self._psnr((schedule, forecast), on)
        full = sum(self.pipe.unet.last_run.full)
        cost = full + self.ratio * (self.calls - full)
        return Measured(
            name=name,
            full_calls=full,
            shallow_calls=self.calls - full,
            speed_up=self.calls / cost,
            psnr=psnr,
            worst=worst,
        )

    def _psnr(self, by: Tuned | tuple[Schedule, Forecast | None], on: _Set) -> tuple[float, float]:
        """Mean and least PSNR to the uncached images, in dB."""
        schedule, forecast = (by.schedule, by.forecast) if isinstance(by, Tuned) else by
        found = [
            _psnr(self._draw(image, schedule, forecast), whole)
            for image, whole in zip(on.images, on.pictures, strict=True)
        ]
        return statistics.fmean(found), min(found)

    def _tuned(
        self, full: tuple[int, ...], kinds: tuple[str, ...], coefficients: Mapping[int, Mapping[str, Coefficients]]
    ) -> Tuned:
        document = Document(
            key=self.key,
            cut=self.cut,
            full=full,
            predictors=kinds,
            engine=self.pipe.unet.engine,
            shallow_over_full=self.ratio,
            samples={name: len(getattr(self, name).images) for name in ("fit", "select", "test")},
            measured=(),
        )
        return Tuned(self.name, document, coefficients)


def _weighted(predictors: Predictors, weights: Array) -> Callable[[int, int | None, int], Array]:
    """A segment's errors as the search takes them: root mean squares, weighted by their calls' influence."""

    def errors(last: int, before: int | None, until: int) -> Array:
        missed = predictors.errors(last, before, until).sqrt().numpy()
        return np.asarray(missed * weights[last + 1 : until])

    return errors


_BEST = 100.0
"""dB, where two images are the same."""


def _psnr(one: Picture, other: Picture) -> float:
    error = float(np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2))
    return _BEST if error == 0 else min(_BEST, -10 * math.log10(error))
