"""The UNet of a request's pipeline: its calls go to the engines that all requests share."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from ...errors import InternalError
from ...exporter.specs import solve
from ...exporter.trace.export import SAMPLE
from ..base_unet import BaseUNet
from ..generation.state import GenerationState
from ..inputs import write_timestep
from ..unet import UNet
from .batcher import Batcher, copy_of
from .lanes import Lane
from .pool import Layout
from .request import Step, UNetCall, WorkerRequest


class SharedUNet(BaseUNet):
    """UNet of one request runner; it serves one request after another.

    Args:
        unet: the UNet that owns the engines.
        batcher: runs the engines.
    """

    def __init__(self, unet: UNet, batcher: Batcher) -> None:
        super().__init__(
            unet.config,
            device=unet.device,
            inputs=unet.input_specs,
            cuts=unet.cut_features,
            engine=unet.engine,
            attention=unet.built_attention,
        )
        self.advise = False
        self._owner, self._batcher = unet, batcher
        self._request: WorkerRequest | None = None

    def set_request(self, request: WorkerRequest | None) -> None:
        """Set the request to which the following calls belong; None between requests.

        Raises:
            CutError: the engines do not have the request's cut.
        """
        self._request = request
        self._unannounced = None
        if request is not None:
            self.set_schedule(request.schedule, request.cut, request.forecast)
            if self.ip_adapters is not None:
                self.ip_adapters.copy_scales(self._owner.attn_processors)

    def _call(self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float) -> torch.Tensor:
        request = self._request
        if request is None:
            raise InternalError("a pipeline of a worker called its UNet outside a request")
        lane = self._batcher.lanes.lane_for(tensors)
        rows = tensors[SAMPLE].shape[0]
        shapes = lane.shapes(rows)
        if self._family.is_video:
            self._family.check_limits(self.config, solve(self._specs, shapes))
        timesteps = torch.empty(shapes["timestep"], dtype=self._specs["timestep"].torch_dtype(), device=self._device)
        write_timestep(timesteps, timestep)

        generation, full = self._begin(tuple(shapes.items()), timestep)
        plan, number = generation.plan, generation.completed
        if not full and generation.skips(number):
            if request.stop_error is not None:
                raise copy_of(request.stop_error)
            prediction = self._repeat_output(generation)
            self._end_call(generation, full, rows=0)
            return prediction
        later_full = None  # for each later call that runs an engine: whether the call is full
        if plan is not None:
            later = range(number + 1, len(plan))
            later_full = tuple(plan[call] for call in later if plan[call] or not generation.skips(call))
        keeps_features = full and self.scheduled_features != () and (later_full is None or not all(later_full))
        cut = None if full else generation.cut_of(number)
        assert full or cut is not None
        call = UNetCall(
            request=request,
            lane=lane,
            tensors=tensors,
            timestep=timesteps,
            rows=rows,
            cut=cut,
            number=number,
            layout=self._layout(lane, rows) if keeps_features else None,
            last=later_full is not None and not later_full,
            arrived=time.monotonic(),
        )
        noise_pred: torch.Tensor = self._batcher.execute(call)
        self._end_call(generation, full, call.shared_rows)
        return noise_pred

    def _end_call(self, generation: GenerationState, full: bool, rows: int) -> None:
        """Count a completed call, and report it to the request's callback."""
        plan, number = generation.plan, generation.completed
        generation.end(full)
        if self._request is not None and self._request.on_step is not None:
            with self._batcher.outside():
                self._request.on_step(Step(number, None if plan is None else len(plan), full, rows))

    def _layout(self, lane: Lane, rows: int) -> Layout:
        """Return the layout of the request's slot.

        All full calls of a request have the same layout: a new slot would lose the features of the full call before.
        """
        return self._batcher.lanes.layout(lane, self.scheduled_features, rows, keep_earlier=self.forecast is not None)
