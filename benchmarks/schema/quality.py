"""Result of ``offcut bench quality``, with a row for each setting."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ..stats import Estimate


class QualityRow(BaseModel):
    """One setting, compared with the uncached run of the same prompts and seeds."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="unique in a run, e.g. 'ddim 50, uniform:5 warmup 2, deepcache:0'")
    kind: str = Field(description="'uncached', 'cached', or 'fewer steps' (uncached, at the latency of a cached row)")
    sampler: str = Field(description="name of the sampler: ddim, dpm++ 2m or euler ancestral")
    steps: int
    schedule: str | None = Field(
        None,
        description="schedule as text, tuned:NAME for a bundle's schedule; None where every call is full",
    )
    cut: str | None = None
    interval: int | None = None
    warmup: int | None = None
    damping: float | None = Field(None, description="damping of the forecast; None where features are reused")
    full_calls: int
    shallow_calls: int
    skipped_calls: int = Field(0, description="calls without an engine")
    images: int
    cost: float = Field(description="cost of one image in full calls; a shallow call counts as the reference ratio")
    cost_here: float = Field(description="the same cost with this model's ratio of a shallow to a full call")
    psnr: Estimate | None = Field(None, description="PSNR to the uncached image in dB; None for the uncached row")
    psnr_worst: float | None = None
    ssim: Estimate | None = None
    distance: Estimate | None = Field(None, description="perceptual distance, by the judge network's features")
    accuracy: Estimate | None = Field(None, description="share of prompts obeyed, 0..1, by the judge network")
    accuracy_change: Estimate | None = Field(
        None, description="change from the uncached run, paired by prompt and seed"
    )
    accuracy_by_rules: Estimate | None = Field(
        default=None, description="share of prompts obeyed by the rule-based judge of earlier versions, of 200 images"
    )
    frechet: float | None = Field(None, description="Fréchet distance to rendered scenes of the same captions")
    samples: list[str] = Field(
        default_factory=list, description="PNG files next to result.json, one for each of sample_prompts"
    )
    external: dict[str, float] = Field(
        default_factory=dict, description="LPIPS, CLIP score and FID with networks of the user, by name"
    )
    timeline: str | None = Field(
        None, description="a character for each UNet call: '#' full, '.' shallow, '_' no engine"
    )


class Quality(BaseModel):
    """The result of a run."""

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: str
    guidance: float
    images: int = Field(description="images of each row")
    shallow_over_full: float = Field(
        description="the reference ratio that `cost` uses, measured on Stable Diffusion 1.5"
    )
    shallow_over_full_here: float
    ratios: dict[str, float] = Field(default_factory=dict, description="reference ratio of each cut in the rows")
    ratios_here: dict[str, float] = Field(
        default_factory=dict, description="ratios of this model on this machine, by cut"
    )
    rows: list[QualityRow]
    sample_prompts: list[str] = Field(default_factory=list, description="prompts of each row's samples, in their order")
