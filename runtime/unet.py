"""``UNet``: a pair of engines in the place of a diffusers UNet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
from .generation.advice import beyond_tuning
from .generation.feature_drift import FeatureDriftEstimator
from .generation.forecast import History
from .generation.guidance import GuidanceReuse
from .generation.state import GenerationState
from .inputs import write_timestep
from .loras import LoraMethods
from .profiler_ranges import ProfilerRanges

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle
    from ..exporter.trace.parameters import StoredWeights


@dataclass(frozen=True)
class _Memory:
    """What a generation's full calls left for its shallow ones, beside the features in the engines' buffers.

    Attributes:
        generation: whose.
        history: for a forecast of the features.
        guidance: for half of a guided batch.
        probe: for a schedule that decides as it goes.
    """

    generation: GenerationState
    history: History | None
    guidance: GuidanceReuse | None
    probe: FeatureDriftEstimator | None


class UNet(LoraMethods, BaseUNet):
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
        super().__init__(
            config,
            device=_with_index(pair.device),
            inputs=pair.inputs,
            cuts=pair.cuts,
            engine=pair.name,
            attention=attention,
        )
        self.record_times = False
        """Whether ``last_run`` has seconds. On a GPU this waits for the device at every call."""
        self.precision: str | None = None
        """In which the engines compute; None where nobody said."""
        self._pair: EnginePair | None = pair
        self._noise_pred = next(iter(pair.outputs))
        self._loras = {}
        self._stored = stored
        self._bound = BoundPairs(bound_shapes)
        self._heard: WeakKeyDictionary[BoundPair, set[str]] = WeakKeyDictionary()
        self._ranges = ProfilerRanges(self._device)
        self._memory: _Memory | None = None

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
        """The engines bound to the buffers of the last call, for measuring them alone; None before the first call."""
        return next(reversed(self._bound.values()), None)

    @property
    def output_specs(self) -> Mapping[str, TensorSpec]:
        """Outputs of the full graph by name."""
        return self._opened().outputs

    def _call(self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float) -> torch.Tensor:
        shapes, silent = self._shapes(tensors)
        if self._family.is_video and tuple(shapes.items()) not in self._bound:
            self._family.check_limits(self.config, solve(self._specs, shapes))
        bound = self._bound.get_or_bind(self._opened(), shapes)
        for name, tensor in tensors.items():
            bound.buffers[name].copy_(tensor)
        self._silence(bound, tensors, silent)
        write_timestep(bound.buffers["timestep"], timestep)

        generation, full = self._begin(tuple(shapes.items()), timestep)
        if not full and generation.skips(generation.made):
            answer = self._skipped(generation)
            generation.end(full, 0.0 if self.record_times else None)
            return answer
        memory = self._remembered(generation)
        guidance = memory.guidance
        if guidance is not None and generation.made == 0:
            guidance.begin(tensors[SAMPLE])
        if guidance is not None and guidance.rows != tensors[SAMPLE].shape[0]:
            guidance = None  # the pipeline guides no longer
        half = None if guidance is None or full else self._bound.get_or_bind(self._opened(), guidance.shapes(shapes))
        cut = None if full else generation.cut_of(generation.made)
        assert full or cut is not None
        with self._ranges.call(full, more=generation is self._announced):
            enqueue = partial(self._enqueue, bound, half, cut, memory, guidance, generation.made)
            seconds = self._run(enqueue)
        generation.end(full, seconds)
        if half is not None and guidance is not None:
            return guidance.answer(half).to(tensors[SAMPLE].dtype)
        # Schedulers keep it: PNDM without guidance would see its history overwritten.
        return bound.buffers[self._noise_pred].to(tensors[SAMPLE].dtype, copy=True)

    def _silence(self, bound: BoundPair, passed: Iterable[str], silent: Iterable[str]) -> None:
        """Zero the residuals that an earlier call passed and this one does not; new buffers are zero."""
        heard = self._heard.setdefault(bound, set())
        for name in heard.intersection(silent):
            bound.buffers[name].zero_()
        heard.difference_update(silent)
        heard.update(name for name in passed if argument_of(name) is not None)

    def _run(self, enqueue: Callable[[], None]) -> float | None:
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
        bound: BoundPair,
        half: BoundPair | None,
        cut: str | None,
        memory: _Memory,
        guidance: GuidanceReuse | None,
        call: int,
    ) -> None:
        """The engines' part of a call, with what precedes and follows it on the device.

        Args:
            cut: None for a full call.
            guidance: the memory's, unless this call is made without.
        """
        history, probe = memory.history, memory.probe
        if cut is None:
            bound.full()
            if history is not None:
                history.keep(bound, call)
            if guidance is not None:
                guidance.keep(bound)
            if probe is not None:
                probe.full(bound)
            return
        if probe is not None:
            probe.shallow(bound, call)
        if history is not None:
            history.predict(bound, call, self._cuts[cut])
        if half is not None and guidance is not None:
            guidance.fill(half, bound, self._cuts[cut])
        (half or bound).shallow(cut)

    def _remembered(self, generation: GenerationState) -> _Memory:
        """What this generation's own full calls left."""
        if self._memory is None or self._memory.generation is not generation:
            history = guidance = probe = None
            if self._forecast is not None:
                history = History(self._forecast, self._features)
            if self._reuse_guidance and generation.guided:
                guidance = GuidanceReuse(self._specs, self._noise_pred)
            if self._schedule is not None and self._schedule.adaptive:
                probe = FeatureDriftEstimator(self._features)
                generation.missed = probe.missed
            self._memory = _Memory(generation, history, guidance, probe)
        return self._memory

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _opened(self) -> EnginePair:
        if self._pair is None:
            raise EngineError("this UNet was closed: open it again with offcut.UNet.load")
        return self._pair

    def _generation_ended(self) -> None:
        self._ranges.end()

    def _advice(self, calls: int, scheduler: object) -> str | None:
        return beyond_tuning(self._schedule, self._loras) or super()._advice(calls, scheduler)

    # The engines

    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self._announced is not None:
            raise UserError("LoRAs cannot change during a generation: load them before the pipeline is called")
        with self._exclusively():
            self._opened().refit(weights)
            self._bound.close()
        self._unannounced = None

    def lend(self) -> EnginePair:
        """Hand the engines to a ``batching.Worker`` until ``take_back``; until then nobody can call this UNet.

        Raises:
            EngineError: they were closed.
            UserError: the UNet is in use.
        """
        with self._exclusively():
            pair = self._opened()
            if self._announced is not None:
                raise UserError("this UNet is in a generation: let the pipeline call finish first")
            self._bound.close()
            self._memory = None
            self._unannounced = None
        self._busy.acquire()
        self._in_use = "a worker runs this UNet's engines: submit requests to it, or close it first"
        return pair

    def take_back(self) -> None:
        """The end of what ``lend`` began."""
        self._in_use = IN_USE
        self._busy.release()

    def close(self) -> None:
        """Give back the engines and their memory."""
        with self._exclusively():
            self._bound.close()
            self._memory = None
            if self._pair is not None:
                self._pair.close()
            self._pair = None


def _with_index(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:0``, which is what tensors say of themselves."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
