"""A small pipeline for all tests of the worker, and the images of requests that run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offcut
from offcut.runtime.batching import Ticket, Worker

RequestArguments = dict[str, Any]
"""Arguments of ``Worker.submit``; the arguments of the pipeline call have a seed instead of a generator."""


@pytest.fixture(scope="package")
def shared_pipe(tiny_bundle: Path) -> Iterator[Any]:
    """Pipeline for the workers of all tests; between tests no worker uses it."""
    pipe: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.advise = False
    yield pipe
    pipe.unet.close()


@pytest.fixture
def latents_alone(shared_pipe: Any) -> Callable[..., torch.Tensor]:
    """Function that returns the latents of a request without a worker."""

    def run(request: RequestArguments, pipe: Any = shared_pipe) -> torch.Tensor:
        before = pipe.scheduler
        pipe.scheduler = request.get("scheduler") or before
        pipe.unet.set_schedule(request.get("schedule"), request.get("cut"), request.get("forecast"))
        try:
            latents = pipe(**_arguments(request)).images
        finally:
            pipe.scheduler = before
            pipe.unet.set_schedule(None)
        assert isinstance(latents, torch.Tensor)
        return latents

    return run


@pytest.fixture
def send() -> Callable[..., Ticket]:
    """Function that submits a request to a worker."""

    def submit(worker: Worker, request: RequestArguments, **overrides: Any) -> Ticket:
        return worker.submit(**{**request, "arguments": _arguments(request), **overrides})

    return submit


def _arguments(request: RequestArguments) -> dict[str, Any]:
    arguments = dict(request["arguments"])
    seed = arguments.pop("seed", 0)
    defaults = {"prompt": "a red square", "num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "latent"}
    return {**defaults, **arguments, "generator": torch.Generator().manual_seed(seed)}
