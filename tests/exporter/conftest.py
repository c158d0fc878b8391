"""Exports that several files look at, made once a session."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from unets import save_family

from offcut.exporter.trace import ExportedUNet, export


@dataclass(frozen=True)
class Family:
    """A model of one family and its export in fp32."""

    model: Path
    graph: ExportedUNet


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """The export of one of ``unets.SKIPS``, shared by the processes of pytest-xdist too."""
    made: dict[str, Family] = {}
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str) -> Family:
        folder = root / f"family-{name}"
        with FileLock(root / f"family-{name}.lock"):
            if not (folder / "made").is_file():
                model = save_family(name, folder / "model")
                (folder / "made").write_bytes(pickle.dumps(Family(model, export(model, folder / "export"))))
        if name not in made:
            made[name] = pickle.loads((folder / "made").read_bytes())
        return made[name]

    return get


@pytest.fixture(scope="session")
def static(plain: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """``plain`` with every dimension fixed: batch 2, latents of 6x12, 7 tokens."""
    dims = {"batch": 2, "height": 6, "width": 12, "sequence": 7}
    return Family(plain.model, export(plain.model, tmp_path_factory.mktemp("static"), dims=dims))


@pytest.fixture(scope="session")
def plain(family: Callable[[str], Family]) -> Family:
    """A UNet2DConditionModel of two levels, one layer a block: 4 skip connections."""
    return family("plain")
