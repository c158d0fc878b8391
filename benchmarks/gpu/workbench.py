"""The models, bundles and engines that the checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engines.base import EngineOptions, Settings
from ...engines.bundle.bundle import Bundle, open_entry
from ...engines.profiles import Profile
from ...errors import EngineError
from .models import EVERY_CUT, SIDE, SMALL_CUTS, TOKENS, save_model

if TYPE_CHECKING:
    from ...engines.base import EnginePair
    from ...runtime.unet import UNet

ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime", "inductor")
"""Engines that can run on CUDA."""

PRECISIONS = ("fp16", "bf16", "fp32")
CUT = "deepcache:0"
"""Cut that all checks except parity use."""

DONE = ".done"
"""Name of the file that marks a complete model."""

_PROFILED = ("tensorrt", "tensorrt-rtx")
# All shapes of the small model's checks and of the reference that the export stores.
_SMALL_PROFILE = Profile.of(
    {"batch": (1, 2, 4), "height": (16, 16, 32), "width": (16, 16, 32), "sequence": (7, TOKENS, TOKENS)}
)
# Build settings for speed.
_FAST: dict[str, Settings] = {"inductor": {"max_autotune": True}}


@dataclass(frozen=True)
class GpuOptions:
    """The options of a run.

    Attributes:
        device: ``"cuda"``; ``"cpu"`` runs the checks that need no GPU.
        engines: engines under test.
        precisions: precisions of the correctness checks; the performance checks use the first.
        every_cut: whether to build and compare all cuts of the small model, instead of four.
        performance: whether to run the performance checks.
        architectures: architectures of the performance checks.
        batches: numbers of images of the performance checks; a UNet call has two rows for each image.
        steps, interval: number of steps and caching interval of the timed denoising loops.
        rounds: number of measured loops of each model.
    """

    device: str = "cuda"
    engines: tuple[str, ...] = ENGINES
    precisions: tuple[str, ...] = PRECISIONS
    every_cut: bool = False
    performance: bool = False
    architectures: tuple[str, ...] = ("sd15",)
    batches: tuple[int, ...] = (1,)
    steps: int = 50
    interval: int = 5
    rounds: int = 5

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> GpuOptions:
        """Return the options with these fields; lists, which JSON has in place of tuples, become tuples."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)


class Workbench:
    """A cache of models and bundles in a folder that outlives the process; it also opens engines.

    Args:
        options: options of the run.
        folder: directory for models and bundles.
        progress: called with a sentence before each slow step.
    """

    def __init__(self, options: GpuOptions, folder: Path, progress: Callable[[str], None] = lambda step: None) -> None:
        self.options = options
        self.folder = folder
        self.device = options.device
        self._progress = progress
        self._built: dict[tuple[object, ...], Bundle | Exception] = {}

    @property
    def cuts(self) -> tuple[str, ...]:
        """Cuts of the small model's bundles."""
        return EVERY_CUT if self.options.every_cut else SMALL_CUTS

    def model(self, architecture: str, precision: str) -> Path:
        """Return the directory of a UNet with random weights, which the first call creates."""
        folder = self.folder / f"{architecture}-{'fp32' if architecture == 'small' else precision}"
        if not (folder / DONE).exists():
            self._progress(f"make {architecture} with random weights")
            save_model(architecture, folder, precision)
            (folder / DONE).touch()
        return folder

    def bundle(self, engine: str, precision: str) -> Bundle:
        """Return the small model's bundle with this engine and dynamic shapes, which the first call builds.

        Raises:
            OffcutError: the build failed; later calls raise the same error.
        """
        profiles = (_SMALL_PROFILE,) if engine in _PROFILED else ()
        return self._build("small", engine, precision, cuts=self.cuts, profiles=profiles)

    def fast_bundle(self, architecture: str, engine: str, precision: str, batch: int) -> Bundle:
        """Return an architecture's bundle for one shape, compiled for speed.

        Args:
            batch: number of rows of a UNet call.

        Raises:
            OffcutError: the build failed; later calls raise the same error.
        """
        side = SIDE[architecture]
        fixed = {"batch": batch, "height": side, "width": side, "sequence": TOKENS}
        settings = {engine: _FAST[engine]} if engine in _FAST else None
        return self._build(architecture, engine, precision, cuts=(CUT,), dims=fixed, settings=settings)

    def _build(self, architecture: str, engine: str, precision: str, **how: Any) -> Bundle:
        from ...engines.builder.build import build

        key = (architecture, engine, precision, str(how))
        if key not in self._built:
            model = self.model(architecture, precision)
            batch = f"-b{how['dims']['batch']}" if "dims" in how else ""
            out = self.folder / f"{architecture}-{precision}{batch}.offcut"  # engines share its export
            try:
                self._built[key] = build(
                    model,
                    out,
                    engine=engine,
                    precision=precision,
                    device=self.device,
                    progress=lambda step: self._progress(f"{out.name}: {step}"),
                    **how,
                )
            except Exception as error:
                self._built[key] = error
        bundle = self._built[key]
        if isinstance(bundle, Exception):
            raise bundle
        return bundle

    @contextmanager
    def pair(
        self, bundle: Bundle, engine: str, *, cuda_graphs: bool = True, cuts: tuple[str, ...] | None = None
    ) -> Iterator[EnginePair]:
        """Open the bundle's engine on the device; the end of the context closes it.

        Args:
            cuts: cuts whose shallow graphs are opened; None opens all.
        """
        entry = bundle.entry(engine)
        if cuts is not None:
            shallow = {cut: file for cut, file in entry.shallow.items() if cut in cuts}
            entry = entry.model_copy(update={"shallow": shallow})
        pair = open_entry(bundle, entry, EngineOptions(self.device, cuda_graphs=cuda_graphs))
        try:
            yield pair
        finally:
            pair.close()

    @contextmanager
    def unet(self, bundle: Bundle, engine: str, **how: Any) -> Iterator[UNet]:
        """Open the bundle's engine in offcut's UNet; the end of the context closes it."""
        from ...runtime.unet import UNet

        with self.pair(bundle, engine, **how) as pair:
            unet = UNet(pair, bundle.unet_config)
            try:
                yield unet
            finally:
                unet.close()


def usable_precision(engine: str, precisions: tuple[str, ...]) -> str:
    """Return the first of these precisions that the engine supports.

    Raises:
        EngineError: the engine supports none of them.
    """
    from ...engines.precision import bounds

    reasons = []
    for precision in precisions:
        try:
            bounds(engine, precision)
        except EngineError as error:
            reasons.append(str(error))
        else:
            return precision
    raise EngineError("; ".join(reasons))
