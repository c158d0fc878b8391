"""Resolution of a user's request to the case and its contestants; invalid requests are refused here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from ...engines.builder.resolve import weights_digest
from ...engines.bundle.bundle import Bundle
from ...engines.profiles import trained_side
from ...errors import CutError, ModelError, UserError
from ...exporter.cut import canonical_name
from ...exporter.families import FAMILIES
from ...exporter.load import ModelSource, locate
from ...exporter.weight_files import weight_files
from ...runtime.generation.schedule import parse
from ...runtime.text_to_image import scheduler_named
from ..record import available_cores
from .case import Case, Entrant, LatencyRequest
from .contestants import PEERS, catalogue
from .loop import vae_scale
from .pipelines import PIPELINES, pipeline_name
from .rounds import warm_up_calls


def resolve(bundle: Bundle, request: LatencyRequest, folder: Path) -> tuple[Case, list[Entrant]]:
    """Return the case and the contestants of a request.

    Args:
        folder: directory in which the processes exchange embeddings and latents.

    Raises:
        UserError: the bundle, the model or a peer cannot do what is requested.
    """
    import diffusers

    pipeline = PIPELINES[pipeline_name(bundle)]
    scheduler = request.scheduler or pipeline.scheduler
    scheduler_named(diffusers.DDIMScheduler(), scheduler)  # raises for unknown names
    schedule, cut = str(parse(request.schedule)), _cut(bundle, request.cut)
    height, width = _size(bundle, request)
    model, no_model = find_model(bundle, request.model)
    case = Case(
        bundle=str(bundle.path),
        model=None if model is None else str(model),
        folder=str(folder),
        optimum=str(request.optimum or folder / "optimum"),
        steps=request.steps,
        guidance=pipeline.guidance if request.guidance is None else request.guidance,
        scheduler=scheduler,
        height=height,
        width=width,
        images=request.images,
        schedule=schedule,
        cut=cut,
        threads=request.threads or available_cores(),
        device=request.device,
        frames=_frames(bundle, request.frames),
    )
    warm_up_calls(case)  # raises if the schedule has no shallow call
    entrants = catalogue(
        bundle,
        case,
        parameters=0 if model is None else parameters(locate(model, variant=bundle.manifest.source.variant)),
        engines=request.engines,
        peers=_peers(request.peers),
        pythons=_pythons(request.pythons),
        no_model=no_model,
    )
    return case, entrants


def model_name(bundle: Bundle) -> str:
    """Return the hub id of the model that the bundle was built from, or the name of its directory."""
    name = bundle.manifest.source.model
    return Path(name).name if Path(name).is_absolute() else name


def find_model(bundle: Bundle, directory: Path | None) -> tuple[Path | None, str]:
    """Return the diffusers directory that the peers load; if there is none, return None and the reason.

    The digest of the weights proves that the bundle was built from this directory.

    Args:
        directory: the user's choice; None tries the directory that the bundle was built from.

    Raises:
        UserError: the user's directory does not exist, or has other weights than those that the bundle was built from.
    """
    source = bundle.manifest.source
    folder = directory or Path(source.model)
    if directory is not None and not folder.is_dir():
        raise UserError(f"{directory} is not a directory: give the diffusers directory that the bundle was built from")
    missing = f"the peers need the PyTorch weights of {source.model}: give their directory with --model"
    try:
        source_model = locate(folder, variant=source.variant) if folder.is_dir() else None
    except ModelError:
        if directory is not None:
            raise
        source_model = None
    if source_model is None or source_model.onnx:
        return None, missing
    if weights_digest(source_model) != source.weights_digest:
        if directory is None:
            return None, missing
        raise UserError(
            f"{directory} holds other weights than those that {bundle.path} was built from: give the directory of "
            f"{source.model}, or build the bundle again"
        )
    return folder, ""


def parameters(source: ModelSource) -> int:
    """Return the number of a UNet's parameters, from the headers of its safetensors files."""
    total = 0
    for path in weight_files(source.folder, source.variant):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def _cut(bundle: Bundle, name: str | None) -> str:
    if not bundle.cuts:
        raise CutError(f"{bundle.path} was built without a cut: build it with --cut")
    cut = bundle.cuts[0] if name is None else canonical_name(name)
    if cut not in bundle.cuts:
        raise CutError(f"{bundle.path} was not built with the cut {name}; it has {', '.join(bundle.cuts)}")
    return cut


def _size(bundle: Bundle, request: LatencyRequest) -> tuple[int, int]:
    """Return the image's height and width in pixels."""
    scale = vae_scale(bundle)
    native = trained_side(bundle.unet_config.get("sample_size"), scale)
    multiple = scale * max(variant.multiple for variant in bundle.manifest.variants.values())
    sides = (request.height or native, request.width or native)
    for side in sides:
        if side % multiple:
            raise UserError(f"an image side of {side} pixels does not fit this UNet: give a multiple of {multiple}")
    return sides


def _frames(bundle: Bundle, frames: int | None) -> int | None:
    """Return the number of frames of each video; None for images."""
    config = bundle.unet_config
    family = FAMILIES[config["_class_name"]]
    if not family.is_video:
        if frames is not None:
            raise UserError(f"{bundle.path} generates images, which have no frames: omit --frames")
        return None
    frames = frames or family.trained_frames(config)
    family.check_limits(config, {"frames": frames or 0})
    return frames


def _peers(names: tuple[str, ...]) -> tuple[str, ...]:
    if names == ("none",):
        return ()
    if names == ("all",):
        return PEERS
    if unknown := [name for name in names if name not in PEERS]:
        raise UserError(f"there is no peer {unknown[0]!r}: give all, none, or some of {', '.join(PEERS)}")
    return names


def _pythons(pythons: Mapping[str, str]) -> dict[str, str]:
    """Return the absolute path of each interpreter, by peer."""
    paths = {}
    for peer, python in pythons.items():
        if peer != "optimum":
            raise UserError(f"{peer!r} needs no environment of its own: --peer-python is for optimum")
        path = shutil.which(python)
        if path is None:
            raise UserError(f"{python} is not an executable program: give the Python of optimum's environment")
        paths[peer] = str(Path(path).absolute())
    return paths
