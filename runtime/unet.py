"""``UNet``: a pair of engines in place of a diffusers UNet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - see EngineModel.save_pretrained

from ..engines.base import BoundPair, EnginePair, OpenOptions
from ..errors import EngineError, UserError
from ..exporter.residuals import argument_of
from ..exporter.specs import TensorSpec, solve
from ..exporter.trace.export import SAMPLE
from .base_unet import IN_USE, BaseUNet
from .bound import BoundPairs
from .generation.advice import lora_advice
from .generation.feature_drift import FeatureDriftEstimator
from .generation.forecast import FeatureHistory
from .generation.guidance import GuidanceReuse
from .generation.state import GenerationState
from .inputs import write_timestep
from .loras import LoraMethods
from .profiler_ranges import ProfilerRanges

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle
    from ..exporter.trace.parameters import StoredWeights


class UNet(LoraMethods, BaseUNet):
    """Replacement for a diffusers UNet of ``exporter.families.FAMILIES`` in any pipeline; runs a pair of engines.

        pipe.unet = offcut.UNet.load("sd15.offcut")
        pipe.unet.set_schedule(offcut.Uniform(5))

    The UNet has no parameters: the weights are in the engines. Pipelines of ``offcut.load`` and ``offcut.attach``
    announce each generation; in a loop of your own, use ``generation``. Without an announcement, the UNet detects a
    new generation by the timesteps and shapes, and reads the timestep on the host at every call.

    Only one thread may use a UNet at a time. For several threads, open one UNet each, from the same bundle or not.

    Attributes:
        record_times: whether ``last_run`` has the seconds of each call; on a GPU, each call then waits for the device.
        precision: precision in which the engines compute; None where it is unknown.

    Args:
        pair: the opened engines, which this object then owns and closes.
        config: the UNet's config as diffusers wrote it, with ``_class_name``.
        attention: attention that the UNet was exported with; None for the model's own.
        bound_shapes: number of sets of input shapes for which buffers are kept; the least recently used set goes first.
        stored: function that returns the weights that the engines were built with, for LoRAs; None if they are unknown.
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
        super().__init__(
            config,
            device=_with_index(pair.device),
            inputs=pair.inputs,
            cuts=pair.cuts,
            engine=pair.name,
            attention=attention,
        )
        self.record_times = False
        self.precision: str | None = None
        self._pair: EnginePair | None = pair
        self._output_name = next(iter(pair.outputs))
        self._loras = {}
        self._stored = stored
        self._bound = BoundPairs(bound_shapes)
        self._residuals: WeakKeyDictionary[BoundPair, set[str]] = WeakKeyDictionary()  # residuals of the last call
        self._ranges = ProfilerRanges(self._device)

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
            engine: a name, or ``"auto"`` for the best of the bundle's engines that runs here.
            device: device as PyTorch spells it.
            precision: precision of the graphs, to choose among several builds of the engine; the newest by default.
            inference_precision: precision of the computation, to choose among several builds.
            options: settings of ``engines.base.EngineOptions``: ``threads`` for CPU engines; ``cuda_graphs``,
                ``weight_budget`` (bytes) and ``runtime_cache`` (a directory) for NVIDIA's engines; ``provider`` for
                ONNX Runtime.

        Raises:
            BundleError: the directory is not a bundle, or is damaged.
            EngineError: the engine is missing or cannot run here.
        """
        from ..engines.bundle.bundle import Bundle

        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        entry = opened.find(engine, device=device, precision=precision, inference_precision=inference_precision)
        pair = opened.pair(entry, device=device, **options)
        attention = opened.manifest.source.attention
        unet = cls(pair, opened.unet_config, attention=attention, stored=lambda: opened.weights(entry))
        unet.precision = opened.precision_of(entry)
        return unet

    @property
    def bound(self) -> BoundPair | None:
        """Engines bound to the buffers of the last call, to measure engine calls alone; None before the first call."""
        return next(reversed(self._bound.values()), None)

    @property
    def output_specs(self) -> Mapping[str, TensorSpec]:
        """Outputs of the full graph by name."""
        return self._open_pair().outputs

    def _call(self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float) -> torch.Tensor:
        shapes, not_passed = self._shapes(tensors)
        if self._family.is_video and tuple(shapes.items()) not in self._bound:
            self._family.check_limits(self.config, solve(self._specs, shapes))
        bound = self._bound.get_or_bind(self._open_pair(), shapes)
        for name, tensor in tensors.items():
            bound.buffers[name].copy_(tensor)
        self._zero_residuals(bound, tensors, not_passed)
        write_timestep(bound.buffers["timestep"], timestep)

        generation, full = self._begin(tuple(shapes.items()), timestep)
        if not full and generation.skips(generation.completed):
            output = self._repeat_output(generation)
            generation.end(full, 0.0 if self.record_times else None)
            return output
        if generation.completed == 0:
            self._prepare(generation, tensors[SAMPLE])
        guidance = generation.guidance
        if guidance is not None and guidance.batch_size != tensors[SAMPLE].shape[0]:
            guidance = None  # the pipeline no longer guides
        half = None
        if guidance is not None and not full:
            half = self._bound.get_or_bind(self._open_pair(), guidance.half_shapes(shapes))
        cut = None if full else generation.cut_of(generation.completed)
        assert full or cut is not None
        with self._ranges.call(full, more=generation is self._announced):
            seconds = self._timed(partial(self._enqueue, generation, bound, half, cut, guidance))
        generation.end(full, seconds)
        if half is not None and guidance is not None:
            return guidance.whole_output(half).to(tensors[SAMPLE].dtype)
        # Copied, because schedulers keep outputs: PNDM without guidance would see its history overwritten.
        return bound.buffers[self._output_name].to(tensors[SAMPLE].dtype, copy=True)

    def _zero_residuals(self, bound: BoundPair, passed: Iterable[str], not_passed: Iterable[str]) -> None:
        """Zero the residuals that an earlier call passed and this one does not; new buffers are zero."""
        written = self._residuals.setdefault(bound, set())
        for name in written.intersection(not_passed):
            bound.buffers[name].zero_()
        written.difference_update(not_passed)
        written.update(name for name in passed if argument_of(name) is not None)

    def _timed(self, enqueue: Callable[[], None]) -> float | None:
        """Enqueue, and return the seconds until the device is done; None where times are not recorded."""
        if not self.record_times:
            enqueue()
            return None
        self._wait()
        begin = time.perf_counter()
        enqueue()
        self._wait()
        return time.perf_counter() - begin

    def _enqueue(
        self,
        generation: GenerationState,
        bound: BoundPair,
        half: BoundPair | None,
        cut: str | None,
        guidance: GuidanceReuse | None,
    ) -> None:
        """Enqueue the device work of a call: the engine, and the features and guidance before and after it.

        Args:
            bound: engines bound to the buffers of the whole batch, which hold the inputs.
            half: engines bound to buffers of half the batch, for a shallow call that reuses the guidance; else None.
            cut: cut of a shallow call; None for a full call.
            guidance: the generation's guidance state; None for a call without guidance.
        """
        history, drift, call = generation.history, generation.drift, generation.completed
        if cut is None:
            bound.full()
            if history is not None:
                history.record(bound, call)
            if guidance is not None:
                guidance.record(bound)
            if drift is not None:
                drift.record_full(bound)
            return
        if drift is not None:
            drift.record_shallow(bound, call)
        if history is not None:
            history.predict(bound, call, self._cuts[cut])
        if half is not None and guidance is not None:
            guidance.copy_half(half, bound, self._cuts[cut])
        (half or bound).shallow(cut)

    def _prepare(self, generation: GenerationState, sample: torch.Tensor) -> None:
        """Create the state that a generation's shallow calls will need; runs at the first call."""
        caching = self._caching
        generation.history = generation.guidance = generation.drift = None  # a first call that failed may have set them
        if caching.forecast is not None:
            generation.history = FeatureHistory(caching.forecast, caching.features)
        if caching.reuse_guidance and generation.guided:
            generation.guidance = GuidanceReuse(self._specs, self._output_name)
            generation.guidance.check_batch(sample)
        if caching.schedule is not None and caching.schedule.adaptive:
            generation.drift = FeatureDriftEstimator(caching.features)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _open_pair(self) -> EnginePair:
        if self._pair is None:
            raise EngineError("this UNet was closed: open it again with offcut.UNet.load")
        return self._pair

    def _generation_ended(self) -> None:
        self._ranges.end()

    def _advice(self, calls: int, scheduler: object) -> str | None:
        return lora_advice(self.schedule, self._loras) or super()._advice(calls, scheduler)

    # The engines

    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self._announced is not None:
            raise UserError("LoRAs cannot change during a generation: load them before the pipeline is called")
        with self._exclusively():
            self._open_pair().refit(weights)
            self._bound.close()
        self._unannounced = None

    def _release(self) -> None:
        if self._latest is not None:
            self._latest.release()

    def lend(self) -> EnginePair:
        """Hand the engines to a ``batching.Worker``; until ``take_back`` this UNet cannot be called.

        Raises:
            EngineError: the UNet was closed.
            UserError: the UNet is in use.
        """
        with self._exclusively():
            pair = self._open_pair()
            if self._announced is not None:
                raise UserError("this UNet is in a generation: let the pipeline call finish first")
            self._bound.close()
            self._release()
            self._unannounced = None
        self._busy.acquire()
        self._in_use = "a worker runs this UNet's engines: submit requests to it, or close it first"
        return pair

    def take_back(self) -> None:
        """Take the engines back from the worker to which ``lend`` gave them."""
        self._in_use = IN_USE
        self._busy.release()

    def close(self) -> None:
        """Close the engines and free their memory."""
        with self._exclusively():
            self._bound.close()
            self._release()
            if self._pair is not None:
                self._pair.close()
            self._pair = None


def _with_index(device: torch.device) -> torch.device:
    """Return ``cuda`` as ``cuda:0``, the form that tensors report."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
