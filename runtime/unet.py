"""``UNet``: a pair of engines in the place of a diffusers UNet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - see EngineModel.save_pretrained

from ..engines.base import BoundPair, EnginePair, OpenOptions
from ..errors import CutError, EngineError, ScheduleError, UserError
from ..exporter.cut import canonical_name
from ..exporter.families import family_of
from ..exporter.ip_adapter import CONFIG_KEY, IMAGE_EMBEDS
from ..exporter.residuals import argument_of, flatten
from ..exporter.specs import solve
from ..exporter.trace import SAMPLE
from .advice import against_caching
from .bound import BoundPairs, Shapes
from .generation import Calls, Generation, Run
from .inputs import engine_inputs, in_place, refuse_ignored, timestep_shape, timestep_value, write_timestep
from .ip_adapter import ImagePrompts
from .loras import TakesLoras
from .model import EngineModel, output_class
from .ranges import Ranges
from .schedule import Schedule

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..exporter.parameters import StoredWeights

logger = logging.getLogger(__name__)


class UNet(TakesLoras, EngineModel):
    """Stands in for a diffusers UNet of ``exporter.families.FAMILIES`` in any pipeline, and runs a pair of engines.

        pipe.unet = offcut.UNet.load("sd15.offcut")
        pipe.unet.set_schedule(offcut.Uniform(5))

    It has no parameters: the weights are in the engines. Pipelines of ``offcut.load`` and ``offcut.attach`` announce
    each generation; ``generation`` does it for a loop of your own. Without, a new one is told by its timesteps and
    shapes, which reads the timestep on the host at every call.

    One thread at a time; open one UNet for each thread, from the same bundle if you like.

    Args:
        pair: the opened engines, which this object then owns and closes.
        config: the UNet's config as diffusers wrote it, with ``_class_name``.
        attention: the kind that the UNet was exported with, None for its own.
        bound_shapes: for how many sets of input shapes buffers are kept; the one unused for longest goes first.
        stored: gives the weights that the engines were built with, for LoRAs; None if nobody has them.
    """

    def __init__(
        self,
        pair: EnginePair,
        config: Mapping[str, Any],
        *,
        attention: str | None = None,
        bound_shapes: int = 2,
        stored: Callable[[], StoredWeights] | None = None,
    ) -> None:
        super().__init__(config, _with_index(pair.device), pair.inputs["sample"].torch_dtype(), attention)
        self.record_times = False
        """Whether ``last_run`` has seconds. On a GPU this waits for the device at every call."""
        self.advise = True
        """Whether to say, once, that caching is unlikely to pay in the generation that was announced."""
        self.image_prompts: ImagePrompts | None = None
        """The IP-Adapters that are built into the engines."""
        self.encoder_hid_proj = None
        if self.config.get(CONFIG_KEY):
            self.image_prompts = ImagePrompts(self.config, self._device, self._dtype)
            self.encoder_hid_proj = self.image_prompts.projections
            self.__dict__.update(self.image_prompts.blocks(self.config))
        if not {"time_ids", "added_time_ids"}.isdisjoint(pair.inputs):
            # The pipelines of SDXL and Stable Video Diffusion check the size of their conditioning against this.
            width = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

        self._pair: EnginePair | None = pair
        self._specs = pair.inputs
        self._cuts = pair.cuts
        self._noise_pred = next(iter(pair.outputs))
        self._engine = pair.name
        self._family = family_of(self.config)
        self._output_class = output_class(self._family)

        self._loras = {}
        self._stored = stored
        self._bound = BoundPairs(bound_shapes)
        self._heard: WeakKeyDictionary[BoundPair, set[str]] = WeakKeyDictionary()
        self._schedule: Schedule | None = None
        self._cut: str | None = None
        self._announced: Generation | None = None
        self._announced_by: int | None = None
        self._unannounced: Generation | None = None
        self._latest: Generation | None = None
        self._busy = threading.Lock()
        self._ranges = Ranges(self._device)

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        engine: str = "auto",
        *,
        device: str = "cpu",
        precision: str | None = None,
        inference_precision: str | None = None,
        **options: Unpack[OpenOptions],
    ) -> UNet:
        """Open a bundle's engines.

        Args:
            bundle: an opened bundle or its directory.
            engine: a name, or ``"auto"`` for the best of the bundle's that runs here.
            device: as PyTorch spells it.
            precision, inference_precision: choose among several builds of the engine.
            options: ``threads`` of a CPU engine; ``cuda_graphs=False``, ``weight_budget`` in bytes and
                ``runtime_cache``, a directory, of NVIDIA's; ``provider`` of ONNX Runtime's: see
                ``engines.base.EngineOptions``.

        Raises:
            BundleError: the bundle is damaged or is none.
            EngineError: the engine is missing or cannot run here.
        """
        from ..engines.bundle import Bundle

        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        entry = opened.find(engine, device=device, precision=precision, inference_precision=inference_precision)
        pair = opened.pair(entry, device=device, **options)
        attention = opened.manifest.source.attention
        return cls(pair, opened.unet_config, attention=attention, stored=lambda: opened.weights(entry))

    # The schedule

    @property
    def schedule(self) -> Schedule | None:
        """None where every call is full."""
        return self._schedule

    @property
    def cut(self) -> str | None:
        """The cut of the shallow calls; None where every call is full."""
        return self._cut

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts that ``set_schedule`` takes, the default first."""
        return tuple(self._cuts)

    def set_schedule(self, schedule: Schedule | None, cut: str | None = None) -> None:
        """Choose which calls are shallow, and where the UNet is cut for them, from the next generation on.

        Shallow calls cost image quality: the more of them and the further out the cut, the more.

        Args:
            schedule: None makes every call full, which costs none.
            cut: one of ``cuts``, in any convention; None for the first.

        Raises:
            CutError: there is no such cut.
            ScheduleError: a generation is under way.
        """
        if self._announced is not None:
            raise ScheduleError("the schedule cannot change during a generation: set it before the pipeline is called")
        if schedule is not None:
            there = ", ".join(self._cuts) or "none"
            if cut is None and not self._cuts:
                raise CutError("this bundle was built without a cut, so it has no shallow graph: build it with --cut")
            name = next(iter(self._cuts)) if cut is None else canonical_name(cut)
            if name not in self._cuts:
                raise CutError(f"this UNet was not built with the cut {cut!r}; it has {there}")
        self._schedule, self._cut = schedule, name if schedule is not None else None
        self._unannounced = None

    # Generations

    @contextmanager
    def generation(self, calls: Calls = None, scheduler: object = None) -> Iterator[Generation]:
        """Announce that the UNet calls in this block, all from this thread, make one generation.

        Args:
            calls: how many there will be, or a function to ask at the first one; None if nobody knows, which only a
                schedule that needs no number can do with. Calls beyond the number are full.
            scheduler: that moves the latents along; only for advice, see ``advice``.

        Raises:
            ScheduleError: the schedule needs the number of calls.
            UserError: another generation is under way.
        """
        begun = Generation(self._schedule, self._cut, self._advised(calls, scheduler))
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
            self._ranges.end()
            self._announced = self._announced_by = None

    def _advised(self, calls: Calls, scheduler: object) -> Calls:
        """The same number of calls; once it is known, the user is told if caching is unlikely to pay in so many."""
        if calls is None:
            return None

        def known() -> int:
            count = calls if isinstance(calls, int) else calls()
            advice = against_caching(self._schedule, count, self.config, scheduler) if self.advise else None
            if advice is not None:
                logger.warning(advice)
                self.advise = False
            return count

        return known() if isinstance(calls, int) else known

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
    def bound(self) -> BoundPair | None:
        """The engines bound to the buffers of the last call, for measuring them alone; None before the first call."""
        return next(reversed(self._bound.values()), None)

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
        refuse_ignored(
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
            **in_place(self._family.positions, encoder_hidden_states, class_labels),
            **(added_cond_kwargs or {}),
            **flatten(residuals),
        }
        if self.image_prompts is not None:
            given |= self.image_prompts.inputs(added_cond_kwargs or {}) | {IMAGE_EMBEDS: None}
        tensors = engine_inputs(given, self._specs, self._device)
        with self._exclusively(), torch.no_grad():
            noise_pred = self._call(tensors, timestep)
        return self._output_class(sample=noise_pred) if return_dict else (noise_pred,)

    def _call(self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float) -> torch.Tensor:
        batch = tensors["sample"].shape[0]
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        shapes["timestep"] = timestep_shape(self._specs, batch)
        silent = [name for name in self._specs if name not in shapes]  # residuals that nobody passed
        if silent:
            dims = solve({SAMPLE: self._specs[SAMPLE]}, {SAMPLE: shapes[SAMPLE]})
            shapes |= {name: self._specs[name].resolve(dims) for name in silent}
        if self._family.is_video and tuple(shapes.items()) not in self._bound:
            self._family.check_limits(self.config, solve(self._specs, shapes))
        bound = self._bound.at(self._opened(), shapes)
        for name, tensor in tensors.items():
            bound.buffers[name].copy_(tensor)
        self._silence(bound, tensors, silent)
        write_timestep(bound.buffers["timestep"], timestep)

        generation, full = self._begin(tuple(shapes.items()), timestep)
        with self._ranges.call(full, more=generation is self._announced):
            seconds = self._run(bound, full)
        generation.end(full, seconds)
        # Schedulers keep it: PNDM without guidance would see its history overwritten.
        return bound.buffers[self._noise_pred].to(tensors["sample"].dtype, copy=True)

    def _silence(self, bound: BoundPair, passed: Iterable[str], silent: Iterable[str]) -> None:
        """Zero the residuals that an earlier call passed and this one does not; new buffers are zero."""
        heard = self._heard.setdefault(bound, set())
        for name in heard.intersection(silent):
            bound.buffers[name].zero_()
        heard.difference_update(silent)
        heard.update(name for name in passed if argument_of(name) is not None)

    def _begin(self, shapes: Shapes, timestep: torch.Tensor | float) -> tuple[Generation, bool]:
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
            self._unannounced = Generation(self._schedule, self._cut)
        self._latest = self._unannounced
        return self._unannounced, self._unannounced.begin(place, value)

    def _run(self, bound: BoundPair, full: bool) -> float | None:
        if not self.record_times:
            self._enqueue(bound, full)
            return None
        self._wait()
        begin = time.perf_counter()
        self._enqueue(bound, full)
        self._wait()
        return time.perf_counter() - begin

    def _enqueue(self, bound: BoundPair, full: bool) -> None:
        if full:
            bound.full()
        else:
            assert self._cut is not None
            bound.shallow(self._cut)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _opened(self) -> EnginePair:
        if self._pair is None:
            raise EngineError("this UNet was closed: open it again with offcut.UNet.load")
        return self._pair

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise UserError("two threads use this UNet at once: open one for each with offcut.UNet.load")
        try:
            yield
        finally:
            self._busy.release()

    # IP-Adapters

    @property
    def attn_processors(self) -> Mapping[str, Any]:
        """Those of IP-Adapters, which hold their scales; no other could be replaced."""
        return super().attn_processors if self.image_prompts is None else self.image_prompts.processors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing but the names of the layers with IP-Adapters, where diffusers looks blocks up that get a scale."""
        return {name: torch.empty(0) for name in self.attn_processors}

    # The engines

    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self._announced is not None:
            raise UserError("LoRAs cannot change during a generation: load them before the pipeline is called")
        with self._exclusively():
            self._opened().refit(weights)
            self._bound.close()
        self._unannounced = None

    @property
    def engine(self) -> str:
        """The engine's name, e.g. ``"onnxruntime"``."""
        return self._engine

    def close(self) -> None:
        """Give back the engines and their memory."""
        with self._exclusively():
            self._bound.close()
            if self._pair is not None:
                self._pair.close()
            self._pair = None

    def extra_repr(self) -> str:
        schedule = f", {self._schedule!r}, cut={self._cut!r}" if self._schedule is not None else ""
        return f"{self._engine} on {self._device}, {self._dtype}{schedule}"


def _with_index(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:0``, which is what tensors say of themselves."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
