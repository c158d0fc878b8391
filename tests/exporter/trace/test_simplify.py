"""Simplified graphs equal those of onnxscript's optimizer, which takes longer."""

from collections.abc import Callable
from pathlib import Path

import pytest

import offcut
from offcut.exporter.trace import convert
from offcut.exporter.trace.export import ExportedUNet


@pytest.mark.slow
def test_the_graph_equals_that_of_onnxscripts_optimizer(
    unet_export: Callable[[str], tuple[Path, ExportedUNet]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxscript.optimizer import optimize_ir

    model, ours = unet_export("plain")
    monkeypatch.setattr(convert, "simplify", optimize_ir)
    theirs = offcut.export(model, tmp_path / "theirs")
    assert ours.path.read_bytes() == theirs.path.read_bytes()
