"""Forecasts: bit-exact reuse, predictions by the documented formula, and independent generations."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offcut
from offcut.engines.base import BoundPair
from offcut.errors import ScheduleError
from offcut.runtime.generation.features import CachedFeatures, CallPart, FeatureBuffers
from offcut.runtime.generation.forecast import Coefficients, Extrapolate, Forecast, write

FEATURE, CUT, CALLS = "deep_feature_0", "deepcache:0", 10


@dataclass(frozen=True)
class Fixed(Forecast):
    """Forecast with the same coefficients at every shallow call."""

    coefficients: Coefficients | None

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        return self.coefficients


def inputs(unet: offcut.UNet, call: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(call)
    width = unet.config["cross_attention_dim"]
    text = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(2, 4, size, size, generator=made), torch.tensor(900.0 - 50 * call), text


def run(unet: offcut.UNet, forecast: Forecast | None, interval: int = 3, warmup: int = 2) -> list[torch.Tensor]:
    unet.set_schedule(offcut.Uniform(interval, warmup=warmup), CUT, forecast)
    with unet.generation(CALLS):
        return [unet(*inputs(unet, call)).sample for call in range(CALLS)]


def plain_implementation(
    unet: offcut.UNet, coefficients: object, interval: int = 3, warmup: int = 2
) -> list[torch.Tensor]:
    """Return the outputs from direct engine calls and the formula of the module's docstring."""
    unet.set_schedule(None)
    unet(*inputs(unet, 0))
    bound = unet.bound
    assert bound is not None
    full = set(offcut.Uniform(interval, warmup=warmup).full_calls(CALLS))
    full_features: list[tuple[int, torch.Tensor]] = []
    made = []
    for call in range(CALLS):
        sample, timestep, text = inputs(unet, call)
        bound.buffers["sample"].copy_(sample)
        bound.buffers["timestep"].fill_(float(timestep))
        bound.buffers["encoder_hidden_states"].copy_(text)
        if call in full:
            bound.full()
            full_features = [(call, bound.buffers[FEATURE].clone()), *full_features[:1]]
        else:
            (last, latest), (before, older) = full_features[0], full_features[-1]
            assert callable(coefficients)
            scale, slope, shift = (torch.as_tensor(value) for value in coefficients(call, last, before))
            shape = (1, -1, 1, 1)
            predicted = scale.reshape(shape) * latest + slope.reshape(shape) * (latest - older) + shift.reshape(shape)
            bound.buffers[FEATURE].copy_(predicted)
            bound.shallow(CUT)
        made.append(bound.buffers["noise_pred"].clone())
    return made


def channels(unet: offcut.UNet) -> int:
    unet.set_schedule(None)
    unet(*inputs(unet, 0))
    assert unet.bound is not None
    return int(unet.bound.buffers[FEATURE].shape[1])


def test_coefficients_that_mean_reuse_give_the_outputs_of_reuse(unet: offcut.UNet) -> None:
    plain = run(unet, None)
    count = channels(unet)
    tensors = Coefficients(torch.ones(count), torch.zeros(count), torch.zeros(count))
    for forecast in (Extrapolate(0.0), Fixed(None), Fixed(Coefficients()), Fixed(tensors)):
        for expected, actual in zip(plain, run(unet, forecast), strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_an_extrapolation_follows_the_formula(unet: offcut.UNet, damping: float) -> None:
    def formula(call: int, last: int, before: int) -> tuple[float, float, float]:
        return 1.0, damping * (call - last) / (last - before), 0.0

    for expected, actual in zip(plain_implementation(unet, formula), run(unet, Extrapolate(damping)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_coefficients_by_channel_follow_the_formula(unet: offcut.UNet) -> None:
    count = channels(unet)
    made = torch.Generator().manual_seed(1)
    scale, slope, shift = (torch.randn(count, generator=made) for _ in range(3))
    fixed = Fixed(Coefficients(scale, slope, shift))
    expected = plain_implementation(unet, lambda call, last, before: (scale, slope, shift))
    for expected_output, actual in zip(expected, run(unet, fixed), strict=True):
        torch.testing.assert_close(actual, expected_output, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected[-1], run(unet, None)[-1])


def test_after_one_full_call_features_are_reused(unet: offcut.UNet) -> None:
    """The first shallow calls of every generation reuse features: the last generation's features are not used."""
    plain, again = run(unet, None, warmup=0), run(unet, Extrapolate(1.0), warmup=0)
    twice = run(unet, Extrapolate(1.0), warmup=0)
    for call in range(3):
        assert torch.equal(plain[call], again[call])
    assert not torch.equal(plain[4], again[4])
    assert all(torch.equal(one, other) for one, other in zip(again, twice, strict=True))


def test_other_shapes_in_a_generation_restart_the_history(unet: offcut.UNet) -> None:
    unet.set_schedule(offcut.Uniform(3), CUT, Extrapolate(1.0))
    with unet.generation(8):
        for call in range(4):
            unet(*inputs(unet, call))
        changed = [unet(*inputs(unet, call, size=16)).sample for call in (4, 5)]
    unet.set_schedule(offcut.Steps([0]), CUT)
    with unet.generation(2):
        fresh = [unet(*inputs(unet, call, size=16)).sample for call in (4, 5)]
    assert all(torch.equal(one, other) for one, other in zip(changed, fresh, strict=True))


def test_without_a_schedule_there_is_no_forecast(unet: offcut.UNet) -> None:
    unet.set_schedule(None, forecast=Extrapolate())
    assert unet.forecast is None
    unet.set_schedule(offcut.Uniform(2), forecast=Extrapolate(0.25))
    assert unet.forecast == Extrapolate(0.25)


@pytest.mark.parametrize("damping", [-0.1, 1.1])
def test_damping_outside_0_to_1_is_refused(damping: float) -> None:
    with pytest.raises(ScheduleError, match="from 0"):
        Extrapolate(damping)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.sampled_from([torch.float32, torch.float16]))
def test_numbers_and_tensors_give_the_same_prediction(
    scale: float, slope: float, shift: float, dtype: torch.dtype
) -> None:
    latest, before = torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)
    one, other = torch.empty_like(latest), torch.empty_like(latest)
    write(one, latest, before, Coefficients(scale, slope, shift))
    write(other, latest, before, Coefficients(*(torch.full((3,), value) for value in (scale, slope, shift))))
    expected = scale * latest.double() + slope * (latest.double() - before.double()) + shift
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for actual in (one, other):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_full_calls_cost_one_copy_into_two_buffers() -> None:
    """The buffers of the last two full calls alternate, and none is allocated after the first full call."""

    class Bound:
        def __init__(self) -> None:
            self.buffers = {FEATURE: torch.zeros(1, 2, 2, 2)}

    bound: BoundPair = Bound()  # type: ignore[assignment]
    features, buffers = CachedFeatures(Extrapolate(1.0)), FeatureBuffers(in_place=True)
    addresses = []
    for call in range(4):
        bound.buffers[FEATURE].fill_(call)
        features.allocate(bound, [FEATURE])
        buffers.record_full(bound, [CallPart(features, call, 1)], 1, [FEATURE])
        addresses.append(features.latest[FEATURE].data_ptr())
    assert addresses[0] == addresses[2] != addresses[1] == addresses[3]
    assert buffers.fill(bound, [CallPart(features, 5, 1)], 1, [FEATURE])
    assert torch.equal(bound.buffers[FEATURE], torch.full((1, 2, 2, 2), 5.0))
