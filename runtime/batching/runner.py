"""A request runner, which runs one pipeline call after another in its thread."""

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
from .modules import SharedModules
from .request import WorkerRequest
from .shared_unet import SharedUNet


class RequestRunner:
    """Runs pipeline calls with copies of the worker's pipeline.

    The copies share all modules except for the scheduler and the UNet, which is a ``SharedUNet``.

    Args:
        pipe: the worker's pipeline.
        unet: the UNet of that pipeline.
        batcher: runs the UNet's engines.
    """

    def __init__(self, pipe: Any, unet: UNet, batcher: Batcher) -> None:
        self._pipe, self._batcher = pipe, batcher
        self._unet = SharedUNet(unet, batcher)
        self._modules = SharedModules(batcher.execute)
        self._pipelines: dict[type | None, Any] = {}

    def run(self, request: WorkerRequest) -> Any:
        """Run the pipeline call of a request, which takes turns with the other requests and the engines.

        Returns:
            The output of the pipeline.

        Raises:
            Exception: any exception that the pipeline raises.
        """
        device = self._unet.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), self._turn(request):
            if request.stop_error is not None:
                raise request.stop_error
            pipe = self._pipeline(request.pipeline)
            pipe.scheduler = copy.deepcopy(request.scheduler or self._pipe.scheduler)
            arguments = dict(request.arguments)
            if arguments.get("generator") is None and "generator" in inspect.signature(type(pipe).__call__).parameters:
                # Requests would share PyTorch's default generator, so an image would depend on the other requests.
                arguments["generator"] = torch.Generator("cpu")
                arguments["generator"].seed()
            self._set_request(request)
            try:
                return pipe(**arguments)
            finally:
                self._set_request(None)

    def _set_request(self, request: WorkerRequest | None) -> None:
        self._modules.request = request
        self._unet.set_request(request)

    @contextmanager
    def _turn(self, request: WorkerRequest) -> Iterator[None]:
        self._batcher.enter()
        try:
            yield
        finally:
            self._batcher.leave(request)

    def _pipeline(self, pipeline_class: type | None) -> Any:
        if pipeline_class not in self._pipelines:
            pipe = copy.copy(self._pipe) if pipeline_class is None else _from_components(self._pipe, pipeline_class)
            pipe.unet = self._unet
            pipe.set_progress_bar_config(disable=True)
            self._modules.replace_in(pipe)
            self._pipelines[pipeline_class] = attach(pipe, self._unet)
        return self._pipelines[pipeline_class]


def _from_components(pipe: Any, pipeline_class: Any) -> Any:
    """Return a pipeline of another class with the same modules, e.g. ``StableDiffusionImg2ImgPipeline``."""
    parameters = inspect.signature(pipeline_class.__init__).parameters
    components = {**pipe.config, **pipe.components}
    components = {name: components[name] for name in parameters if name in components and not name.startswith("_")}
    missing = [
        name
        for name, parameter in parameters.items()
        if name != "self" and name not in components and parameter.default is inspect.Parameter.empty
    ]
    if missing:
        raise UserError(
            f"{pipeline_class.__name__} needs {', '.join(missing)}, which {type(pipe).__name__} does not have"
        )
    return pipeline_class(**components)
