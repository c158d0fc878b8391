"""Advice against caching in few steps: given once for each UNet, and only where it applies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler
from PIL import Image
from test_cli import run_in_new_process as command

from offcut.runtime.generation.advice import caching_advice, lora_advice
from offcut.runtime.generation.schedule import Quad, Schedule, Steps, Uniform
from offcut.runtime.tuning.steps import TunedSteps

PHRASE = "caching is unlikely to pay"


@pytest.mark.parametrize(
    ("schedule", "calls", "scheduler", "config", "reason"),
    [
        (Uniform(3), 14, DDIMScheduler(), {}, "14 UNet calls, fewer than 15"),
        (Uniform(3), 15, DDIMScheduler(), {}, None),
        (Uniform(3), 4, None, {}, "4 UNet calls"),
        (Uniform(3), 50, LCMScheduler(), {}, "LCMScheduler makes images in few"),
        (Uniform(3), 50, TCDScheduler(), {}, "TCDScheduler"),
        (Uniform(3), 50, DDIMScheduler(), {"time_cond_proj_dim": 256}, "distilled"),
        (Uniform(3), 50, DDIMScheduler(), {"time_cond_proj_dim": None}, None),
        (Quad(2, center=2), 8, DDIMScheduler(), {}, "8 UNet calls"),
        # Nothing is cached in any of these.
        (None, 4, LCMScheduler(), {}, None),
        (Uniform(1), 4, LCMScheduler(), {}, None),
        (Uniform(3), 1, LCMScheduler(), {}, None),
        (Steps(range(8)), 8, DDIMScheduler(), {}, None),
        (Uniform(3, warmup=4), 4, DDIMScheduler(), {}, None),
        (TunedSteps((0, 4), 8), 8, DDIMScheduler(), {}, None),  # tuning has compared it with fewer steps
    ],
)
def test_only_generations_with_few_or_large_steps_get_advice(
    schedule: Schedule | None, calls: int, scheduler: Any, config: dict[str, Any], reason: str | None
) -> None:
    advice = caching_advice(schedule, calls, config, scheduler)
    if reason is None:
        assert advice is None
    else:
        assert advice is not None
        assert reason in advice
        assert PHRASE in advice
        assert "fewer steps without caching" in advice


def test_tuned_schedules_with_loras_get_advice() -> None:
    tuned = TunedSteps((0, 4), 8)
    assert "tuned without the LoRA style, ink:" in (lora_advice(tuned, ["style", "ink"]) or "")
    assert lora_advice(tuned, []) is lora_advice(Uniform(3), ["style"]) is lora_advice(None, ["style"]) is None


@pytest.mark.parametrize("engine", ["onnxruntime"])
def test_advice_is_logged_once_and_changes_nothing(
    pipe: Any, generate: Callable[..., torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    unet = pipe.unet
    unet.advise = True
    with caplog.at_level(logging.WARNING, logger="offcut"):
        generate(pipe, steps=4)  # every call full
        unet.set_schedule(Uniform(3))
        generate(pipe, steps=15)
        with unet.generation(calls=20):
            pass
        assert PHRASE not in caplog.text
        first = generate(pipe, steps=4)
        assert caplog.text.count(PHRASE) == 1
        assert torch.equal(generate(pipe, steps=4), first)
        assert caplog.text.count(PHRASE) == 1
        unet.advise = True
        with unet.generation(calls=4):
            assert caplog.text.count(PHRASE) == 2
        unet.advise = True
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        generate(pipe, steps=20)
    assert caplog.text.count("LCMScheduler makes") == 1


@pytest.mark.slow
def test_run_prints_the_advice_once_on_stderr(tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    few_steps = ["run", tiny_bundle, "a cat", "-o", picture, "--engine", "onnxruntime", "--warmup", "0", "--compare"]
    result = command(*few_steps, "--steps", "4", "--json")
    assert result.returncode == 0, result.stderr
    assert "".join(result.stderr.split("\n")).count(PHRASE) == 1
    assert PHRASE not in result.stdout
    assert Image.open(picture).size[0] > 0
    many_steps = command(*few_steps, "--steps", "16")
    assert many_steps.returncode == 0, many_steps.stderr
    assert PHRASE not in many_steps.stderr
