"""Result of ``offcut bench controlnet``, with a row for each setting on the same scenes."""

from __future__ import annotations

import statistics

from pydantic import BaseModel, ConfigDict, Field

from ..stats import Estimate


class ReuseChange(BaseModel):
    """The changes caused by skipping the ControlNet on shallow calls, paired by scene; negative values are worse."""

    model_config = ConfigDict(extra="forbid")

    psnr: Estimate = Field(description="change of the PSNR to the uncached image in dB")
    overlap: Estimate
    accuracy: Estimate


class ControlNetRow(BaseModel):
    """One setting, over all scenes."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="unique in a run, e.g. 'interval 3, ControlNet reused'")
    control: bool = Field(description="whether the pipeline has the ControlNet")
    interval: int | None = Field(description="caching interval; None where every call is full")
    schedule: str | None
    reused: bool = Field(description="whether the ControlNet is skipped on shallow calls: attach's reuse_controlnet")
    full_calls: int = Field(description="full UNet calls for one batch of images")
    shallow_calls: int
    passes: int = Field(description="passes through the ControlNet for one batch of images")
    overlap: Estimate = Field(description="intersection over union of the objects' and the silhouette's pixels, 0..1")
    accuracy: Estimate = Field(description="share of prompts obeyed, 0..1, by the judge network")
    psnr: Estimate | None = Field(None, description="PSNR to the uncached image in dB; None for uncached rows")
    psnr_worst: float | None = None
    change: ReuseChange | None = Field(
        None, description="change of a reused row from the row with the same schedule and the ControlNet at every call"
    )
    seconds: list[float] = Field(
        default_factory=list, description="seconds of the pipeline call per image, for each round"
    )
    controlnet_seconds: list[float] = Field(
        default_factory=list, description="seconds in the ControlNet per image, for each round"
    )
    to_uncached: float | None = Field(
        None, description="ratio of the seconds to those of the uncached row; the median of the rounds"
    )

    @property
    def share(self) -> float | None:
        """The ControlNet's share of the seconds, as the median of the rounds; None where nothing was timed."""
        pairs = zip(self.controlnet_seconds, self.seconds, strict=True)
        return statistics.median(part / whole for part, whole in pairs) if self.seconds else None


class ControlNetReuse(BaseModel):
    """The result of a run."""

    model_config = ConfigDict(extra="ignore")  # earlier versions named a picture of some scenes

    model: str
    controlnet: str = Field(description="name of the ControlNet's directory")
    engine: str = Field(description="engine of the UNet; the ControlNet runs in eager PyTorch")
    scheduler: str
    steps: int
    guidance: float
    cut: str
    images: int = Field(description="images of each row")
    batch: int = Field(description="images of a pipeline call")
    rounds: int = Field(description="timing rounds; 0 if no times were measured")
    drawn_overlap: float = Field(description="overlap of the rendered scenes, which is the limit of `overlap`")
    rows: list[ControlNetRow]
