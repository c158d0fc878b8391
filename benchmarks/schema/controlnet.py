"""Result of ``offcut bench controlnet``: a row for each way to generate the same scenes."""

from __future__ import annotations

import statistics

from pydantic import BaseModel, ConfigDict, Field

from ..stats import Estimate


class ReuseChange(BaseModel):
    """Change by skipping the ControlNet on shallow calls, paired by scene; negative where it is worse."""

    model_config = ConfigDict(extra="forbid")

    psnr: Estimate = Field(description="dB, of the distances to the uncached image")
    overlap: Estimate
    accuracy: Estimate


class ControlNetRow(BaseModel):
    """One way to generate, over all scenes."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="unique in a run, e.g. 'interval 3, ControlNet reused'")
    control: bool = Field(description="whether the pipeline has the ControlNet")
    interval: int | None = Field(description="every so many calls are full; None where all are")
    schedule: str | None
    reused: bool = Field(description="whether the ControlNet is skipped on shallow calls: attach's reuse_controlnet")
    full_calls: int = Field(description="of the UNet, for one batch of images")
    shallow_calls: int
    passes: int = Field(description="of the ControlNet, for one batch of images")
    overlap: Estimate = Field(description="intersection over union of the objects' pixels and the silhouette's, 0..1")
    accuracy: Estimate = Field(description="share of prompts right, 0..1, by the judge network")
    psnr: Estimate | None = Field(None, description="dB, against the uncached image; of cached rows")
    psnr_worst: float | None = None
    change: ReuseChange | None = Field(
        None, description="of reused rows: against the row of the same schedule whose ControlNet runs at every call"
    )
    seconds: list[float] = Field(default_factory=list, description="of the pipeline's call, per image; one a round")
    controlnet_seconds: list[float] = Field(default_factory=list, description="of those, in the ControlNet")
    to_uncached: float | None = Field(
        None, description="seconds over the uncached row's, median over the rounds of the ratio within a round"
    )

    @property
    def share(self) -> float | None:
        """The ControlNet's share of the seconds, the median of the rounds; None where nothing was timed."""
        pairs = zip(self.controlnet_seconds, self.seconds, strict=True)
        return statistics.median(part / whole for part, whole in pairs) if self.seconds else None


class ControlNetReuse(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="ignore")  # earlier versions named a picture of some scenes

    model: str
    controlnet: str = Field(description="its directory's name")
    engine: str = Field(description="of the UNet; the ControlNet runs in eager PyTorch")
    scheduler: str
    steps: int
    guidance: float
    cut: str
    images: int = Field(description="of each row")
    batch: int = Field(description="images of a pipeline's call")
    rounds: int = Field(description="of the times; 0: none were taken")
    drawn_overlap: float = Field(description="of the scenes as the renderer draws them: what `overlap` can reach")
    rows: list[ControlNetRow]
