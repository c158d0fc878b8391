"""A user's build request: one ``BuildRequest``, which ``offcut.build`` or the command line makes.

``resolve`` checks a request and turns it into a ``BuildPlan``. Nothing here imports a heavy package, because
``offcut build --help`` reads these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import ShapeError
from ...exporter.ip_adapter import IPAdapter
from ...exporter.load import ModelSource
from ...exporter.lora import ScaledLora
from ...exporter.specs import TensorSpec
from ..base import EnginePair, Progress, Setting, Settings
from ..profiles import Profile, in_pixels, in_shapes


class Calibrator(Protocol):
    """Runs trajectories for calibration, and decides how a graph is rounded; ``offcut.Calibration`` is one."""

    @property
    def method(self) -> str:
        """How ranges are chosen: one of ``exporter.quantize.histogram.METHODS``."""
        ...

    @property
    def keep(self) -> tuple[str, ...]:
        """Patterns of layer names that stay in the graph's own precision."""
        ...

    @property
    def sensitive(self) -> float:
        """Margin in dB: a layer this far below the median signal-to-noise ratio is not rounded."""
        ...

    def run(self, pair: EnginePair, source: ModelSource, progress: Progress) -> None:
        """Denoise with this pair as the UNet, on a cached schedule, through every cut."""
        ...

    def record(self, source: ModelSource) -> dict[str, Setting]:
        """Return everything that decides what ``run`` feeds to the pair."""
        ...


@dataclass(frozen=True)
class Sizes:
    """Image sizes to compile for, in pixels or in trtexec's spelling, before the graph's inputs are known.

    Attributes:
        static: image sizes, each ``WIDTHxHEIGHT`` in pixels.
        dynamic: range of an image's sides, ``SMALLEST..LARGEST`` in pixels.
        max_batch: images per call.
        min_shapes, opt_shapes, max_shapes: shapes of the graph's inputs in trtexec's spelling; they exclude sizes in
            pixels.
    """

    static: tuple[str, ...] = ()
    dynamic: str | None = None
    max_batch: int | None = None
    min_shapes: str | None = None
    opt_shapes: str | None = None
    max_shapes: str | None = None

    def __bool__(self) -> bool:
        """Return whether any size was given."""
        return self != Sizes()

    def profiles(
        self, inputs: Mapping[str, TensorSpec], *, multiple: int, native: int, frames: int | None = None
    ) -> tuple[Profile, ...]:
        """Return the profiles for a graph; empty if no size was given.

        Args:
            inputs: inputs of the full graph.
            multiple: height and width of the latent must be multiples of this number.
            native: side in pixels of the images that the model was trained on.
            frames: number of frames that a video model was trained on.

        Raises:
            ShapeError: a size is malformed or invalid, or both spellings are mixed.
        """
        in_image_pixels = bool(self.static or self.dynamic or self.max_batch)
        shapes = (self.min_shapes, self.opt_shapes, self.max_shapes)
        if not any(shapes):
            if not in_image_pixels:
                return ()
            return in_pixels(
                inputs,
                multiple=multiple,
                static=self.static,
                dynamic=self.dynamic,
                max_batch=self.max_batch,
                native=native,
                frames=frames,
            )
        if in_image_pixels:
            raise ShapeError(
                "--min-shapes, --opt-shapes and --max-shapes give a profile by themselves: "
                "leave --static, --dynamic and --max-batch out"
            )
        smallest, best, largest = shapes
        profile = in_shapes(inputs, multiple=multiple, min_shapes=smallest, opt_shapes=best, max_shapes=largest)
        return (profile,)


@dataclass(frozen=True)
class BuildRequest:
    """A build as the user asked for it, not yet checked. ``offcut.build`` documents the fields.

    Attributes:
        engines: names of engines; ``"auto"`` among them stands for the best one here.
        calibration: prompts and options of the calibration for ``int8`` and ``fp8``; None for other precisions.
    """

    model: str
    cuts: tuple[str, ...] = ("deepcache:0",)
    engines: tuple[str, ...] = ("auto",)
    precision: str = "fp32"
    inference_precision: str | None = None
    device: str = "cpu"
    opset: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    profiles: tuple[Profile, ...] | Sizes = ()
    settings: Mapping[str, Settings] = field(default_factory=dict)
    deploy: bool = False
    compile_all: bool = False
    adapters: tuple[str, ...] | None = None
    loras: tuple[ScaledLora, ...] = ()
    ip_adapters: tuple[IPAdapter, ...] = ()
    attention: str | None = None
    revision: str | None = None
    variant: str | None = None
    subfolder: str | None = None
    calibration: Calibrator | None = None
    cache: bool = True
