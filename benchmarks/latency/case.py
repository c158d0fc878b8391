"""The options, the work and the contestants of a latency run; worker processes get the last two as JSON."""

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
        engines: names of the bundle's engines; all by default.
        peers: names in ``contestants.PEERS``, or ``all`` or ``none``.
        pythons: Python interpreters of other environments, by peer.
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
    """The work of a run, which is the same for all contestants.

    Attributes:
        bundle: directory of the bundle.
        model: the diffusers directory that the peers load; None without one.
        folder: directory in which the processes exchange embeddings and latents.
        optimum: directory of optimum's ONNX pipeline, which is exported there if it does not exist.
        steps: number of scheduler steps of the denoising loop.
        guidance: guidance scale; that of a video rises from 1 at the first frame to this scale at the last.
        scheduler: name of the scheduler's class in diffusers.
        height, width: size of the image in pixels.
        images: number of images or videos in one pipeline call; guidance doubles the UNet's batch.
        schedule, cut: schedule as text and canonical name of the cut, for the cached contestants.
        threads: number of threads of each contestant.
        device: PyTorch's name of the device.
        prompt: prompt for the embeddings.
        seed: seed of the latents, and of the images that videos start from.
        frames: number of frames of each video; None for images.
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
        name, family, engine, precision: see ``schema.latency.Contestant``.
        kind: key in ``runners.KINDS`` of the function that opens the contestant.
        cached: whether the contestant follows the case's schedule; otherwise every call is full.
        process: name of the process; contestants in one process share its weights.
        settings: settings that are fixed before the run.
        build: key of the engine in the bundle, for offcut's own contestants.
        size: bytes of the files that the contestant reads.
        need: expected memory of the contestant's process in bytes.
        twin: uncached contestant in the same process; a cached one with equal latents did not cache.
        python: Python interpreter of another environment for the process.
        not_run: why the contestant cannot be measured here; None if it can.
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
