"""Skipped calls: their output, that they run no engine, and that other calls do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import offcut
from offcut.errors import CutError
from offcut.runtime.batching import Worker
from offcut.runtime.batching.request import Step
from offcut.runtime.generation.correction import Convolutions, Correction, Kernel
from offcut.runtime.generation.forecast import Coefficients, Forecast
from offcut.runtime.generation.schedule import SKIP, Schedule
from offcut.runtime.tuning.steps import FittedForecast, TunedSteps

BY_CALL = (None, "deepcache:0", SKIP, SKIP, None, SKIP, "deepcache:0", SKIP)
CALLS = len(BY_CALL)
MIXED = TunedSteps((0, 4), CALLS, BY_CALL)


def inputs(unet: offcut.UNet, call: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of a call, with the latents twice, as with guidance."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(call))
    text = torch.randn(2, 77, unet.config["cross_attention_dim"], generator=torch.Generator().manual_seed(99))
    return torch.cat([latent, latent]), torch.tensor(900.0 - 50 * call), text


def run(
    unet: offcut.UNet, schedule: Schedule, forecast: Forecast | None = None, cut: str | None = None, **settings: Any
) -> list[torch.Tensor]:
    unet.set_schedule(schedule, cut, forecast, **settings)
    with unet.generation(CALLS, guided=True):
        return [unet(*inputs(unet, call)).sample for call in range(CALLS)]


@pytest.mark.parametrize("reuse_guidance", [False, True])
def test_a_skipped_call_returns_the_output_of_the_call_before(unet: offcut.UNet, reuse_guidance: bool) -> None:
    outputs = run(unet, MIXED, reuse_guidance=reuse_guidance)
    shallow = run(unet, TunedSteps((0, 4), CALLS), cut="deepcache:0", reuse_guidance=reuse_guidance)
    for call, cut in enumerate(BY_CALL):
        if cut == SKIP:
            assert torch.equal(outputs[call], outputs[call - 1])
            assert outputs[call].data_ptr() != outputs[call - 1].data_ptr()
            assert not torch.equal(outputs[call], shallow[call])
        else:
            assert torch.equal(outputs[call], shallow[call])


def test_a_skipped_call_runs_no_engine(unet: offcut.UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    run(unet, MIXED)
    bound = unet.bound
    assert bound is not None
    calls: list[str] = []
    full, shallow = bound.full, bound.shallow
    monkeypatch.setattr(bound, "full", lambda: (calls.append("full"), full()), raising=True)
    monkeypatch.setattr(bound, "shallow", lambda cut: (calls.append(cut), shallow(cut)), raising=True)
    unet.record_times = True
    try:
        run(unet, MIXED)
    finally:
        unet.record_times = False
    assert calls == ["full", "deepcache:0", "full", "deepcache:0"]
    last_run = unet.last_run
    assert last_run is not None
    assert last_run.cuts == BY_CALL
    assert last_run.timeline == "#.__#_._"
    assert last_run.full_calls == (0, 4)
    assert [seconds == 0 for seconds in last_run.seconds] == [cut == SKIP for cut in BY_CALL]


def test_skip_can_be_the_cut_of_all_calls(unet: offcut.UNet) -> None:
    outputs = run(unet, offcut.Uniform(3), cut=SKIP)
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#__#__#_"
    full = run(unet, offcut.Uniform(1))
    assert all(torch.equal(each, full[call - call % 3]) for call, each in enumerate(outputs))


def test_the_call_after_a_reset_is_full(unet: offcut.UNet) -> None:
    unet.set_schedule(offcut.Uniform(4), SKIP)
    with unet.generation(CALLS):
        unet(*inputs(unet, 0))
        unet.reset()
        unet(*inputs(unet, 1))
        unet(*inputs(unet, 2))
    assert unet.last_run is not None
    assert unet.last_run.timeline == "##_"


def test_unknown_cuts_are_refused(unet: offcut.UNet) -> None:
    with pytest.raises(CutError, match="was not built with the cut 'skipped'"):
        unet.set_schedule(offcut.Uniform(2), "skipped")


def correction(unet: offcut.UNet) -> Correction:
    """Return a correction of every call but the first, which adds parts of the output and the sample, and a shift."""
    kernels = {}
    for call in range(1, CALLS):
        inputs_seen = 4 * (2 + 2 * sum(full < call for full in (0, 4)) + (call not in (1, 5)))
        weight = torch.zeros(4, inputs_seen, 1, 1)
        for channel in range(4):
            weight[channel, channel] = 0.01 * call
            weight[channel, 4 + channel] = 0.1
        kernels[call] = Kernel(weight, torch.full((4,), 0.5))
    return Convolutions(kernels, (0, 4))


def test_a_skipped_call_is_corrected_from_the_last_output_and_the_new_sample(unet: offcut.UNet) -> None:
    plain, corrected = run(unet, MIXED), run(unet, MIXED, FittedForecast({}, (0, 4), correction(unet)))
    for call in range(1, CALLS):
        sample = inputs(unet, call)[0]
        torch.testing.assert_close(
            corrected[call], plain[call] + 0.01 * call * plain[call] + 0.1 * sample + 0.5, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("predicts", [False, True])
def test_requests_of_a_worker_can_skip_calls(pipe: Any, predicts: bool) -> None:
    calls = {call: {"none": Coefficients()} for call in range(CALLS)} if predicts else {}
    forecast = FittedForecast(calls, (0, 4), correction(pipe.unet)) if predicts else None
    settings = {"num_inference_steps": CALLS, "output_type": "latent", "guidance_scale": 3.0}

    def arguments(seed: int) -> dict[str, Any]:
        return {"prompt": "a", "generator": torch.Generator().manual_seed(seed), **settings}

    alone = []
    for seed in range(3):
        pipe.unet.set_schedule(MIXED, None, forecast)
        alone.append(pipe(**arguments(seed)).images)
    steps: list[Step] = []
    with Worker(pipe, max_in_flight=3) as worker:
        tickets = [
            worker.submit(arguments(seed), schedule=MIXED, forecast=forecast, on_step=steps.append) for seed in range(3)
        ]
        shared = [ticket.future.result().images for ticket in tickets]
        assert worker.statistics().slots == 0
    for one, other in zip(alone, shared, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    kinds = [(step.full, step.rows == 0) for step in sorted(steps, key=lambda step: step.call)][::3]
    assert kinds == [(cut is None, cut == SKIP) for cut in BY_CALL]
