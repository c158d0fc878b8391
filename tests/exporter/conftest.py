"""Exports that several files look at, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from unets import save_family

from offcut.exporter.trace import ExportedUNet, export


@dataclass(frozen=True)
class Family:
    """A model of one family and its export in fp32."""

    model: Path
    graph: ExportedUNet


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """The export of one of ``unets.SKIPS``."""
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = save_family(name, folder / "model")
            made[name] = Family(model, export(model, folder / "export"))
        return made[name]

    return get


@pytest.fixture(scope="session")
def plain(family: Callable[[str], Family]) -> Family:
    """A UNet2DConditionModel of two levels, one layer a block: 4 skip connections."""
    return family("plain")
