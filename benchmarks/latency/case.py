"""What every contestant of a run is asked to do, and who they are; sent to the processes as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """The work, the same for all.

    Attributes:
        bundle: its directory.
        model: the diffusers directory that the peers load; None if there is none.
        folder: where the processes exchange embeddings and latents.
        optimum: directory of optimum's ONNX pipeline; exported there if it is not.
        steps, guidance, scheduler: of the denoising loop; the scheduler by its class in diffusers. A video's guidance
            rises from 1 at the first frame to this at the last.
        height, width: of the image, in pixels.
        images: of one pipeline call, or videos; guidance doubles the UNet's batch.
        schedule, cut: of the cached contestants, as text and by its canonical name.
        threads: of each contestant.
        device: as PyTorch spells it.
        end_to_end: whether the text encoder and VAE are loaded, for whole pipeline calls.
        prompt: of those calls, and of the embeddings.
        seed: of the latents, and of the images that videos start from.
        frames: of each video; None for images.
    """

    bundle: str
    model: str | None
    folder: str
    optimum: str
    steps: int
    guidance: float
    scheduler: str
    height: int
    width: int
    images: int
    schedule: str
    cut: str
    threads: int
    device: str = "cpu"
    end_to_end: bool = False
    prompt: str = "a photograph of a lighthouse in a storm"
    seed: int = 0
    frames: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Entrant:
    """A contestant before the run.

    Attributes:
        name, family, engine, precision: as in ``record.Contestant``.
        kind: which of ``runners.KINDS`` opens it.
        cached: whether it follows the case's schedule; if not, every call is full.
        house: contestants of one house share a process, and the weights in it.
        settings: fixed before the run.
        build: the key of the engine in the bundle, for offcut's own.
        size: bytes of the files that it reads.
        need: bytes of memory that its house is expected to take.
        twin: the uncached contestant of the same house: a cached one that computes the same latents did not cache.
        python: the environment that its process runs in, if it is not this one's.
        not_run: why it cannot be measured here.
    """

    name: str
    family: str
    engine: str
    precision: str
    kind: str
    cached: bool
    house: str
    settings: dict[str, str] = field(default_factory=dict)
    build: str | None = None
    size: int = 0
    need: int = 0
    twin: str | None = None
    python: str | None = None
    not_run: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
