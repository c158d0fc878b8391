"""Body of a generation request: the fields of OpenAI's image API, and those that offcut adds."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class GenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``.

    Fields up to ``partial_images`` are OpenAI's. OpenAI's other fields are refused like every unknown field: a
    misspelt field that is ignored would return an image that nobody asked for. ``None`` means the server's default.

    Attributes:
        model: name of a served model.
        n: number of images; image ``i`` is generated with ``seed + i``.
        size: ``WIDTHxHEIGHT`` in pixels, or ``auto``.
        quality, background, moderation: accepted for OpenAI's clients, without effect.
        user: accepted, but neither stored nor logged.
        stream: send server-sent events: one per UNet call, previews, then the image.
        partial_images: number of previews in the stream.
        interval, warmup: run the full UNet every ``interval`` calls, and for the first ``warmup`` calls. Costs quality.
        schedule: replaces the interval, e.g. ``quad:5`` (see ``generation.schedule.parse``); ``auto`` or
            ``tuned:NAME`` for a schedule that ``offcut tune`` made. Costs quality.
        forecast: damping with which cached features are extrapolated; 0 reuses them.
        cut: name of one of the bundle's cuts.
        timeout: seconds until the request is given up; the server's own timeout stays an upper bound.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    model: Annotated[str, Field(max_length=256)] | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(max_length=16)] | None = None
    response_format: Annotated[str, Field(max_length=16)] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None

    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[FiniteFloat, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    interval: Annotated[int, Field(ge=1, le=1000)] | None = None
    warmup: Annotated[int, Field(ge=0, le=1000)] | None = None
    schedule: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    forecast: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    cut: Annotated[str, Field(max_length=64)] | None = None
    timeout: Annotated[FiniteFloat, Field(gt=0)] | None = None

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str | None) -> str | None:
        if size is not None and size != "auto" and not SIZE.fullmatch(size):
            raise ValueError("write WIDTHxHEIGHT in pixels, such as 512x512, or auto")
        return size

    @field_validator("response_format")
    @classmethod
    def _check_response_format(cls, response_format: str | None) -> str | None:
        if response_format == "url":
            raise ValueError("this server stores no images that a URL could lead to: ask for b64_json")
        if response_format not in (None, "b64_json"):
            raise ValueError("ask for b64_json")
        return response_format

    @model_validator(mode="after")
    def _check_combination(self) -> GenerationRequest:
        if self.schedule is not None and self.interval is not None:
            raise ValueError("give interval or schedule, not both")
        if self.stream and (self.n or 1) > 1:
            raise ValueError("a stream has one image: leave out n or stream")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images come in a stream: add stream=true")
        return self

    def pixels(self) -> tuple[int, int] | None:
        """Return width and height in pixels; None for the model's default size."""
        match = SIZE.fullmatch(self.size or "")
        return None if match is None else (int(match[1]), int(match[2]))
