"""Where an image's time goes: text encoders, full and shallow UNet calls, the autoencoder, and the rest."""

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
class Part:
    """A part's calls in one image.

    Attributes:
        name: the pipeline's component; of the UNet ``unet full`` and ``unet shallow``, of the autoencoder ``vae
            encode`` and ``vae decode``; at last what is left.
        runs_in: the engine, or PyTorch.
        calls: how many.
        seconds: of all of them.
        share: of the pipeline call's wall time.
    """

    name: str
    runs_in: str
    calls: int
    seconds: float
    share: float


def time_parts(
    pipe: Any, request: ImageRequest, schedule: Schedule | None, cut: str | None = None, on_step: OnStep = lambda: None
) -> list[Part]:
    """Draw once to warm up and once more with a clock at each part, which waits for the device on a GPU."""
    warm_up(pipe, request, cut)
    spent: dict[str, list[float]] = {}
    with _clocks(pipe, spent):
        made = generate(pipe, request, schedule, cut, on_step)
    for full, seconds in zip(made.run.full, made.run.seconds, strict=True):
        spent.setdefault("unet full" if full else "unet shallow", []).append(seconds)
    rest = made.seconds - sum(map(sum, spent.values()))
    rows = [(name, _home(pipe, name), len(times), sum(times)) for name, times in spent.items()]
    rows.append((REST, "Python", 1, rest))
    return [Part(*row, share=row[-1] / made.seconds) for row in rows]


@contextmanager
def _clocks(pipe: Any, spent: dict[str, list[float]]) -> Iterator[None]:
    """Time the components' methods, in the order in which they are first called."""
    import torch

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            started = time.perf_counter()
            answer = method(*args, **kwargs)
            wait()
            spent.setdefault(name, []).append(time.perf_counter() - started)
            return answer

        return call

    def wait() -> None:
        if pipe.unet.device.type == "cuda":
            torch.cuda.synchronize(pipe.unet.device)

    changed = []
    try:
        for component, methods in _METHODS.items():
            part = getattr(pipe, component, None)
            for method in methods.split() if part is not None else ():
                name = f"{component} {method}" if " " in methods else component
                setattr(part, method, timed(name, getattr(part, method)))
                changed.append((part, method))
        yield
    finally:
        for part, method in changed:
            delattr(part, method)


def _home(pipe: Any, name: str) -> str:
    if name.startswith("unet"):
        return str(pipe.unet.engine)
    network = getattr(getattr(pipe, name.split()[0]), "network", None)
    return "PyTorch" if network is None else str(network.engine)
