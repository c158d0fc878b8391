"""The UNet of a request's pipeline: its calls go to the engines that all requests share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch

from ...errors import InternalError
from ...exporter.specs import solve
from ...exporter.trace.export import SAMPLE
from ..base_unet import BaseUNet
from ..generation.features import CallPart
from ..generation.guidance import second_half
from ..generation.trajectory import Call
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
        self._end_unannounced()
        if request is not None:
            self.set_schedule(request.schedule, request.cut, request.forecast, reuse_guidance=request.reuse_guidance)
            if self.ip_adapters is not None:
                self.ip_adapters.copy_scales(self._owner.attn_processors)

    def _call(
        self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float, conditioning: torch.Tensor | None
    ) -> torch.Tensor:
        request, sample = self._request, tensors[SAMPLE]
        if request is None:
            raise InternalError("a pipeline of a worker called its UNet outside a request")
        lane = self._batcher.lanes.lane_for(tensors)
        shapes = lane.shapes(sample.shape[0])
        if self._family.is_video:
            self._family.check_limits(self.config, solve(self._specs, shapes))
        timesteps = torch.empty(shapes["timestep"], dtype=self._specs["timestep"].torch_dtype(), device=self._device)
        write_timestep(timesteps, timestep)

        call = self._begin(tuple(shapes.items()), timestep, sample, conditioning)
        if call.skipped:
            if request.stop_error is not None:
                raise copy_of(request.stop_error)
            return self._complete(call, sample, call.trajectory.repeated_output(), rows=0)
        layout = self._layout(lane, sample.shape[0]) if self._keeps_features(call) else None
        guidance = call.trajectory.guidance
        half = guidance is not None and not call.full and guidance.applies_to(sample)
        if half:
            tensors = second_half(tensors, lane.per_row)
            timesteps = second_half({"timestep": timesteps}, lane.per_row)["timestep"]
        unet_call = UNetCall(
            request=request,
            lane=lane,
            tensors=tensors,
            timestep=timesteps,
            part=CallPart(call.trajectory.features, call.number, tensors[SAMPLE].shape[0], half),
            cut=call.cut,
            layout=layout,
            last=next(self._later_engine_calls(call), None) is None,
            arrived=time.monotonic(),
        )
        output: torch.Tensor = self._batcher.execute(unet_call)
        if half and guidance is not None:
            output = guidance.whole_output(output)
        return self._complete(call, sample, output, unet_call.shared_rows)

    def _complete(self, call: Call, sample: torch.Tensor, output: torch.Tensor, rows: int) -> torch.Tensor:
        """Finish a call, and report it to the request's callback."""
        output = self._finish(call, sample, output)
        plan = call.trajectory.plan
        if self._request is not None and self._request.on_step is not None:
            with self._batcher.outside():
                self._request.on_step(Step(call.number, None if plan is None else len(plan), call.full, rows))
        return output

    def _later_engine_calls(self, call: Call) -> Iterator[bool]:
        """Yield for each later call of the trajectory that runs an engine whether it may need cached features."""
        plan = call.trajectory.plan
        if plan is None:
            yield True
            return
        for later in range(call.number + 1, len(plan)):
            if call.trajectory.runs_engine(later):
                yield not plan[later]

    def _keeps_features(self, call: Call) -> bool:
        """Return whether a later call needs the features of this one."""
        return call.full and self.scheduled_features != () and any(self._later_engine_calls(call))

    def _layout(self, lane: Lane, rows: int) -> Layout:
        """Return the layout of a trajectory's slot.

        All full calls of a trajectory have the same layout: a new slot would lose the features of the full call before.
        """
        return self._batcher.lanes.layout(lane, self.scheduled_features, rows, keep_earlier=self.forecast is not None)
