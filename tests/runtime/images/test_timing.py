"""Times of an image by component, from Python and in ``offcut inspect --time``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import offcut
from offcut.cli import app
from offcut.runtime.generation.schedule import Uniform
from offcut.runtime.images.request import ImageRequest
from offcut.runtime.images.timing import REST, time_components


def test_calls_of_every_component_are_counted_and_shares_add_up_to_one(tiny_bundle: Path) -> None:
    pipe = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    pipe.unet.advise = False
    parts = {part.name: part for part in time_components(pipe, ImageRequest("a red square", steps=6), Uniform(3))}
    counts = {name: part.calls for name, part in parts.items()}
    assert counts == {"text_encoder": 2, "unet full": 2, "unet shallow": 4, "vae decode": 1, REST: 1}
    assert sum(part.share for part in parts.values()) == pytest.approx(1)
    assert all(part.seconds > 0 for part in parts.values())
    assert parts["unet full"].runs_in == "onnxruntime"
    assert parts["vae decode"].runs_in == "PyTorch"
    assert "decode" not in vars(pipe.vae)
    assert "forward" not in vars(pipe.text_encoder)


def test_inspect_shows_the_times(tiny_bundle: Path) -> None:
    from typer.testing import CliRunner

    arguments = ["inspect", str(tiny_bundle), "--time", "--engine", "onnxruntime", "--steps", "4", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    names = [part["name"] for part in json.loads(result.stdout)["parts"]]
    assert {"unet full", "unet shallow", "vae decode"} < set(names)
