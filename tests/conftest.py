"""Small real models, made once a session: real architectures of diffusers with few channels and random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from models import save_stable_diffusion, save_unet

import offcut

ENGINES = ["onnxruntime", "openvino"]
TINY_CUTS = ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "deepcache:4", "mlperf"]


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline with SD 1.5's topology: 4 levels, 2 layers a block, 12 skip connections."""
    return save_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_unet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare UNet of two levels, one layer a block: quick to export."""
    return save_unet(tmp_path_factory.mktemp("models") / "tiny-unet")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_pipeline_dir`` as a bundle with every engine that runs here."""
    path = tmp_path_factory.mktemp("bundles") / "tiny-sd.offcut"
    offcut.build(tiny_pipeline_dir, path, cuts=TINY_CUTS, engine=ENGINES)
    return path


@pytest.fixture(scope="session")
def unet_bundle(tiny_unet_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_unet_dir`` as a UNet-only bundle."""
    path = tmp_path_factory.mktemp("bundles") / "tiny-unet.offcut"
    offcut.build(tiny_unet_dir, path, engine=ENGINES)
    return path


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a bundle for a test that damages it."""
    import shutil

    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / bundle.name))

    return copy
