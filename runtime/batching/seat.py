"""A thread in which one request after another runs its pipeline call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ...errors import UserError
from ..pipeline import attach
from ..unet import UNet
from .batcher import Batcher
from .modules import Sharing
from .request import Request
from .unet import SharedUNet


class Seat:
    """Pipelines that have all modules of the worker's but the UNet's stand-in and the scheduler.

    Args:
        pipe: the worker's.
        unet: the pipeline's.
        batcher: runs its engines.
    """

    def __init__(self, pipe: Any, unet: UNet, batcher: Batcher) -> None:
        self._pipe, self._batcher = pipe, batcher
        self._unet = SharedUNet(unet, batcher)
        self._modules = Sharing(batcher.wait)
        self._pipelines: dict[type | None, Any] = {}

    def run(self, request: Request) -> Any:
        """The output of the request's pipeline call, which takes turns with all others and the engines.

        Raises:
            Exception: whatever the pipeline raises.
        """
        device = self._unet.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), self._turn(request):
            if request.ended is not None:
                raise request.ended
            pipe = self._pipeline(request.pipeline)
            pipe.scheduler = copy.deepcopy(request.scheduler or self._pipe.scheduler)
            arguments = dict(request.arguments)
            if arguments.get("generator") is None and "generator" in inspect.signature(type(pipe).__call__).parameters:
                # PyTorch's own is shared, so an image would depend on who else draws from it.
                arguments["generator"] = torch.Generator("cpu")
                arguments["generator"].seed()
            self._serve(request)
            try:
                return pipe(**arguments)
            finally:
                self._serve(None)

    def _serve(self, request: Request | None) -> None:
        self._modules.request = request
        self._unet.serve(request)

    @contextmanager
    def _turn(self, request: Request) -> Iterator[None]:
        self._batcher.enter()
        try:
            yield
        finally:
            self._batcher.leave(request)

    def _pipeline(self, kind: type | None) -> Any:
        if kind not in self._pipelines:
            made = copy.copy(self._pipe) if kind is None else _of_components(self._pipe, kind)
            made.unet = self._unet
            made.set_progress_bar_config(disable=True)
            self._modules.share(made)
            self._pipelines[kind] = attach(made, self._unet)
        return self._pipelines[kind]


def _of_components(pipe: Any, kind: Any) -> Any:
    """Another pipeline of the same modules, e.g. ``StableDiffusionImg2ImgPipeline``."""
    parameters = inspect.signature(kind.__init__).parameters
    given = {**pipe.config, **pipe.components}
    given = {name: given[name] for name in parameters if name in given and not name.startswith("_")}
    missing = [
        name
        for name, parameter in parameters.items()
        if name != "self" and name not in given and parameter.default is inspect.Parameter.empty
    ]
    if missing:
        raise UserError(f"{kind.__name__} needs {', '.join(missing)}, which {type(pipe).__name__} does not have")
    return kind(**given)
