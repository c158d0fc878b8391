"""The options, the work and the contestants of a latency run; the latter two are sent to worker processes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LatencyRequest:
    """The options of a run; ``resolve`` replaces None by the default.

    Attributes:
        model: the diffusers directory that the bundle was built from.
        optimum: the directory of optimum's ONNX pipeline.
        engines: of the bundle; all by default.
        peers: of ``contestants.PEERS``, or ``all`` or ``none``.
        pythons: interpreters of other environments, by peer.
        steps, guidance, scheduler, height, width, frames, images, schedule, cut, threads, device: see ``Case``.
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


@dataclass(frozen=True)
class Case:
    """The work, the same for all contestants.

    Attributes:
        bundle: its directory.
        model: the diffusers directory that the peers load; None if there is none.
        folder: where the processes exchange embeddings and latents.
        optimum: directory of optimum's ONNX pipeline, which is exported there if it does not exist.
        steps, guidance, scheduler: of the denoising loop; the scheduler by its class in diffusers. A video's guidance
            rises from 1 at the first frame to this scale at the last.
        height, width: of the image, in pixels.
        images: of one pipeline call, or videos; guidance doubles the UNet's batch.
        schedule, cut: of the cached contestants, as text and by its canonical name.
        threads: of each contestant.
        device: as PyTorch spells it.
        prompt: of the embeddings.
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
    prompt: str = "a photograph of a lighthouse in a storm"
    seed: int = 0
    frames: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Entrant:
    """A contestant before the run.

    Attributes:
        name, family, engine, precision: as in ``measured.Contestant``.
        kind: the key in ``runners.KINDS`` of the function that opens it.
        cached: whether it follows the case's schedule; else every call is full.
        process: contestants with the same name here share a process and the weights in it.
        settings: fixed before the run.
        build: key of the engine in the bundle, for offcut's own contestants.
        size: bytes of the files that it reads.
        need: bytes of memory that its process is expected to take.
        twin: the uncached contestant of the same process. A cached one with the same latents did not cache.
        python: interpreter of another environment for its process.
        not_run: why it cannot be measured here.
    """

    name: str
    family: str
    engine: str
    precision: str
    kind: str
    cached: bool
    process: str
    settings: dict[str, str] = field(default_factory=dict)
    build: str | None = None
    size: int = 0
    need: int = 0
    twin: str | None = None
    python: str | None = None
    not_run: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
