"""Schedules that name a cut for each shallow call, compared with a loop over the engines' calls."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import offcut
from offcut.errors import CutError, ScheduleError
from offcut.runtime.generation.forecast import Coefficients, Extrapolate, Forecast
from offcut.runtime.generation.schedule import Schedule
from offcut.runtime.tuning.steps import TunedSteps

BY_CALL = (
    None, None, "deepcache:0", "mlperf", "deepcache:2", None, "mlperf", "deepcache:0", "deepcache:2", "mlperf",
)  # fmt: skip
"""``mlperf`` and ``deepcache:2`` share a feature."""

CALLS = len(BY_CALL)
SCHEDULE = TunedSteps((0, 1, 5), CALLS, BY_CALL)


@dataclass(frozen=True)
class EveryOtherCall(Forecast):
    """Predicts at even calls and reuses at odd ones, which must restore features that a prediction overwrote."""

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        return Coefficients(1.1, 0.5 * (call - last), 0.01) if call % 2 == 0 else None


def inputs(unet: offcut.UNet, call: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of a call, with the latents twice, as with guidance."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(call))
    width = unet.config["cross_attention_dim"]
    text = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(99))
    return torch.cat([latent, latent]), torch.tensor(900.0 - 50 * call), text


def run(
    unet: offcut.UNet,
    schedule: Schedule,
    forecast: Forecast | None = None,
    *,
    cut: str | None = None,
    reuse_guidance: bool = False,
) -> list[torch.Tensor]:
    unet.set_schedule(schedule, cut, forecast, reuse_guidance=reuse_guidance)
    with unet.generation(CALLS, guided=True):
        return [unet(*inputs(unet, call)).sample for call in range(CALLS)]


def run_engine_calls(unet: offcut.UNet, forecast: Forecast | None) -> list[torch.Tensor]:
    unet.set_schedule(None)
    unet(*inputs(unet, 0))
    bound = unet.bound
    assert bound is not None
    names = {name for cut in BY_CALL if cut is not None for name in unet.cut_features[cut]}
    full_calls: list[tuple[int, dict[str, torch.Tensor]]] = []
    outputs = []
    for call, cut in enumerate(BY_CALL):
        sample, timestep, text = inputs(unet, call)
        bound.buffers["sample"].copy_(sample)
        bound.buffers["timestep"].fill_(float(timestep))
        bound.buffers["encoder_hidden_states"].copy_(text)
        if cut is None:
            bound.full()
            full_calls = [(call, {name: bound.buffers[name].clone() for name in names}), *full_calls[:1]]
        else:
            (last, latest), (before, older) = full_calls[0], full_calls[1]
            for name in unet.cut_features[cut]:
                coefficients = None if forecast is None else forecast.at(name, call, last, before)
                coefficients = coefficients or Coefficients()
                assert isinstance(coefficients.slope, float)
                change = coefficients.slope * (latest[name] - older[name])
                bound.buffers[name].copy_(coefficients.scale * latest[name] + change + coefficients.shift)
            bound.shallow(cut)
        outputs.append(bound.buffers["noise_pred"].clone())
    return outputs


@pytest.mark.parametrize("forecast", [None, Extrapolate(1.0), EveryOtherCall()], ids=str)
def test_calls_equal_a_loop_over_the_engine_calls(unet: offcut.UNet, forecast: Forecast | None) -> None:
    for expected, actual in zip(run_engine_calls(unet, forecast), run(unet, SCHEDULE, forecast), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert unet.last_run is not None
    assert unet.last_run.cuts == BY_CALL
    assert unet.last_run.timeline == "##...#...."


def test_cuts_share_features_and_give_different_outputs(unet: offcut.UNet) -> None:
    """Precondition of the test above, which otherwise could not tell the cuts apart."""
    assert set(unet.cut_features["mlperf"]) & set(unet.cut_features["deepcache:2"])
    mixed = run(unet, SCHEDULE)
    for cut in ("deepcache:0", "mlperf", "deepcache:2"):
        alone = run(unet, TunedSteps((0, 1, 5), CALLS), cut=cut)
        for call, named in enumerate(BY_CALL):
            same = torch.equal(mixed[call], alone[call])
            assert same == (named in (None, cut)), (cut, call)


def test_a_schedule_with_one_cut_for_all_calls_equals_setting_that_cut(unet: offcut.UNet) -> None:
    named = tuple(None if cut is None else "deepcache:2" for cut in BY_CALL)
    expected = run(unet, TunedSteps((0, 1, 5), CALLS), Extrapolate(0.5), cut="deepcache:2")
    actual = run(unet, TunedSteps((0, 1, 5), CALLS, named), Extrapolate(0.5), cut="deepcache:0")
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
    assert unet.last_run is not None
    assert unet.last_run.cuts == named
    assert unet.last_run.cut == "deepcache:0"


def test_reused_guidance_follows_the_cut_of_the_call(unet: offcut.UNet) -> None:
    """The half with the prompt is the same with and without ``reuse_guidance``."""
    for forecast in (None, EveryOtherCall()):
        plain, reused = run(unet, SCHEDULE, forecast), run(unet, SCHEDULE, forecast, reuse_guidance=True)
        for call in range(CALLS):
            torch.testing.assert_close(reused[call][1:], plain[call][1:], rtol=1e-4, atol=1e-4)


def test_the_run_records_the_cut_of_every_call(unet: offcut.UNet) -> None:
    run(unet, offcut.Uniform(5), cut="deepcache:1")
    assert unet.last_run is not None
    assert unet.last_run.cuts == (None, *["deepcache:1"] * 4, None, *["deepcache:1"] * 4)


def test_missing_cuts_are_refused(unet: offcut.UNet) -> None:
    missing = TunedSteps((0,), 3, (None, "deepcache:1", "deepcache:11"))
    with pytest.raises(CutError, match=r"calls at the cut 'deepcache:11', and this UNet has only deepcache:0, "):
        unet.set_schedule(missing)
    full = TunedSteps((0, 2), 3, (None, "deepcache:1", "deepcache:11"))  # the call with the missing cut is full
    unet.set_schedule(full)
    assert unet.schedule == full


def test_schedules_with_cuts_compare_by_value() -> None:
    assert SCHEDULE.cuts == ("deepcache:0", "mlperf", "deepcache:2")
    assert TunedSteps((0,), 3).cuts == offcut.Uniform(3).cuts == (None,)
    assert TunedSteps((0, 1), 2).cuts == ()
    assert TunedSteps((0,), 3, (None, "a", None)).cuts == ("a", None)
    assert TunedSteps((0, 1, 5), CALLS) != SCHEDULE
    assert hash(SCHEDULE) == hash(TunedSteps((0, 1, 5), CALLS, BY_CALL))
    assert str(TunedSteps((0,), 2, (None, "a"))) == "tuned:0:total=2:by_call=none,a"
    with pytest.raises(ScheduleError, match="2 cuts were given for 3 UNet calls: give one for each"):
        TunedSteps((0,), 3, (None, "a"))
