"""Schedules whose shallow calls have cuts of their own, beside the same written plainly with the engines' calls."""

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
class EveryOther(Forecast):
    """Predicts at even calls and reuses at odd ones, where earlier predictions have to be taken back."""

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        return Coefficients(1.1, 0.5 * (call - last), 0.01) if call % 2 == 0 else None


def inputs(unet: offcut.UNet, call: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latents twice, as guidance has it."""
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


def by_hand(unet: offcut.UNet, forecast: Forecast | None) -> list[torch.Tensor]:
    unet.set_schedule(None)
    unet(*inputs(unet, 0))
    bound = unet.bound
    assert bound is not None
    names = {name for cut in BY_CALL if cut is not None for name in unet.cut_features[cut]}
    kept: list[tuple[int, dict[str, torch.Tensor]]] = []
    made = []
    for call, cut in enumerate(BY_CALL):
        sample, timestep, text = inputs(unet, call)
        bound.buffers["sample"].copy_(sample)
        bound.buffers["timestep"].fill_(float(timestep))
        bound.buffers["encoder_hidden_states"].copy_(text)
        if cut is None:
            bound.full()
            kept = [(call, {name: bound.buffers[name].clone() for name in names}), *kept[:1]]
        else:
            (last, latest), (before, older) = kept[0], kept[1]
            for name in unet.cut_features[cut]:
                by = None if forecast is None else forecast.at(name, call, last, before)
                by = by or Coefficients()
                assert isinstance(by.slope, float)
                ahead = by.slope * (latest[name] - older[name])
                bound.buffers[name].copy_(by.scale * latest[name] + ahead + by.shift)
            bound.shallow(cut)
        made.append(bound.buffers["noise_pred"].clone())
    return made


@pytest.mark.parametrize("forecast", [None, Extrapolate(1.0), EveryOther()], ids=str)
def test_calls_equal_a_plain_implementation(unet: offcut.UNet, forecast: Forecast | None) -> None:
    for expected, got in zip(by_hand(unet, forecast), run(unet, SCHEDULE, forecast), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert unet.last_run is not None
    assert unet.last_run.cuts == BY_CALL
    assert unet.last_run.timeline == "##...#...."


def test_cuts_share_features_and_give_different_outputs(unet: offcut.UNet) -> None:
    """Else the test above would show little."""
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
    got = run(unet, TunedSteps((0, 1, 5), CALLS, named), Extrapolate(0.5), cut="deepcache:0")
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    assert unet.last_run is not None
    assert unet.last_run.cuts == named
    assert unet.last_run.cut == "deepcache:0"


def test_reused_guidance_follows_the_cut_of_the_call(unet: offcut.UNet) -> None:
    """The half with the prompt is as it is without reuse."""
    for forecast in (None, EveryOther()):
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
    full = TunedSteps((0, 2), 3, (None, "deepcache:1", "deepcache:11"))  # that call is full
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
    with pytest.raises(ScheduleError, match="2 cuts cannot serve 3 UNet calls"):
        TunedSteps((0,), 3, (None, "a"))
