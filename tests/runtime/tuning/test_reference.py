"""Tuning of an engine in low precision towards a reference in fp32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import offcut
from offcut import Tuned
from offcut.benchmarks.shapes.model import PROMPTS, model_path
from offcut.cli import app
from offcut.errors import ScheduleError, UserError
from offcut.runtime.text_to_image import generate_from_prompt
from offcut.runtime.tuning.artifact import choose, make_key, save
from offcut.runtime.tuning.recording import FeatureRecorder
from offcut.runtime.tuning.tune import tune
from offcut.runtime.tuning.tuning_request import TuningRequest

STEPS, ENGINE, LOW = 8, "openvino", "bf16"  # not int8, whose calibration takes minutes


def test_the_reference_is_called_with_the_same_inputs(tiny_bundle: Path) -> None:
    """A reference with the same weights has the same features, on full and on shallow calls."""
    unet, other = (offcut.UNet.load(tiny_bundle, "onnxruntime", threads=1) for _ in range(2))
    assert unet.precision == "fp32"
    recorder = FeatureRecorder(unet, ("deep_feature_0",), positions=16, reference=other)
    width = unet.config["cross_attention_dim"]
    unet.set_schedule(offcut.Uniform(2))
    unet.advise = False
    random = torch.Generator().manual_seed(0)
    with recorder.watch(), unet.generation(4):
        for call in range(4):
            sample, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, width, generator=random)
            unet(sample, torch.tensor(900.0 - 50 * call), encoder_hidden_states=text)
    computed, true = recorder.computed["deep_feature_0"], recorder.true["deep_feature_0"]
    assert len(computed) == len(true) == 4
    for one, expected in zip(computed, true, strict=True):
        assert torch.allclose(one, expected, atol=1e-5)
    sums = recorder.empty_moments()
    recorder.add_to(sums)
    assert sums["deep_feature_0"].sums.shape[1] == 8
    unet.close()
    other.close()


@pytest.fixture(scope="module")
def shapes(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(shapes_bundle, tmp_path_factory.mktemp("joint") / "shapes.offcut"))
    for precision in (None, LOW):
        offcut.build(model_path(), path, engine=ENGINE, inference_precision=precision)
    return path


@pytest.fixture(scope="module")
def pipes(shapes: Path) -> Iterator[dict[str, Any]]:
    loaded = {
        precision: offcut.load(shapes, ENGINE, inference_precision=precision, threads=1) for precision in ("fp32", LOW)
    }
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    yield loaded
    for pipe in loaded.values():
        pipe.unet.close()


@pytest.mark.slow
def test_low_precision_is_tuned_towards_fp32(shapes: Path, pipes: dict[str, Any]) -> None:
    bundle, pipe = offcut.Bundle.open(shapes), pipes[LOW]
    settings: dict[str, Any] = {"steps": STEPS, "guidance": (3.0, 3.0), "samples": 4, "prompts": PROMPTS, "probes": 2}
    request = TuningRequest(speed_up=1.6, ratios={"deepcache:0": 0.1}, **settings)
    tuned = tune(pipe, bundle, "joint", request, lambda stage: None, pipes["fp32"])
    assert tuned.document.reference == f"{ENGINE} fp32"
    assert tuned.document.key.precision == LOW
    names = [row.name for row in tuned.document.measured]
    assert names[-2] == "uncached"
    uncached = tuned.document.measured[-2]
    assert uncached.full_calls == STEPS

    save(bundle, tuned)
    loaded = Tuned.load(offcut.Bundle.open(shapes), "joint")
    assert loaded.document == tuned.document
    loaded.apply(pipe.unet)
    pixels = generate_from_prompt(pipe, PROMPTS[0], steps=STEPS, guidance=3.0, seed=1, size=None, output="np").images[0]
    assert np.isfinite(pixels).all()
    bundle = offcut.Bundle.open(shapes)
    assert choose(bundle, make_key(bundle, pipe.scheduler, STEPS, (3.0, 3.0), LOW)).name == "joint"
    for precision, reason in (("fp32", "this engine is in fp32"), (None, "this engine is in another")):
        with pytest.raises(ScheduleError, match=f"corrects the error of {LOW}, and {reason}"):
            choose(bundle, make_key(bundle, pipe.scheduler, STEPS, (3.0, 3.0), precision))


@pytest.mark.slow
def test_a_reference_needs_the_same_weights_and_higher_precision(shapes: Path, tiny_bundle: Path) -> None:
    arguments = ["tune", str(shapes), "--budget", "2x", "--engine", ENGINE, "--threads", "1"]
    other = CliRunner().invoke(app, [*arguments, "--precision", LOW, "--reference", str(tiny_bundle)])
    assert isinstance(other.exception, UserError)
    assert "was built from other weights" in str(other.exception)
    same = CliRunner().invoke(app, [*arguments, "--precision", "fp32", "--reference", str(shapes)])
    assert isinstance(same.exception, UserError)
    assert f"no build of {ENGINE} in higher precision than fp32" in str(same.exception)


@pytest.mark.slow
def test_the_command_takes_a_reference(shapes: Path, copied: Callable[[Path], Path]) -> None:
    copy = copied(shapes)
    options = ["--steps", "6", "--guidance", "3", "--samples", "4", "--engine", ENGINE, "--threads", "1", "--json"]
    arguments = [
        "tune",
        str(copy),
        "--budget",
        "1.5x",
        "--precision",
        LOW,
        "--reference",
        str(copy),
        "--no-skip",
        *options,
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["reference"], document["key"]["precision"]) == (f"{ENGINE} fp32", LOW)
