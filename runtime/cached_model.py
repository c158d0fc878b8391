"""``CachedModel``: a model whose calls follow a schedule: its settings, its generations, and what each call is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CutError, ScheduleError, UserError
from ..exporter.cut import canonical_name
from ..exporter.specs import TensorSpec
from ..exporter.trace.export import SAMPLE
from .bound import Shapes
from .generation.advice import caching_advice, exceeded_advice, trajectory_advice
from .generation.features import CachedFeatures
from .generation.forecast import Forecast
from .generation.guidance import GuidanceReuse
from .generation.schedule import SKIP, Schedule
from .generation.state import Calls, GenerationState, Guided, Run
from .generation.steps import read_once
from .generation.trajectory import Call
from .model import EngineModel

logger = logging.getLogger(__name__)

IN_USE = "two threads use this UNet at once: open one for each with offcut.UNet.load"


@dataclass(frozen=True)
class CachingSettings:
    """Caching settings of a UNet, resolved by ``BaseUNet.set_schedule``; by default every call is full.

    Attributes:
        schedule: schedule of the full calls; None makes every call full.
        cut: cut of the shallow calls for which the schedule names no cut.
        cuts: distinct cuts of the shallow calls; with ``SKIP`` if some calls run no engine.
        features: distinct names of the cached features that shallow calls read.
        forecast: prediction of the features; None reuses the features.
        reuse_guidance: whether shallow calls compute half of a guided batch.
    """

    schedule: Schedule | None = None
    cut: str | None = None
    cuts: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    forecast: Forecast | None = None
    reuse_guidance: bool = False


class CachedModel(EngineModel):
    """Model whose calls are full, shallow or skipped, as a schedule says.

    Attributes:
        advise: whether to log a warning, once, if caching is unlikely to pay off in an announced generation.

    Args:
        config: the model's config as diffusers wrote it, with ``_class_name``.
        device: device of the engines, with an index if it is a GPU.
        inputs: inputs of the full graph by name.
        cuts: names of the cached features by cut; the first cut is the default.
        attention: attention that the model was exported with; None for the model's own.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device,
        inputs: Mapping[str, TensorSpec],
        cuts: Mapping[str, tuple[str, ...]],
        attention: str | None = None,
    ) -> None:
        super().__init__(config, device, inputs[SAMPLE].torch_dtype(), attention)
        self.advise = True
        self._specs, self._cuts = inputs, cuts
        self._caching = CachingSettings()
        self._announced: GenerationState | None = None
        self._announced_by: int | None = None  # id of the thread that announced the generation
        self._unannounced: GenerationState | None = None
        self._unannounced_by: int | None = None
        self._latest: GenerationState | None = None
        self._trajectory_key: Hashable = None
        self._warned_of_trajectories = False
        self._busy = threading.Lock()
        self._in_use = IN_USE

    # The schedule

    @property
    def schedule(self) -> Schedule | None:
        """Schedule of the full calls; None where every call is full."""
        return self._caching.schedule

    @property
    def cut(self) -> str | None:
        """Cut of the shallow calls for which the schedule names no cut; None where every call is full."""
        return self._caching.cut

    @property
    def cuts(self) -> tuple[str, ...]:
        """Cuts that ``set_schedule`` accepts, the default first."""
        return tuple(self._cuts)

    @property
    def cut_features(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the cached features that each cut's shallow graph reads; the default cut is first."""
        return self._cuts

    @property
    def input_specs(self) -> Mapping[str, TensorSpec]:
        """Inputs of the full graph by name."""
        return self._specs

    @property
    def built_attention(self) -> str | None:
        """Attention that the UNet was exported with, e.g. ``"cross-frame"``; None for the model's own."""
        return self._built_attention

    @property
    def scheduled_cuts(self) -> tuple[str, ...]:
        """Distinct cuts of the shallow calls; with ``"skip"`` if some calls run no engine."""
        return self._caching.cuts

    @property
    def scheduled_features(self) -> tuple[str, ...]:
        """Distinct names of the cached features that the schedule's shallow calls read."""
        return self._caching.features

    @property
    def forecast(self) -> Forecast | None:
        """Prediction of the cached features on shallow calls; None where shallow calls reuse the features."""
        return self._caching.forecast

    @property
    def reuse_guidance(self) -> bool:
        """Whether shallow calls compute half of a guided batch."""
        return self._caching.reuse_guidance

    def set_schedule(
        self,
        schedule: Schedule | None,
        cut: str | None = None,
        forecast: Forecast | None = None,
        *,
        reuse_guidance: bool = False,
    ) -> None:
        """Choose which calls are shallow, and at which cut, from the next generation on.

        Shallow calls cost image quality. More shallow calls cost more, and so does a cut further out.

        Args:
            schedule: schedule of the full calls; None makes every call full, at no loss of quality.
            cut: one of ``cuts``, under any of its names, or ``"skip"`` to run no engine on the calls that are not full;
                None for the first. A cut that the schedule names for a call takes precedence.
            forecast: prediction of the cached features on shallow calls; None reuses the features.
            reuse_guidance: on shallow calls, compute only the half of the batch with the prompt, and reuse the
                difference of the two halves from the last full call. This has an effect if the pipeline uses
                classifier-free guidance and announces its generations.

        Raises:
            CutError: the UNet was not built with this cut, or with a cut that the schedule uses.
            ScheduleError: a generation is under way; or ``reuse_guidance`` with engines of a fixed batch size.
        """
        if self._announced is not None:
            raise ScheduleError("the schedule cannot change during a generation: set it before the pipeline is called")
        reuse_guidance = reuse_guidance and schedule is not None
        if reuse_guidance and isinstance(self._specs[SAMPLE].shape[0], int):
            raise ScheduleError(
                f"reuse_guidance makes calls of half the batch, and these engines take {self._specs[SAMPLE].shape[0]} "
                "rows only: build the bundle with a batch size that may vary"
            )
        if cut is not None:
            self._own_name(cut)  # raises for a cut that is not used either
        settings = CachingSettings() if schedule is None else self._settings(schedule, cut, forecast)
        self._caching = replace(settings, reuse_guidance=reuse_guidance)
        self._end_unannounced()

    def _own_name(self, cut: str) -> str:
        """Return this UNet's own name for a cut.

        Raises:
            CutError: the UNet was not built with this cut.
        """
        name = canonical_name(cut)
        if name not in self._cuts and name != SKIP:
            raise CutError(f"this UNet was not built with the cut {cut!r}; it has {', '.join(self._cuts) or 'none'}")
        return name

    def _settings(self, schedule: Schedule, cut: str | None, forecast: Forecast | None) -> CachingSettings:
        """Return the settings for a schedule, after checking that the UNet has its cuts."""
        known = ", ".join(self._cuts) or "none"
        if cut is None and not self._cuts:
            raise CutError("this bundle was built without a cut, so it has no shallow graph: build it with --cut")
        default = next(iter(self._cuts)) if cut is None else self._own_name(cut)
        cuts = tuple(dict.fromkeys(default if name is None else name for name in schedule.cuts))
        if missing := [name for name in cuts if name not in self._cuts and name != SKIP]:
            raise CutError(f"this schedule has calls at the cut {missing[0]!r}, and this UNet has only {known}")
        features = tuple(dict.fromkeys(feature for name in cuts for feature in self._cuts.get(name, ())))
        return CachingSettings(schedule, default, cuts, features, forecast)

    # Generations

    @contextmanager
    def generation(
        self, calls: Calls = None, scheduler: object = None, guided: Guided = False
    ) -> Iterator[GenerationState]:
        """Announce that the UNet calls in this block, all from this thread, form one generation.

        Args:
            calls: number of calls, or a function that returns it at the first call; None if it is unknown, which
                only some schedules allow. Calls beyond the number are full. Where the loop calls the UNet several
                times a step, for several latents or passes, the number of calls of each of them.
            scheduler: the pipeline's scheduler, used only by ``generation.advice``.
            guided: whether each call holds the same latents twice, without the prompt and with it, or a function that
                returns this at the first call. Used by ``reuse_guidance``.

        Raises:
            ScheduleError: the schedule needs the number of calls.
            UserError: another generation is under way.
        """
        state = self._new_state(self._with_advice(calls, scheduler), guided)
        with self._exclusively():
            if self._announced is not None:
                raise UserError(
                    "this UNet is already in a generation: make one pipeline call at a time, with no unet.generation() "
                    "around a pipeline of offcut.load or offcut.attach; for another thread, open another UNet"
                )
            self._end_unannounced()
            self._announced, self._announced_by = state, threading.get_ident()
        try:
            yield state
            state.finish()
            self._warn_of_trajectories(state)
        finally:
            self._generation_ended()
            state.release()
            self._announced = self._announced_by = None

    @contextmanager
    def trajectory(self, key: Hashable) -> Iterator[None]:
        """Say that the UNet calls in this block belong to one latent on its way from noise to image.

        For a loop of your own that denoises several latents, or makes several passes, step by step. Each key has
        cached features and a count of calls of its own. Without keys, calls of one step are told apart by their text
        embeddings and their order, which fails where the order changes:

            for t in scheduler.timesteps:
                for number in random.sample(range(len(tiles)), len(tiles)):
                    with unet.trajectory(number):
                        noise = unet(tiles[number], t, text).sample

        Args:
            key: identifies the latent within the generation; any hashable value except None.

        Raises:
            UserError: the key is None.
        """
        if key is None:
            raise UserError("a trajectory's key is None: give another value, such as the number of the tile")
        before, self._trajectory_key = self._trajectory_key, key
        try:
            yield
        finally:
            self._trajectory_key = before

    def _new_state(
        self,
        calls: Calls = None,
        guided: Guided = False,
        *,
        announced: bool = True,
        previous: GenerationState | None = None,
    ) -> GenerationState:
        settings = self._caching
        return GenerationState(
            settings.schedule,
            settings.cut,
            calls,
            guided,
            forecast=settings.forecast,
            announced=announced,
            previous=previous,
        )

    def _end_unannounced(self) -> None:
        if self._unannounced is not None:
            self._unannounced.finish()
            self._warn_of_trajectories(self._unannounced)
            self._unannounced.release()
        self._unannounced = None

    def _with_advice(self, calls: Calls, scheduler: object) -> Calls:
        """Return the same number of calls; once it is known, log advice if caching is unlikely to pay."""
        if calls is None:
            return None

        def resolve() -> int:
            count = calls if isinstance(calls, int) else calls()
            advice = self._advice(count, scheduler) if self.advise else None
            if advice is not None:
                logger.warning(advice)
                self.advise = False
            return count

        return resolve() if isinstance(calls, int) else resolve

    def _advice(self, calls: int, scheduler: object) -> str | None:
        """Return advice for a generation with this number of calls; None where there is none."""
        return caching_advice(self._caching.schedule, calls, self.config, scheduler)

    def reset(self) -> None:
        """Make the next call full; an unannounced generation ends, and the next call begins a new one."""
        self._end_unannounced()
        if self._announced is not None:
            self._announced.invalidate()

    _reset_stateful_cache = reset  # diffusers calls this at the end of a pipeline call

    def next_is_full(self, timestep: torch.Tensor | float) -> bool:
        """Return whether the next call is surely full, if its shapes are those of the last call.

        For code that computes inputs of the UNet that a shallow call hardly reads; see ``runtime.controlnet``. True
        where no generation was announced, and where the generation has several trajectories.

        Args:
            timestep: timestep of the next call.
        """
        return self._announced is None or self._announced.next_is_full(timestep)

    @property
    def last_run(self) -> Run | None:
        """Record of the latest generation, call by call; None before the first."""
        return None if self._latest is None else self._latest.run()

    # One call

    def _begin(
        self, shapes: Shapes, timestep: torch.Tensor | float, sample: torch.Tensor, conditioning: torch.Tensor | None
    ) -> Call:
        """Begin a call of the present generation."""
        timestep = read_once(timestep)
        state = self._present_state(shapes, timestep, conditioning)
        self._latest = state
        call = state.begin(shapes, timestep, conditioning, self._trajectory_key, self._has_features)
        trajectory = call.trajectory
        if call.number == 0:
            guided = self._caching.reuse_guidance and state.guided
            trajectory.guidance = GuidanceReuse(sample) if guided else None
            correction = None if self._caching.forecast is None else self._caching.forecast.correction
            announced = state is self._announced
            trajectory.correction = correction.begin() if correction is not None and announced else None
        return call

    def _present_state(
        self, shapes: Shapes, timestep: torch.Tensor | float, conditioning: torch.Tensor | None
    ) -> GenerationState:
        """Return the generation that a call belongs to."""
        thread = threading.get_ident()
        if self._announced is not None:
            if thread != self._announced_by:
                raise UserError("another thread is in a generation with this UNet: open another one for each thread")
            return self._announced
        if (
            self._unannounced is None
            or self._unannounced_by != thread  # the features of another thread belong to another image
            or not self._unannounced.continues(shapes, timestep, conditioning, self._trajectory_key)
        ):
            previous = self._unannounced if self._unannounced_by == thread else None
            self._end_unannounced()
            self._unannounced, self._unannounced_by = self._new_state(announced=False, previous=previous), thread
        return self._unannounced

    def _finish(
        self, call: Call, sample: torch.Tensor, output: torch.Tensor, seconds: float | None = None
    ) -> torch.Tensor:
        """Record that a call has completed, and return its output, corrected by the forecast.

        Args:
            sample: [batch, channels, ...], the UNet's input.
            output: [batch, channels, ...], the output before its correction.
            seconds: the engine's time; None where times are not recorded.
        """
        assert self._latest is not None
        trajectory = call.trajectory
        if trajectory.guidance is not None and call.full and trajectory.guidance.applies_to(sample):
            trajectory.guidance.record(output)
        if SKIP in self._caching.cuts:
            trajectory.last_output = output.clone()
        if trajectory.correction is not None:
            output = trajectory.correction.correct(call.full, sample, output)
        self._latest.end(call, seconds)
        self._warn_of_trajectories(self._latest)
        return output

    def _warn_of_trajectories(self, state: GenerationState) -> None:
        """Log a warning, once, if calls of different trajectories may have been mixed up."""
        if self._warned_of_trajectories:
            return
        if state.order_changed is not None:
            logger.warning(trajectory_advice(*state.order_changed))
        elif state.exceeded is not None:
            logger.warning(exceeded_advice(state.exceeded))
        else:
            return
        self._warned_of_trajectories = True

    def _has_features(self, features: CachedFeatures) -> bool:
        """Return whether the features for a shallow call still exist."""
        return not self._caching.features or bool(features.latest)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Hold the UNet in this block; raise a ``UserError`` if it is in use."""
        if not self._busy.acquire(blocking=False):
            raise UserError(self._in_use)
        try:
            yield
        finally:
            self._busy.release()

    def _generation_ended(self) -> None:
        """Clean up after an announced generation, whether it succeeded or not."""
