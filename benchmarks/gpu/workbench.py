"""What the checks share: the models on disk, their bundles, and engines opened from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
"""Those that can run on CUDA."""

PRECISIONS = ("fp16", "bf16", "fp32")
CUT = "deepcache:0"
"""The cut of every check that needs only one; a deeper one costs more and is proven by the parity."""

DONE = ".done"
"""A file beside a model that was written to its end."""

_PROFILED = ("tensorrt", "tensorrt-rtx")
# All shapes that the checks of the small model use, and those of the export's own reference.
_SMALL_PROFILE = Profile.of(
    {"batch": (1, 2, 4), "height": (16, 16, 32), "width": (16, 16, 32), "sequence": (7, TOKENS, TOKENS)}
)
# What a user would choose who wants speed and builds once.
_FAST: dict[str, Settings] = {"inductor": {"max_autotune": True}}


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        device: ``"cuda"``; ``"cpu"`` proves the device-neutral checks themselves.
        engines: whose checks are listed.
        precisions: of the matrix; the first is that of the performance group.
        every_cut: build and compare all cuts of the small model in place of a choice.
        performance: list the performance group.
        architectures, batches: of the performance group; a batch is a number of images, a UNet call has two for each.
        steps, interval: of the denoising loops that are timed.
        rounds: how often the contestants take turns.
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, given: dict[str, Any]) -> Options:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
        }
        return cls(**values)


class Workbench:
    """Makes models and bundles once, in a folder that outlives the process, and opens engines.

    Args:
        options: of the run.
        folder: for models and bundles.
        progress: called with a sentence as something slow begins.
    """

    def __init__(self, options: Options, folder: Path, progress: Callable[[str], None] = lambda step: None) -> None:
        self.options = options
        self.folder = folder
        self.device = options.device
        self._progress = progress
        self._built: dict[tuple[object, ...], Bundle | Exception] = {}

    @property
    def cuts(self) -> tuple[str, ...]:
        """Of the small model's bundles."""
        return EVERY_CUT if self.options.every_cut else SMALL_CUTS

    def model(self, architecture: str, precision: str) -> Path:
        """The directory of a UNet with random weights."""
        folder = self.folder / f"{architecture}-{'fp32' if architecture == 'small' else precision}"
        if not (folder / DONE).exists():
            self._progress(f"make {architecture} with random weights")
            save_model(architecture, folder, precision)
            (folder / DONE).touch()
        return folder

    def bundle(self, engine: str, precision: str) -> Bundle:
        """The small model's bundle with this engine, shapes left dynamic; built at the first call.

        Raises:
            OffcutError: it cannot be built; the same error at each call.
        """
        profiles = (_SMALL_PROFILE,) if engine in _PROFILED else ()
        return self._build("small", engine, precision, cuts=self.cuts, profiles=profiles)

    def fast_bundle(self, architecture: str, engine: str, precision: str, batch: int) -> Bundle:
        """An architecture's bundle for one shape, compiled for speed.

        Args:
            batch: of a UNet call.

        Raises:
            OffcutError: it cannot be built; the same error at each call.
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
        found = self._built[key]
        if isinstance(found, Exception):
            raise found
        return found

    @contextmanager
    def pair(
        self, bundle: Bundle, engine: str, *, cuda_graphs: bool = True, cuts: tuple[str, ...] | None = None
    ) -> Iterator[EnginePair]:
        """The bundle's engine, opened on the device; closed at the end.

        Args:
            cuts: open only these shallow graphs; None for all.
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
        """The same behind the stand-in."""
        from ...runtime.unet import UNet

        with self.pair(bundle, engine, **how) as pair:
            unet = UNet(pair, bundle.unet_config)
            try:
                yield unet
            finally:
                unet.close()


def usable_precision(engine: str, precisions: tuple[str, ...]) -> str:
    """The first of these precisions that this engine runs.

    Raises:
        EngineError: it runs none of them.
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
