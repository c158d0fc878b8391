"""Result of ``offcut bench precision``: times of calls, quality of images, and caching together with int8."""

from __future__ import annotations

import statistics

from pydantic import BaseModel, ConfigDict, Field

from ..stats import Estimate


class CallRow(BaseModel):
    """The times of one call with one build."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    precision: str = Field(description="precision of the graphs, and that of the computation if it differs")
    call: str = Field(description="'full', or the cut of a shallow call")
    seconds: list[float] = Field(description="seconds in each round, in which the calls of all builds take turns")
    to_fp32: float | None = Field(
        None, description="ratio to the same call of the same engine in fp32; the median of the rounds"
    )

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


class Calls(BaseModel):
    """The times of calls with a bundle's builds."""

    model_config = ConfigDict(extra="forbid")

    sizes: dict[str, int] = Field(description="dimensions of the calls; height and width are those of the latent")
    rounds: int
    rows: list[CallRow]


class ImageRow(BaseModel):
    """The quality of the images of one build with one schedule."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    precision: str
    schedule: str | None = Field(description="None where every call is full")
    accuracy: Estimate = Field(description="share of prompts obeyed, 0..1, by the judge network")
    accuracy_change: Estimate | None = Field(
        None, description="change from the same engine in fp32 with the same schedule, paired"
    )
    psnr: Estimate | None = Field(
        None, description="PSNR in dB to the image in fp32 with the same schedule; None for fp32"
    )
    psnr_worst: float | None = None
    psnr_uncached: Estimate | None = Field(
        None, description="PSNR in dB to the same engine's uncached image in fp32; None for that image"
    )


class Images(BaseModel):
    """The quality of images of the same prompts by each build."""

    model_config = ConfigDict(extra="forbid")

    sampler: str
    steps: int
    guidance: float
    images: int = Field(description="images of each row")
    cut: str
    rows: list[ImageRow]


class JointRow(BaseModel):
    """One precision with one way of caching."""

    model_config = ConfigDict(extra="forbid")

    precision: str
    way: str = Field(description="uncached; reuse; DP; DP + correction; ours")
    timeline: str = Field(description="a character for each UNet call: '#' full, '.' shallow, '_' no engine")
    psnr: Estimate = Field(description="PSNR in dB to the uncached image in fp32; 100 for equal images")
    psnr_worst: float


class Joint(BaseModel):
    """CacheQuant's ablation, with a tuned schedule in addition."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    scheduler: str
    steps: int
    guidance: float
    interval: int
    cut: str
    samples: int = Field(description="images that corrections are fitted to and schedules are tuned with")
    images: int = Field(description="images of each row, which are other images than the samples")
    shallow_over_full: float = Field(description="ratio of a shallow to a full call for which schedules are tuned")
    rows: list[JointRow]


class Precision(BaseModel):
    """The result of a run; a part that was not measured is None."""

    model_config = ConfigDict(extra="forbid")

    model: str
    threads: int | None = None
    calls: Calls | None = None
    images: Images | None = None
    joint: Joint | None = None
