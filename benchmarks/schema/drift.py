"""Result of ``offcut bench drift``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Call(BaseModel):
    """One UNet call of a cached image. Errors are root mean squares over the images, relative to the true features."""

    model_config = ConfigDict(extra="forbid")

    cut: str | None = Field(description="of the shallow call; None for a full one, skip where no engine ran")
    last: int = Field(description="the last full call; itself for a full one")
    reused: float = Field(description="what the features of the last full call miss; 0 for a full one")
    read: float = Field(description="what those that were read miss: after prediction, where the schedule predicts")
    fulls: float = Field(description="share of the images in which this call was full")


class Sample(BaseModel):
    """One image, as PNG files beside the result."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    seed: int
    psnr: float = Field(description="of the cached to the uncached image, dB; 100 where they are the same")
    uncached: str
    cached: str
    changed: str = Field(description="map of where they differ: the mean over the colours, dark is none")
    most: float = Field(description="the map's brightest value, in parts of the range of an image")


class Drift(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="ignore")  # earlier versions wrote walks along the start noise

    model: str
    engine: str
    precision: str
    scheduler: str
    steps: int
    guidance: float
    schedule: str = Field(description="as it prints")
    forecast: str | None = Field(description="how shallow calls predict; None where they reuse")
    features: list[str]
    images: int
    distances: list[list[float]] = Field(
        description="[s][e - s - 1]: root mean square of what the features of call s miss of those of a later call e, "
        "relative to the latter, in uncached images"
    )
    calls: list[Call]
    samples: list[Sample]
    mean_changed: str = Field(description="the map of all images' mean, a PNG file")
    mean_most: float
