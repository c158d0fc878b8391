"""From what the user asked to the case and its contestants; everything that can be refused is refused here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...engines.bundle.bundle import Bundle
from ...engines.profiles import trained_side
from ...errors import CutError, UserError
from ...exporter.cut import canonical_name
from ...exporter.families import FAMILIES
from ...exporter.load import locate
from ...runtime.generation.schedule import parse
from ...runtime.text_to_image import scheduler_named
from .case import Case, Entrant
from .contestants import PEERS, catalogue
from .loop import vae_scale
from .model import find_model, parameters
from .pipelines import PIPELINES, pipeline_name
from .run import warm_up_calls


@dataclass(frozen=True)
class Wanted:
    """What the user asked for; None is the default that ``plan`` resolves.

    Attributes:
        model: the diffusers directory that the bundle was built from.
        optimum: the directory of optimum's ONNX pipeline.
        engines: of the bundle; all by default.
        peers: of ``PEERS``, or ``all`` or ``none``.
        pythons: interpreters of other environments, by peer.
        steps, guidance, scheduler, height, width, frames, images, schedule, cut, threads, device, end_to_end: see
            ``Case``.
    """

    model: Path | None = None
    optimum: Path | None = None
    engines: tuple[str, ...] = ()
    peers: tuple[str, ...] = ("all",)
    pythons: Mapping[str, str] = field(default_factory=dict)
    steps: int = 20
    guidance: float | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    images: int = 1
    schedule: str = "uniform:5"
    cut: str | None = None
    threads: int | None = None
    device: str = "cpu"
    end_to_end: bool = False


def plan(bundle: Bundle, wanted: Wanted, folder: Path) -> tuple[Case, list[Entrant]]:
    """Resolve and check what was asked.

    Args:
        folder: where the processes exchange embeddings and latents.

    Raises:
        UserError: something of it cannot be.
    """
    pipeline = PIPELINES[pipeline_name(bundle)]
    if wanted.end_to_end and bundle.manifest.pipeline is None:
        raise UserError(f"{bundle.path} was built from a bare UNet, which draws no images: leave --end-to-end out")
    scheduler = wanted.scheduler or pipeline.scheduler
    _check_scheduler(scheduler)
    schedule, cut = str(parse(wanted.schedule)), _cut(bundle, wanted.cut)
    height, width = _size(bundle, wanted)
    model, no_model = find_model(bundle, wanted.model)
    case = Case(
        bundle=str(bundle.path),
        model=None if model is None else str(model),
        folder=str(folder),
        optimum=str(wanted.optimum or folder / "optimum"),
        steps=wanted.steps,
        guidance=pipeline.guidance if wanted.guidance is None else wanted.guidance,
        scheduler=scheduler,
        height=height,
        width=width,
        images=wanted.images,
        schedule=schedule,
        cut=cut,
        threads=wanted.threads or _cores(),
        device=wanted.device,
        end_to_end=wanted.end_to_end,
        frames=_frames(bundle, wanted.frames),
    )
    warm_up_calls(case)
    entrants = catalogue(
        bundle,
        case,
        parameters=0 if model is None else parameters(locate(model, variant=bundle.manifest.source.variant)),
        engines=wanted.engines,
        peers=_peers(wanted.peers),
        pythons=_pythons(wanted.pythons),
        no_model=no_model,
    )
    return case, entrants


def model_name(bundle: Bundle) -> str:
    """What the bundle was built from: a hub id, or a directory's name wherever that lies."""
    name = bundle.manifest.source.model
    return Path(name).name if Path(name).is_absolute() else name


def _check_scheduler(name: str) -> None:
    import diffusers

    scheduler_named(diffusers.DDIMScheduler(), name)


def _cut(bundle: Bundle, name: str | None) -> str:
    if not bundle.cuts:
        raise CutError(f"{bundle.path} was built without a cut: build it with --cut")
    cut = bundle.cuts[0] if name is None else canonical_name(name)
    if cut not in bundle.cuts:
        raise CutError(f"{bundle.path} was not built with the cut {name}; it has {', '.join(bundle.cuts)}")
    return cut


def _size(bundle: Bundle, wanted: Wanted) -> tuple[int, int]:
    """The image's height and width in pixels."""
    scale = vae_scale(bundle)
    native = trained_side(bundle.unet_config.get("sample_size"), scale)
    multiple = scale * max(variant.multiple for variant in bundle.manifest.variants.values())
    sides = (wanted.height or native, wanted.width or native)
    for side in sides:
        if side % multiple:
            raise UserError(f"an image side of {side} pixels does not fit this UNet: give a multiple of {multiple}")
    return sides


def _frames(bundle: Bundle, wanted: int | None) -> int | None:
    """Of each video; None for images.

    Raises:
        UserError: the UNet makes no videos, or none of this length.
    """
    config = bundle.unet_config
    family = FAMILIES[config["_class_name"]]
    if not family.is_video:
        if wanted is not None:
            raise UserError(f"{bundle.path} makes images, which have no frames: leave --frames out")
        return None
    frames = wanted or family.trained_frames(config)
    family.check_limits(config, {"frames": frames or 0})
    return frames


def _peers(names: tuple[str, ...]) -> tuple[str, ...]:
    if names == ("none",):
        return ()
    if names == ("all",):
        return PEERS
    if unknown := [name for name in names if name not in PEERS]:
        raise UserError(f"there is no peer {unknown[0]!r}: write all, none, or some of {', '.join(PEERS)}")
    return names


def _pythons(given: Mapping[str, str]) -> dict[str, str]:
    """Each interpreter's path.

    Raises:
        UserError: there is none, or the peer runs in this environment.
    """
    found = {}
    for peer, python in given.items():
        if peer != "optimum":
            raise UserError(f"{peer!r} needs no environment of its own: --peer-python is for optimum")
        path = shutil.which(python)
        if path is None:
            raise UserError(f"{python} is no program that can be run: give the Python of optimum's environment")
        found[peer] = str(Path(path).absolute())
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
