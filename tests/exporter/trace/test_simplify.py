"""Simpler graphs, in less time than onnxscript's optimizer takes."""

from collections.abc import Callable
from pathlib import Path

import pytest

import offcut
from offcut.exporter.trace import convert
from offcut.exporter.trace.export import ExportedUNet


@pytest.mark.slow
def test_the_graph_is_the_one_that_onnxscripts_optimizer_makes(
    unet_export: Callable[[str], tuple[Path, ExportedUNet]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxscript.optimizer import optimize_ir

    model, ours = unet_export("plain")
    monkeypatch.setattr(convert, "simplify", optimize_ir)
    theirs = offcut.export(model, tmp_path / "theirs")
    assert ours.path.read_bytes() == theirs.path.read_bytes()
