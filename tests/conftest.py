"""Session fixtures: small diffusers models with random weights, and bundles built from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from filelock import FileLock
from support.exports import export_once
from support.families import save_family_model
from support.foreign import save_as_optimum
from support.models import save_small_pipeline, save_stable_diffusion, save_stable_diffusion_xl, save_unet
from support.unets import save_family
from support.videos import save_video_pipeline

import offcut
from offcut.benchmarks.shapes.model import model_path
from offcut.cli import main
from offcut.exporter.trace.export import ExportedUNet

pytest_plugins = ["support.tiers"]

ENGINES = ["onnxruntime", "openvino"]
VIDEO_CUTS = ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]
TINY_CUTS = ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "deepcache:4", "mlperf"]


def pytest_configure(config: pytest.Config) -> None:
    """Give the builds of all test processes one export cache and record of trust, which stay for the next run.

    ``OFFCUT_TEST_CACHE`` names another directory.
    """
    folder = os.environ.get("OFFCUT_TEST_CACHE") or str(config.rootpath / ".pytest_cache" / "offcut")
    os.environ["OFFCUT_CACHE"] = folder
    os.environ["OFFCUT_DATA"] = folder
    os.environ["OFFCUT_CACHE_SIZE"] = "2"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Run eager PyTorch on one thread: layers with few channels are several times faster so."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that makes a directory once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        path, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return make_once


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def tiny_pipeline_dir(once: Once) -> Path:
    """A StableDiffusionPipeline with SD 1.5's topology: 4 levels, 2 layers a block, 12 skip connections."""
    return once("tiny-sd", save_stable_diffusion)


@pytest.fixture(scope="session")
def tiny_unet_dir(once: Once) -> Path:
    """A bare UNet of two levels, one layer a block: quick to export."""
    return once("tiny-unet", save_unet)


@pytest.fixture(scope="session")
def small_pipeline_dir(once: Once) -> Path:
    """A StableDiffusionPipeline around the UNet of ``tiny_unet_dir``."""
    return once("small-pipeline", save_small_pipeline)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pipeline_dir: Path, once: Once) -> Path:
    """``tiny_pipeline_dir`` as a bundle with every engine that runs here."""
    return once("tiny-sd.offcut", lambda path: offcut.build(tiny_pipeline_dir, path, cuts=TINY_CUTS, engine=ENGINES))


@pytest.fixture(scope="session")
def one_cut_bundle(tiny_pipeline_dir: Path, once: Once) -> Path:
    """``tiny_pipeline_dir`` as a bundle with one cut, for LoRAs: OpenVINO compiles every graph at each change."""
    return once("tiny-sd-one-cut.offcut", lambda path: offcut.build(tiny_pipeline_dir, path, engine=ENGINES))


@pytest.fixture(scope="session")
def sdxl_pipeline_dir(once: Once) -> Path:
    """A StableDiffusionXLPipeline of SDXL's topology, with both text encoders."""
    return once("tiny-sdxl", save_stable_diffusion_xl)


@pytest.fixture(scope="session")
def foreign_dir(tiny_pipeline_dir: Path, once: Once) -> Path:
    """``tiny_pipeline_dir`` as optimum exports it: ONNX, and no weights of PyTorch."""
    return once("tiny-sd-elsewhere", lambda path: save_as_optimum(tiny_pipeline_dir, path))


@pytest.fixture(scope="session")
def foreign_bundle(foreign_dir: Path, once: Once) -> Path:
    """The same as a bundle with every engine that runs here."""
    return once("elsewhere.offcut", lambda path: offcut.build(foreign_dir, path, cuts=TINY_CUTS, engine=ENGINES))


@pytest.fixture(scope="session")
def unet_export(
    tiny_unet_dir: Path, once: Once, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, ExportedUNet]]:
    """Return a function from a name of ``unets.SKIPS`` to model and fp32 export; ``plain`` is ``tiny_unet_dir``."""
    exports: dict[str, ExportedUNet] = {}

    def get(name: str) -> tuple[Path, ExportedUNet]:
        model = tiny_unet_dir if name == "plain" else once(f"unet-{name}", lambda path: save_family(name, path))
        if name not in exports:
            exports[name] = export_once(model, tmp_path_factory.mktemp(f"unet-{name}-fp32"))
        return model, exports[name]

    return get


@pytest.fixture(scope="session")
def unet_bundle(tiny_unet_dir: Path, once: Once) -> Path:
    """``tiny_unet_dir`` as a UNet-only bundle."""
    return once("tiny-unet.offcut", lambda path: offcut.build(tiny_unet_dir, path, engine=ENGINES))


@pytest.fixture(scope="session")
def shapes_bundle(once: Once) -> Path:
    """The shapes model as a bundle for ONNX Runtime. A test that adds to the bundle takes a copy."""

    def build(path: Path) -> None:
        offcut.build(model_path(), path, cuts=["deepcache:0", "deepcache:3"], engine="onnxruntime")

    return once("shapes.offcut", build)


@pytest.fixture(scope="session")
def video_dir(once: Once) -> Callable[[str], Path]:
    """Return a function from a name of ``videos.SKIPS`` to its pipeline's directory."""
    return lambda name: once(f"tiny-{name}", lambda path: save_video_pipeline(name, path))


@pytest.fixture(scope="session")
def video_bundle(video_dir: Callable[[str], Path], once: Once) -> Callable[[str], Path]:
    """Return a function from a name of ``videos.SKIPS`` to a bundle with every cut, on both CPU engines."""

    def get(name: str) -> Path:
        model = video_dir(name)
        return once(f"tiny-{name}.offcut", lambda path: offcut.build(model, path, cuts=VIDEO_CUTS, engine=ENGINES))

    return get


@pytest.fixture(scope="session")
def family_model(tiny_pipeline_dir: Path, once: Once) -> Callable[[str], Path]:
    """Return a function from a name of ``families.UNETS`` or ``families.UNCONDITIONALS`` to the model's directory."""
    return lambda name: once(f"family-{name}", lambda path: save_family_model(name, path, tiny_pipeline_dir))


@pytest.fixture(scope="session")
def family_bundle(family_model: Callable[[str], Path], once: Once) -> Callable[[str], Path]:
    """Return a function from a name of ``family_model`` to its bundle for ONNX Runtime, with one cut."""

    def get(name: str) -> Path:
        model = family_model(name)
        return once(f"family-{name}.offcut", lambda path: offcut.build(model, path, engine="onnxruntime"))

    return get


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies a bundle, for a test that changes or damages it."""
    import shutil

    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / bundle.name))

    return copy


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Return a function that runs ``offcut`` in this process: returns its output, with ``fails`` its error line."""
    levels = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]

    def run(*arguments: str | Path, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["offcut", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == int(fails), said.out + said.err
        if not fails:
            return said.out
        lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said.err
        return lines[0]

    yield run
    for library, level in zip((diffusers, transformers), levels, strict=True):
        library.utils.logging.set_verbosity(level)
        library.utils.logging.enable_progress_bar()
