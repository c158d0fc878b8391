"""What a UNet of engines is to a pipeline: arguments, schedule and generations, whoever runs the engines."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import CutError, InternalError, ScheduleError, UserError
from ..exporter.cut import canonical_name
from ..exporter.families import family_of
from ..exporter.ip_adapter import CONFIG_KEY, IMAGE_EMBEDS
from ..exporter.residuals import flatten
from ..exporter.specs import Shape, TensorSpec, solve
from ..exporter.trace.export import SAMPLE
from .bound import Shapes
from .generation.advice import against_caching
from .generation.correction import CorrectionState
from .generation.forecast import Forecast
from .generation.schedule import SKIP, Schedule
from .generation.state import Calls, GenerationState, Guided, Run
from .inputs import conditioning_by_name, engine_inputs, refuse_unsupported, timestep_shape, timestep_value
from .ip_adapter import BuiltInIPAdapters
from .model import EngineModel, output_class

logger = logging.getLogger(__name__)

IN_USE = "two threads use this UNet at once: open one for each with offcut.UNet.load"


class BaseUNet(EngineModel):
    """Stands in for a diffusers UNet of ``exporter.families.FAMILIES`` in any pipeline.

    A subclass runs the engines: ``UNet`` its own, ``batching``'s requests those that they share. One thread at a time.

    Args:
        config: the UNet's config as diffusers wrote it, with ``_class_name``.
        device: where the engines run, with an index if it is a GPU.
        inputs: the full graph's.
        cuts: each cut's name with its cached features, the default first.
        engine: the engine's name.
        attention: the kind that the UNet was exported with, None for its own.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        inputs: Mapping[str, TensorSpec],
        cuts: Mapping[str, tuple[str, ...]],
        engine: str,
        attention: str | None = None,
    ) -> None:
        super().__init__(config, device, inputs[SAMPLE].torch_dtype(), attention)
        self.advise = True
        """Whether to say, once, that caching is unlikely to pay in the generation that was announced."""
        self.ip_adapters: BuiltInIPAdapters | None = None
        """The IP-Adapters that are built into the engines."""
        self.encoder_hid_proj = None
        if self.config.get(CONFIG_KEY):
            self.ip_adapters = BuiltInIPAdapters(self.config, self._device, self._dtype)
            self.encoder_hid_proj = self.ip_adapters.projections
            self.__dict__.update(self.ip_adapters.blocks(self.config))
        if not {"time_ids", "added_time_ids"}.isdisjoint(inputs):
            # The pipelines of SDXL and Stable Video Diffusion check the size of their conditioning against this.
            width = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

        self._specs, self._cuts, self._engine = inputs, cuts, engine
        self._family = family_of(self.config)
        self._output_class = output_class(self._family)
        self._schedule: Schedule | None = None
        self._cut: str | None = None
        self._used: tuple[str, ...] = ()  # the cuts of the schedule's shallow calls
        self._forecast: Forecast | None = None
        self._reuse_guidance = False
        self._announced: GenerationState | None = None
        self._announced_by: int | None = None
        self._unannounced: GenerationState | None = None
        self._latest: GenerationState | None = None
        self._answers: tuple[GenerationState, CorrectionState] | None = None
        self._held: tuple[GenerationState, torch.Tensor] | None = (
            None  # the last answer, where calls may skip the engines
        )
        self._busy = threading.Lock()
        self._in_use = IN_USE

    @abstractmethod
    def _call(self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float) -> torch.Tensor:
        """One call of the engines: the noise prediction in the sample's dtype and in memory of its own."""

    def _generation_ended(self) -> None:
        """An announced generation is over, whether it succeeded or not."""

    # The schedule

    @property
    def schedule(self) -> Schedule | None:
        """None where every call is full."""
        return self._schedule

    @property
    def cut(self) -> str | None:
        """The cut of shallow calls to which the schedule gives none of their own; None where every call is full."""
        return self._cut

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts that ``set_schedule`` takes, the default first."""
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
    def forecast(self) -> Forecast | None:
        """How shallow calls predict the cached features; None where they reuse them."""
        return self._forecast

    @property
    def reuse_guidance(self) -> bool:
        """Whether shallow calls compute half of a guided batch."""
        return self._reuse_guidance

    def set_schedule(
        self,
        schedule: Schedule | None,
        cut: str | None = None,
        forecast: Forecast | None = None,
        *,
        reuse_guidance: bool = False,
    ) -> None:
        """Choose which calls are shallow, and where the UNet is cut for them, from the next generation on.

        Shallow calls cost image quality: the more of them and the further out the cut, the more.

        Args:
            schedule: None makes every call full, which costs none.
            cut: one of ``cuts``, in any convention, or ``"skip"`` to run no engine at all; None for the first. A
                schedule may give calls a cut of their own, which goes before this one.
            forecast: predicts the cached features of the shallow calls; None reuses them.
            reuse_guidance: compute only the half with the prompt on shallow calls, and take the difference to the other
                from the last full call; where the pipeline guides, and generations are announced.

        Raises:
            CutError: there is no such cut, or none that the schedule gives its calls.
            ScheduleError: a generation is under way; or the schedule decides as it goes, from what an engine computes,
                and none is to run.
        """
        if self._announced is not None:
            raise ScheduleError("the schedule cannot change during a generation: set it before the pipeline is called")
        if schedule is not None:
            there = ", ".join(self._cuts) or "none"
            if cut is None and not self._cuts:
                raise CutError("this bundle was built without a cut, so it has no shallow graph: build it with --cut")
            name = next(iter(self._cuts)) if cut is None else canonical_name(cut)
            if name not in self._cuts and name != SKIP:
                raise CutError(f"this UNet was not built with the cut {cut!r}; it has {there}")
            used = tuple(dict.fromkeys(name if each is None else each for each in schedule.cuts))
            if schedule.adaptive and SKIP in used:
                raise ScheduleError(
                    f"{schedule!r} decides from what its shallow calls compute, and with the cut {SKIP!r} they compute "
                    "nothing: give a cut of the UNet"
                )
            missing = [each for each in used if each not in self._cuts and each != SKIP]
            if missing:
                raise CutError(f"this schedule has calls at the cut {missing[0]!r}, and this UNet has only {there}")
        self._schedule, self._cut = schedule, name if schedule is not None else None
        self._used = used if schedule is not None else ()
        self._forecast = forecast if schedule is not None else None
        self._reuse_guidance = reuse_guidance and schedule is not None
        self._unannounced = self._held = None

    @property
    def _features(self) -> tuple[str, ...]:
        """The names of the cached features that the schedule's shallow calls read, each once."""
        return tuple(dict.fromkeys(name for cut in self._used for name in self._cuts.get(cut, ())))

    # Generations

    @contextmanager
    def generation(
        self, calls: Calls = None, scheduler: object = None, guided: Guided = False
    ) -> Iterator[GenerationState]:
        """Announce that the UNet calls in this block, all from this thread, make one generation.

        Args:
            calls: how many there will be, or a function to ask at the first one; None if nobody knows, which only a
                schedule that needs no number can do with. Calls beyond the number are full.
            scheduler: that moves the latents along; only for advice, see ``advice``.
            guided: whether each call asks about the same latents twice, without the prompt and with it, or a function
                to ask at the first one; for ``reuse_guidance``.

        Raises:
            ScheduleError: the schedule needs the number of calls.
            UserError: another generation is under way.
        """
        begun = GenerationState(self._schedule, self._cut, self._advised(calls, scheduler), guided)
        with self._exclusively():
            if self._announced is not None:
                raise UserError(
                    "this UNet is already in a generation: make one pipeline call at a time, with no unet.generation() "
                    "around a pipeline of offcut.load or offcut.attach; for another thread, open another UNet"
                )
            self._announced, self._announced_by, self._unannounced = begun, threading.get_ident(), None
        try:
            yield begun
        finally:
            self._generation_ended()
            self._announced = self._announced_by = None

    def _advised(self, calls: Calls, scheduler: object) -> Calls:
        """The same number of calls; once it is known, the user is told if caching is unlikely to pay in so many."""
        if calls is None:
            return None

        def known() -> int:
            count = calls if isinstance(calls, int) else calls()
            advice = self._advice(count, scheduler) if self.advise else None
            if advice is not None:
                logger.warning(advice)
                self.advise = False
            return count

        return known() if isinstance(calls, int) else known

    def _advice(self, calls: int, scheduler: object) -> str | None:
        """What to tell the user of a generation of so many calls."""
        return against_caching(self._schedule, calls, self.config, scheduler)

    def reset(self) -> None:
        """Make the next call full, and, where nobody announces generations, the first of a new one."""
        self._unannounced = None
        if self._announced is not None:
            self._announced.invalidate()

    _reset_stateful_cache = reset  # diffusers calls this at the end of a pipeline call

    @property
    def next_is_full(self) -> bool:
        """Whether the call that comes next, at the last call's shapes, runs the full graph.

        For what computes inputs of the UNet that a shallow call hardly reads; see ``controlnet``. True where no
        generation was announced.
        """
        return self._announced is None or self._announced.next_is_full

    @property
    def last_run(self) -> Run | None:
        """What the latest generation did, call by call; None before the first."""
        return None if self._latest is None else self._latest.run()

    # The call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        added_time_ids: torch.Tensor | None = None,
    ) -> Any:
        """One call of the UNet; parameters are as in diffusers.

        Args:
            sample: [batch, channels, height, width], the noisy latent. Of a video [batch, channels, frames, height,
                width], for Stable Video Diffusion [batch, frames, channels, height, width].
            timestep: a number, or a tensor [], [1] or [batch].
            encoder_hidden_states: [batch, sequence, width]; for AnimateDiff [batch * frames, sequence, width].
            class_labels: [batch].
            timestep_cond: [batch, width].
            added_cond_kwargs: for SDXL ``text_embeds`` [batch, width] and ``time_ids`` [batch, 6]; for IP-Adapters
                ``image_embeds``, a list with [batch, images, width] for each, or [batch, images, tokens, width].
            down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals: of a
                ControlNet or T2I-Adapter, for a bundle that was built with their inputs. None counts as zero.
            return_dict: whether to return diffusers' output object or a tuple.
            added_time_ids: [batch, 3], of Stable Video Diffusion.

        Returns:
            The noise prediction (or what else the model predicts), in the sample's layout and dtype, in memory of its
            own.

        Raises:
            ShapeError: shapes that the engines were not built for.
            UserError: an input that they do not have, or that only an eager UNet can use.
        """
        self.check_attention(sample.shape[0])
        refuse_unsupported(
            sample,
            cross_attention_kwargs,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
        )
        residuals = {
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
        }
        given = {
            "sample": sample,
            "timestep_cond": timestep_cond,
            "added_time_ids": added_time_ids,
            **conditioning_by_name(self._family.positions, encoder_hidden_states, class_labels),
            **(added_cond_kwargs or {}),
            **flatten(residuals),
        }
        if self.ip_adapters is not None:
            given |= self.ip_adapters.inputs(added_cond_kwargs or {}) | {IMAGE_EMBEDS: None}
        tensors = engine_inputs(given, self._specs, self._device)
        with self._exclusively(), torch.no_grad():
            noise_pred = self._call(tensors, timestep)
            if SKIP in self._used and self._latest is not None:
                self._held = self._latest, noise_pred.clone()
            noise_pred = self._corrected(tensors[SAMPLE], noise_pred)
        return self._output_class(sample=noise_pred) if return_dict else (noise_pred,)

    def _shapes(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Shape], list[str]]:
        """The shape of every input of the engines for these tensors, and the residuals that nobody passed."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        shapes["timestep"] = timestep_shape(self._specs, tensors[SAMPLE].shape[0])
        silent = [name for name in self._specs if name not in shapes]
        if silent:
            dims = solve({SAMPLE: self._specs[SAMPLE]}, {SAMPLE: shapes[SAMPLE]})
            shapes |= {name: self._specs[name].resolve(dims) for name in silent}
        return shapes, silent

    def _begin(self, shapes: Shapes, timestep: torch.Tensor | float) -> tuple[GenerationState, bool]:
        """The generation that this call belongs to, and whether the call is full."""
        thread = threading.get_ident()
        if self._announced is not None:
            if thread != self._announced_by:
                raise UserError("another thread is in a generation with this UNet: open another one for each thread")
            self._latest = self._announced
            return self._announced, self._announced.begin(shapes)
        place = (thread, shapes)  # another thread's features are another image's
        value = timestep_value(timestep)
        if self._unannounced is None or not self._unannounced.continues(place, value):
            self._unannounced = GenerationState(self._schedule, self._cut)
        self._latest = self._unannounced
        return self._unannounced, self._unannounced.begin(place, value)

    def _skipped(self, generation: GenerationState) -> torch.Tensor:
        """The answer of a call that runs no engine, in memory of its own: the one before, as the engines gave it."""
        if self._held is None or self._held[0] is not generation:
            raise InternalError("a call was to repeat an answer of its generation, and there is none")
        return self._held[1].clone()

    def _corrected(self, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """A call's answer as the forecast corrects it, in announced generations."""
        generation, correction = self._announced, None if self._forecast is None else self._forecast.correction
        if generation is None or correction is None:
            return noise_pred
        if self._answers is None or self._answers[0] is not generation:
            self._answers = (generation, correction.begin())
        return self._answers[1].correct(generation.last_was_full, sample, noise_pred)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise UserError(self._in_use)
        try:
            yield
        finally:
            self._busy.release()

    # IP-Adapters

    @property
    def attn_processors(self) -> Mapping[str, Any]:
        """Those of IP-Adapters, which hold their scales; no other could be replaced."""
        return super().attn_processors if self.ip_adapters is None else self.ip_adapters.processors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing but the names of the layers with IP-Adapters, where diffusers looks blocks up that get a scale."""
        return {name: torch.empty(0) for name in self.attn_processors}

    @property
    def engine(self) -> str:
        """The engine's name, e.g. ``"onnxruntime"``."""
        return self._engine

    def extra_repr(self) -> str:
        schedule = f", {self._schedule!r}, cut={self._cut!r}" if self._schedule is not None else ""
        return f"{self._engine} on {self._device}, {self._dtype}{schedule}"
