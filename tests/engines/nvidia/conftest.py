"""The module of TensorRT-RTX, if it is installed, and jobs that compile the tiny UNet."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import offcut
from offcut.engines.base import CompileJob, Graphs
from offcut.engines.nvidia.build_settings import SETTINGS_RTX
from offcut.engines.nvidia.library import TENSORRT_RTX, load
from offcut.engines.profiles import Profile
from offcut.errors import EngineError
from offcut.exporter.load import locate

STATIC = Profile.of({"batch": (2,) * 3, "height": (8,) * 3, "width": (12,) * 3, "sequence": (7,) * 3})
DYNAMIC = Profile.of({"batch": (1, 2, 6), "height": (4, 8, 16), "width": (4, 8, 16), "sequence": (1, 7, 77)})
PROFILES = (STATIC, DYNAMIC)


@pytest.fixture(scope="session")
def trt() -> Any:
    """The module ``tensorrt_rtx``; Polygraphy uses it too."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    try:
        return load(TENSORRT_RTX)
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture
def messages() -> list[str]:
    """The progress messages of a compilation."""
    return []


@pytest.fixture
def onnx_graphs(unet_bundle: Path, tmp_path: Path) -> Graphs:
    """A copy of the full graph and of the shallow graph of ``deepcache:0``, with their weights."""
    bundle = offcut.Bundle.open(unet_bundle)
    entry = bundle.entry("onnxruntime")
    folder = Path(shutil.copytree((unet_bundle / entry.full).parent, tmp_path / "onnx"))
    graphs = bundle.graphs(entry)
    return Graphs(
        full=folder / graphs.full.name,
        shallow={cut: folder / path.name for cut, path in graphs.shallow.items()},
        inputs=graphs.inputs,
        outputs=graphs.outputs,
        cuts=graphs.cuts,
        multiple=graphs.multiple,
        precision=graphs.precision,
    )


@pytest.fixture
def job(onnx_graphs: Graphs, tiny_unet_dir: Path, tmp_path: Path, messages: list[str]) -> Callable[..., CompileJob]:
    """Return a function that makes a compile job for TensorRT-RTX, for one compute capability by default."""
    folder = tmp_path / "compiled"
    folder.mkdir()

    def make(graphs: Graphs = onnx_graphs, profiles: tuple[Profile, ...] = PROFILES, **settings: Any) -> CompileJob:
        return CompileJob(
            graphs=graphs,
            source=locate(tiny_unet_dir, revision=None, variant=None, subfolder=None),
            fixed={},
            profiles=profiles,
            settings={**SETTINGS_RTX, "compute_capabilities": ("89",), **settings},
            device="cpu",
            folder=folder,
            progress=messages.append,
        )

    return make
