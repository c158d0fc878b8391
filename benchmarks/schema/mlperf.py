"""What ``offcut bench mlperf`` measured: LoadGen's own verdict and figures, beside the setting they hold for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Scenario = Literal["SingleStream", "Offline", "Server"]


class ScenarioRun(BaseModel):
    """One LoadGen test."""

    model_config = ConfigDict(extra="forbid")

    scenario: Scenario
    caching: str | None = Field(description="the schedule and cut in words; None where every call is full")
    valid: bool = Field(description="LoadGen's verdict, for the shortened setting")
    reasons: list[str] = Field(default_factory=list, description="LoadGen's, where it is not valid")
    metric: str = Field(description="what LoadGen calls the scenario's result")
    value: float = Field(description="of that metric: seconds for a latency, images per second otherwise")
    images: int = Field(description="drawn for the queries that LoadGen issued")
    latencies: dict[str, float] = Field(default_factory=dict, description="seconds by LoadGen's name: mean, 50.00, ...")
    accuracy: float | None = Field(None, description="share of the prompts that the judge found obeyed, 0..1")
    accuracy_images: int = 0
    settings: dict[str, str] = Field(description="of LoadGen, as they differ from MLPerf's")


class MlPerf(BaseModel):
    """The runs on one model. Not a submission: the model, the data set and the durations are others."""

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: str
    steps: int
    guidance: float
    scheduler: str
    batch: int = Field(description="most images that share a UNet call")
    loadgen: str = Field(description="its version")
    runs: list[ScenarioRun]
