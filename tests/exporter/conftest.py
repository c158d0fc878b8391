"""Exports that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from offcut.exporter.trace.export import ExportedUNet, export


@dataclass(frozen=True)
class Family:
    """A model of one family and its export in fp32."""

    model: Path
    graph: ExportedUNet


@pytest.fixture(scope="session")
def family(unet_export: Callable[[str], tuple[Path, ExportedUNet]]) -> Callable[[str], Family]:
    """Return a function from a name of ``unets.SKIPS`` to the model and its export."""
    return lambda name: Family(*unet_export(name))


@pytest.fixture(scope="session")
def static(plain: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """``plain`` with every dimension fixed: batch 2, latents of 6x12, 7 tokens."""
    dims = {"batch": 2, "height": 6, "width": 12, "sequence": 7}
    return Family(plain.model, export(plain.model, tmp_path_factory.mktemp("static"), dims=dims))


@pytest.fixture(scope="session")
def plain(family: Callable[[str], Family]) -> Family:
    """A UNet2DConditionModel of two levels, one layer a block: 4 skip connections."""
    return family("plain")
