"""Result of ``offcut bench quality``: a row for each way to cost less than the uncached run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ..stats import Estimate


class QualityRow(BaseModel):
    """One setting, compared with the uncached run of the same prompts and seeds."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="unique in a run, e.g. 'ddim 50, uniform:5 warmup 2, deepcache:0'")
    kind: str = Field(description="'uncached', 'cached', or 'fewer steps' (uncached, at a cached row's latency)")
    sampler: str = Field(description="the diffusers scheduler, e.g. ddim, dpm++ 2m, euler ancestral")
    steps: int
    schedule: str | None = Field(
        None,
        description="as set_schedule's argument prints; None where every call is full, tuned:NAME of the bundle's own",
    )
    cut: str | None = None
    interval: int | None = None
    warmup: int | None = None
    damping: float | None = Field(None, description="of the cached features' forecast; None where they are reused")
    full_calls: int
    shallow_calls: int
    skipped_calls: int = Field(0, description="that ran no engine")
    images: int
    cost: float = Field(description="of one image, full calls; a shallow call counts as the reference ratio")
    cost_here: float = Field(description="the same with this model's own ratio of shallow to full")
    psnr: Estimate | None = Field(None, description="dB, against the uncached image; None for the uncached row")
    psnr_worst: float | None = None
    ssim: Estimate | None = None
    distance: Estimate | None = Field(None, description="perceptual, of the judge network's features")
    accuracy: Estimate | None = Field(None, description="share of prompts right, 0..1, by the judge network")
    accuracy_change: Estimate | None = Field(None, description="against the uncached run, paired by prompt and seed")
    accuracy_by_rules: Estimate | None = Field(
        None, description="the same by the rule-based judge, of the first 200 images"
    )
    frechet: float | None = Field(None, description="distance to drawn scenes of the same captions, judge features")
    samples: list[str] = Field(default_factory=list, description="PNG files beside result.json, of sample_prompts")
    external: dict[str, float] = Field(
        default_factory=dict, description="LPIPS, CLIP score and FID by networks of the user, by name"
    )
    timeline: str | None = Field(
        None, description="a character for each UNet call: '#' full, '.' shallow, '_' no engine"
    )


class Quality(BaseModel):
    """One run over many settings."""

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: str
    guidance: float
    images: int = Field(description="of each row")
    shallow_over_full: float = Field(
        description="the reference ratio that `cost` uses, measured on Stable Diffusion 1.5"
    )
    shallow_over_full_here: float
    ratios: dict[str, float] = Field(default_factory=dict, description="the reference ratio of each cut in the rows")
    ratios_here: dict[str, float] = Field(default_factory=dict, description="this model's own, on this machine")
    rows: list[QualityRow]
    sample_prompts: list[str] = Field(default_factory=list, description="what each row's samples show, in their order")
