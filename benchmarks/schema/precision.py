"""Result of ``offcut bench precision``: calls, images, and caching together with int8."""

from __future__ import annotations

import statistics

from pydantic import BaseModel, ConfigDict, Field

from ..stats import Estimate


class CallRow(BaseModel):
    """A call of one build."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    precision: str = Field(description="of the graphs, and what they are computed in where that is another")
    call: str = Field(description="'full', or the cut of a shallow call")
    seconds: list[float] = Field(description="one a round; each round has every call of every build in turn")
    to_fp32: float | None = Field(
        None, description="over the same call of the same engine in fp32: the median of the rounds' ratios"
    )

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


class Calls(BaseModel):
    """The times of a bundle's builds."""

    model_config = ConfigDict(extra="forbid")

    sizes: dict[str, int] = Field(description="of the calls; height and width are the latent's")
    rounds: int
    rows: list[CallRow]


class ImageRow(BaseModel):
    """The images of one build with one schedule."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    precision: str
    schedule: str | None = Field(description="None where every call is full")
    accuracy: Estimate = Field(description="share of prompts right, 0..1, by the judge network")
    accuracy_change: Estimate | None = Field(
        None, description="against the same engine in fp32 with the same schedule, paired"
    )
    psnr: Estimate | None = Field(None, description="dB, to that one's image; None for fp32 itself")
    psnr_worst: float | None = None
    psnr_uncached: Estimate | None = Field(
        None, description="dB, to the same engine's image in fp32 and uncached; None for that itself"
    )


class Images(BaseModel):
    """Images of the same prompts by each build."""

    model_config = ConfigDict(extra="forbid")

    sampler: str
    steps: int
    guidance: float
    images: int = Field(description="of each row")
    cut: str
    rows: list[ImageRow]


class JointRow(BaseModel):
    """One precision with one way of caching."""

    model_config = ConfigDict(extra="forbid")

    precision: str
    way: str = Field(description="uncached; reuse; DP; DP + correction; ours")
    timeline: str = Field(description="a character for each UNet call: '#' full, '.' shallow, '_' no engine")
    psnr: Estimate = Field(description="dB, to the uncached image in fp32; 100 where they are the same")
    psnr_worst: float


class Joint(BaseModel):
    """CacheQuant's ablation, with a tuned schedule as one more way."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    scheduler: str
    steps: int
    guidance: float
    interval: int
    cut: str
    samples: int = Field(description="images that corrections are fitted to and schedules are tuned with")
    images: int = Field(description="of each row; none of them is a sample")
    shallow_over_full: float = Field(
        description="a shallow call's time over a full one's, that schedules are tuned for"
    )
    rows: list[JointRow]


class Precision(BaseModel):
    """One run; a part that was not measured is None."""

    model_config = ConfigDict(extra="forbid")

    model: str
    threads: int | None = None
    calls: Calls | None = None
    images: Images | None = None
    joint: Joint | None = None
