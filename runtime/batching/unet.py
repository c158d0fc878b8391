"""What stands in a request's pipeline where its UNet would: its calls go to the engines that all requests share."""

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
from .batcher import Batcher, again
from .lanes import Lane
from .pool import Layout
from .request import Call, Request, Step


class SharedUNet(BaseUNet):
    """One request's view of the engines; the next request of the same thread may have it after.

    Args:
        unet: whose engines they are.
        batcher: runs them.
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
        self._request: Request | None = None

    def serve(self, request: Request | None) -> None:
        """From now on calls are this request's; None between requests.

        Raises:
            CutError: the engines have no such cut.
        """
        self._request = request
        self._unannounced = None
        if request is not None:
            self.set_schedule(request.schedule, request.cut, request.forecast)
            if self.ip_adapters is not None:
                self.ip_adapters.adopt(self._owner.attn_processors)

    def _call(self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float) -> torch.Tensor:
        request = self._request
        if request is None:
            raise InternalError("a pipeline of a worker called its UNet outside a request")
        lane = self._batcher.lanes.of(tensors)
        rows = tensors[SAMPLE].shape[0]
        shapes = lane.shapes(rows)
        if self._family.is_video:
            self._family.check_limits(self.config, solve(self._specs, shapes))
        times = torch.empty(shapes["timestep"], dtype=self._specs["timestep"].torch_dtype(), device=self._device)
        write_timestep(times, timestep)

        generation, full = self._begin(tuple(shapes.items()), timestep)
        plan, number = generation.plan, generation.made
        if not full and generation.skips(number):
            if request.ended is not None:
                raise again(request.ended)
            answer = self._skipped(generation)
            self._done(generation, full, rows=0)
            return answer
        ahead = None  # whether each call is full, of those that run an engine
        if plan is not None:
            later = range(number + 1, len(plan))
            ahead = tuple(plan[each] for each in later if plan[each] or not generation.skips(each))
        keeps = full and self._features != () and (ahead is None or not all(ahead))
        cut = None if full else generation.cut_of(number)
        assert full or cut is not None
        call = Call(
            request=request,
            lane=lane,
            tensors=tensors,
            timestep=times,
            rows=rows,
            cut=cut,
            number=number,
            layout=self._layout(lane, rows) if keeps else None,
            last=ahead is not None and not ahead,
            until_full=ahead.index(True) + 1 if not full and ahead and True in ahead else 0 if full else None,
            came=time.monotonic(),
        )
        noise_pred = self._batcher.step(call)
        self._done(generation, full, call.shared)
        return noise_pred

    def _done(self, generation: GenerationState, full: bool, rows: int) -> None:
        """A call has completed; its request is told."""
        plan, number = generation.plan, generation.made
        generation.end(full)
        if self._request is not None and self._request.on_step is not None:
            with self._batcher.outside():
                self._request.on_step(Step(number, None if plan is None else len(plan), full, rows))

    def _layout(self, lane: Lane, rows: int) -> Layout:
        """The same at all of a request's full steps: another slot would not have the features of the step before."""
        return self._batcher.lanes.layout(lane, self._features, rows, twice=self._forecast is not None)
