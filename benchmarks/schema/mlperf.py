"""Result of ``offcut bench mlperf``: LoadGen's verdicts and figures, with the settings of the runs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Scenario = Literal["SingleStream", "Offline", "Server"]


class ScenarioRun(BaseModel):
    """One LoadGen test."""

    model_config = ConfigDict(extra="forbid")

    scenario: Scenario
    caching: str | None = Field(description="schedule and cut as text; None where every call is full")
    valid: bool = Field(description="LoadGen's verdict, for the shortened setting")
    reasons: list[str] = Field(default_factory=list, description="LoadGen's reasons where the run is not valid")
    metric: str = Field(description="LoadGen's name of the result")
    value: float = Field(description="the result: seconds for a latency, otherwise images a second")
    images: int = Field(description="images generated for LoadGen's queries")
    latencies: dict[str, float] = Field(default_factory=dict, description="seconds by LoadGen's name: mean, 50.00, ...")
    accuracy: float | None = Field(None, description="share of prompts obeyed, 0..1, by the judge network")
    accuracy_images: int = 0
    settings: dict[str, str] = Field(description="LoadGen's settings, with MLPerf's own in brackets")


class MlPerf(BaseModel):
    """The runs with one model; model, data set and durations are not MLPerf's, so this is no submission."""

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: str
    steps: int
    guidance: float
    scheduler: str
    batch: int = Field(description="maximum number of images that share a UNet call")
    loadgen: str = Field(description="version of LoadGen")
    runs: list[ScenarioRun]
