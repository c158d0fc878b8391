"""Engine calls, records and errors of a calibration."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import offcut
from offcut.engines.base import BoundPair, EnginePair
from offcut.errors import UserError
from offcut.exporter.load import locate


class RecordedPair:
    """Engine pair that records each call with the shape of the latents."""

    def __init__(self, pair: EnginePair) -> None:
        self._pair = pair
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> BoundPair:
        bound = self._pair.prepare(shapes)
        full, shallow, calls = bound.full, bound.shallow, self.calls

        def recorded_full() -> None:
            calls.append(("full", tuple(bound.buffers["sample"].shape)))
            full()

        def recorded_shallow(cut: str) -> None:
            calls.append((cut, tuple(bound.buffers["sample"].shape)))
            shallow(cut)

        bound.full, bound.shallow = recorded_full, recorded_shallow  # type: ignore[method-assign]
        return bound


def test_a_pipeline_is_run_on_its_prompts_through_every_cut(tiny_bundle: Path, tiny_pipeline_dir: Path) -> None:
    pair = RecordedPair(offcut.Bundle.open(tiny_bundle).open_pair("onnxruntime"))
    calibration = offcut.Calibration(prompts=("a", "b"), samples=2, steps=5, interval=2, warmup=0)
    calibration.run(pair, locate(tiny_pipeline_dir), lambda step: None)
    names = [name for name, _ in pair.calls]
    first, second = list(pair.cuts)[:2]
    assert names == ["full", first, "full", first, "full", "full", second, "full", second, "full"]
    assert {shape for _, shape in pair.calls} == {(2, 4, 16, 16)}, "with guidance, at the model's own size"
    pair.close()


def test_a_bare_unet_denoises_noise_and_reports_it(unet_bundle: Path, tiny_unet_dir: Path) -> None:
    pair = RecordedPair(offcut.Bundle.open(unet_bundle).open_pair("onnxruntime"))
    messages: list[str] = []
    offcut.Calibration(samples=1, steps=4, interval=2, warmup=0).run(pair, locate(tiny_unet_dir), messages.append)
    assert [name for name, _ in pair.calls] == ["full", "deepcache:0", "full", "deepcache:0"]
    assert any("denoised from noise" in message for message in messages)
    pair.close()


def test_the_record_contains_a_digest_of_the_prompts(tiny_unet_dir: Path, tmp_path: Path) -> None:
    source, own = locate(tiny_unet_dir), locate(shutil.copytree(tiny_unet_dir, tmp_path / "own"))
    (tmp_path / "own" / "prompts.txt").write_text("a\n")
    one, other = (offcut.Calibration(prompts=(prompt,)).record(source) for prompt in "ab")
    assert one != other
    assert one == offcut.Calibration(prompts=("a",)).record(source) == offcut.Calibration().record(own)
    assert offcut.Calibration().record(source) not in (one, other)
    assert "a" not in one.values()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"interval": 0}, "interval is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"method": "guess"}, "no method 'guess'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        offcut.Calibration(**settings)


def test_noise_is_the_same_for_the_same_seed(unet_bundle: Path, tiny_unet_dir: Path) -> None:
    latents = []
    for _ in range(2):
        pair = offcut.Bundle.open(unet_bundle).open_pair("onnxruntime")
        buffers: list[torch.Tensor] = []
        recorded = RecordedPair(pair)
        prepare = recorded.prepare

        def prepare_and_record(shapes: Any, prepare: Any = prepare, buffers: Any = buffers) -> BoundPair:
            bound = prepare(shapes)
            buffers.append(bound.buffers["noise_pred"])
            return bound

        recorded.prepare = prepare_and_record  # type: ignore[method-assign]
        offcut.Calibration(samples=1, steps=3).run(recorded, locate(tiny_unet_dir), lambda step: None)
        latents.append(buffers[0].clone())
        pair.close()
    assert torch.equal(*latents)
    assert latents[0].abs().max() > 0
