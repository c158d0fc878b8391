"""``UNet``: a pair of engines in place of a diffusers UNet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - see EngineModel.save_pretrained

from ..engines.base import BoundPair, EnginePair, OpenOptions
from ..errors import BundleError, EngineError, UserError
from ..exporter.residuals import argument_of
from ..exporter.specs import TensorSpec, solve
from ..exporter.trace.export import SAMPLE
from .base_unet import BaseUNet
from .bound import BoundPairs
from .cached_model import IN_USE
from .generation.advice import lora_advice
from .generation.features import CachedFeatures, CallPart, FeatureBuffers
from .generation.guidance import second_half
from .generation.trajectory import Call
from .inputs import write_timestep
from .loras import LoraMethods, LoraSet
from .profiler_ranges import ProfilerRanges

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle
    from ..exporter.trace.parameters import StoredWeights

logger = logging.getLogger(__name__)


class UNet(LoraMethods, BaseUNet):
    """Replacement for a diffusers UNet of ``exporter.families.FAMILIES`` in any pipeline; runs a pair of engines.

        pipe.unet = offcut.UNet.load("sd15.offcut")
        pipe.unet.set_schedule(offcut.Uniform(5))

    The UNet has no parameters: the weights are in the engines. Pipelines of ``offcut.load`` and ``offcut.attach``
    announce each generation; in a loop of your own, use ``generation``. Without an announcement, the UNet detects a
    new generation by the timesteps and shapes. Timesteps should be elements of the scheduler's ``timesteps``; others
    are read on the host at every call.

    Only one thread may use a UNet at a time. For several threads, open one UNet each, from the same bundle or not.

    Attributes:
        record_times: whether ``last_run`` has the seconds of each call; on a GPU, each call then waits for the device.
        precision: precision in which the engines compute; None where it is unknown.
        has_fused_loras: whether LoRAs were fused when the bundle was built.
        cache_bytes: device memory for copies of cached features, which a generation with several trajectories (the
            views of a panorama, passes apart) or with a forecast needs. Trajectories without room make full calls only.

    Args:
        pair: the opened engines, which this object then owns and closes.
        config: the UNet's config as diffusers wrote it, with ``_class_name``.
        attention: attention that the UNet was exported with; None for the model's own.
        bound_shapes: number of sets of input shapes for which buffers are kept; the least recently used set goes first.
        stored: function that returns the weights that the engines were built with, for LoRAs; None if they are unknown.
        stored_unverified: the same without a check of the digests, which would read whole files; for comparisons.
    """

    def __init__(
        self,
        pair: EnginePair,
        config: Mapping[str, Any],
        *,
        attention: str | None = None,
        bound_shapes: int = 2,
        stored: Callable[[], StoredWeights] | None = None,
        stored_unverified: Callable[[], StoredWeights] | None = None,
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
        self.cache_bytes = 2**30
        self._warned_of_memory = False
        self._features = FeatureBuffers(in_place=True)
        self._feature_names = {name for names in pair.cuts.values() for name in names}
        self._pair: EnginePair | None = pair
        self._output_name = next(iter(pair.outputs))
        self.has_fused_loras = False
        self._loras = LoraSet()
        self._stored, self._stored_unverified = stored, stored_unverified
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
        unet = cls(
            pair,
            opened.unet_config,
            attention=opened.manifest.source.attention,
            stored=lambda: opened.weights(entry),
            stored_unverified=lambda: opened.weights(entry, verify=False),
        )
        unet.precision = opened.precision_of(entry)
        unet.has_fused_loras = bool(opened.manifest.source.loras)
        return unet

    def weights_to_compare(self) -> StoredWeights | None:
        """Return the weights that the engines were built with, for comparisons; None where the bundle lacks them."""
        try:
            return None if self._stored_unverified is None else self._stored_unverified()
        except (BundleError, EngineError):
            return None  # built for deployment, or in low precision

    @property
    def bound(self) -> BoundPair | None:
        """Engines bound to the buffers of the last call, to measure engine calls alone; None before the first call."""
        return next(reversed(self._bound.values()), None)

    @property
    def output_specs(self) -> Mapping[str, TensorSpec]:
        """Outputs of the full graph by name."""
        return self._open_pair().outputs

    def _call(
        self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float, conditioning: torch.Tensor | None
    ) -> torch.Tensor:
        sample = tensors[SAMPLE]
        shapes, not_passed = self._shapes(tensors)
        if self._family.is_video and tuple(shapes.items()) not in self._bound:
            self._family.check_limits(self.config, solve(self._specs, shapes))
        bound = self._bound.get_or_bind(self._open_pair(), shapes)
        call = self._begin(tuple(shapes.items()), timestep, sample, conditioning)
        if call.skipped:
            output = call.trajectory.repeated_output()
            return self._finish(call, sample, output, 0.0 if self.record_times else None)

        guidance = call.trajectory.guidance
        half = guidance is not None and not call.full and guidance.applies_to(sample)
        if half:
            tensors = second_half(tensors, self._batched)
            if isinstance(timestep, torch.Tensor) and timestep.numel() > 1:
                timestep = timestep.chunk(2)[1]
            shapes, not_passed = self._shapes(tensors)
            bound = self._bound.get_or_bind(self._open_pair(), shapes, also=bound)  # whose buffers hold the features
        for name, tensor in tensors.items():
            bound.buffers[name].copy_(tensor)
        self._zero_residuals(bound, tensors, not_passed)
        write_timestep(bound.buffers["timestep"], timestep)
        part = CallPart(call.trajectory.features, call.number, tensors[SAMPLE].shape[0], half)
        with self._ranges.call(call.full, more=self._announced is not None):
            seconds = self._timed(partial(self._enqueue, call, part, bound))
        # Copied, because schedulers keep outputs: PNDM without guidance would see its history overwritten.
        output = bound.buffers[self._output_name].to(sample.dtype, copy=True)
        if half and guidance is not None:
            output = guidance.whole_output(output)
        return self._finish(call, sample, output, seconds)

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

    def _enqueue(self, call: Call, part: CallPart, bound: BoundPair) -> None:
        """Enqueue the device work of a call: the engine, and copies of cached features before or after it.

        Args:
            bound: engines bound to buffers, which hold the inputs.
        """
        owner = self._features.owner(bound)
        if owner is not None and owner is not part.features:
            if self._may_copy(bound):
                self._features.copy_out(bound, owner, self._caching.features)
            else:
                owner.drop()
        if call.cut is not None:
            self._features.fill(bound, [part], part.rows, self._cuts[call.cut])
            bound.shallow(call.cut)
            return
        self._features.overwrite(bound)
        bound.full()
        if self._caching.features:
            if part.features.latest or (self.forecast is not None and self._may_copy(bound)):
                part.features.allocate(bound, self._caching.features)
            self._features.record_full(bound, [part], part.rows, self._feature_names)

    def _may_copy(self, bound: BoundPair) -> bool:
        """Return whether ``cache_bytes`` has room for copies of the features of one more trajectory."""
        assert self._latest is not None
        copies = 1 if self.forecast is None else 2
        size = copies * sum(bound.buffers[name].nbytes for name in self._caching.features)
        used = self._latest.copied_bytes
        if not used or used + size <= self.cache_bytes:
            return True
        if not self._warned_of_memory:
            self._warned_of_memory = True
            logger.warning(
                "the cached features of this generation's trajectories need more than %.0f MiB, so some trajectories "
                "make full calls only: raise unet.cache_bytes to cache them all",
                self.cache_bytes / 2**20,
            )
        return False

    def _has_features(self, features: CachedFeatures) -> bool:
        bound = features.in_buffers
        in_place = bound is not None and any(bound is other for other in self._bound.values())
        return in_place or super()._has_features(features)

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
        loras = [name for name, scale in self.loras.items() if scale]
        return lora_advice(self.schedule, loras) or super()._advice(calls, scheduler)

    # The engines

    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self._announced is not None:
            raise UserError("LoRAs cannot change during a generation: load them before the pipeline is called")
        with self._exclusively():
            self._open_pair().refit(weights)
            self._bound.close()
        self._end_unannounced()

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
            self._end_unannounced()
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
