"""Time of an image by component: text encoders, full and shallow UNet calls, the autoencoder, and the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..generation.schedule import Schedule
from .generate import OnStep, generate, warm_up
from .request import ImageRequest

REST = "scheduler and the rest"
_METHODS = {"text_encoder": "forward", "text_encoder_2": "forward", "image_encoder": "forward", "vae": "encode decode"}


@dataclass(frozen=True)
class ComponentTime:
    """Time of one component's calls in one image.

    Attributes:
        name: name of the component; ``unet full`` and ``unet shallow`` for the UNet, ``vae encode`` and ``vae decode``
            for the autoencoder, ``REST`` for the remaining time.
        runs_in: name of the engine, or PyTorch.
        calls: number of calls.
        seconds: time of all calls together.
        share: share of the pipeline call's wall time.
    """

    name: str
    runs_in: str
    calls: int
    seconds: float
    share: float


def time_components(
    pipe: Any, request: ImageRequest, schedule: Schedule | None, cut: str | None = None, on_step: OnStep = lambda: None
) -> list[ComponentTime]:
    """Generate once to warm up, and once more while timing each component; on a GPU, timing waits for the device."""
    warm_up(pipe, request, cut)
    spent: dict[str, list[float]] = {}
    with _timed_components(pipe, spent):
        image = generate(pipe, request, schedule, cut, on_step)
    for full, seconds in zip(image.run.full, image.run.seconds, strict=True):
        spent.setdefault("unet full" if full else "unet shallow", []).append(seconds)
    rest = image.seconds - sum(map(sum, spent.values()))
    rows = [(name, _runs_in(pipe, name), len(times), sum(times)) for name, times in spent.items()]
    rows.append((REST, "Python", 1, rest))
    return [ComponentTime(*row, share=row[-1] / image.seconds) for row in rows]


@contextmanager
def _timed_components(pipe: Any, spent: dict[str, list[float]]) -> Iterator[None]:
    """Time the components' methods in this block; the seconds of each call are appended to ``spent``."""
    import torch

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            started = time.perf_counter()
            output = method(*args, **kwargs)
            wait()
            spent.setdefault(name, []).append(time.perf_counter() - started)
            return output

        return call

    def wait() -> None:
        if pipe.unet.device.type == "cuda":
            torch.cuda.synchronize(pipe.unet.device)

    replaced = []
    try:
        for component, methods in _METHODS.items():
            part = getattr(pipe, component, None)
            for method in methods.split() if part is not None else ():
                name = f"{component} {method}" if " " in methods else component
                setattr(part, method, timed(name, getattr(part, method)))
                replaced.append((part, method))
        yield
    finally:
        for part, method in replaced:
            delattr(part, method)


def _runs_in(pipe: Any, name: str) -> str:
    if name.startswith("unet"):
        return str(pipe.unet.engine)
    network = getattr(getattr(pipe, name.split()[0]), "network", None)
    return "PyTorch" if network is None else str(network.engine)
