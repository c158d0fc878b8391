"""Bundles and pairs that several files look at. One export serves them all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import offcut
import offcut.engines.variants as variants_module
from offcut.engines.base import EnginePair
from offcut.exporter.trace import ExportedUNet

UNET_CUTS = ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]


@pytest.fixture(scope="session")
def made(unet_bundle: Path) -> ExportedUNet:
    """The export of ``tiny_unet_dir`` that ``unet_bundle`` was built from; its graph has one output more."""
    bundle = offcut.Bundle.open(unet_bundle)
    variant = bundle.manifest.variants["fp32-opset23"]
    assert variant.graphs is not None
    return ExportedUNet(
        path=unet_bundle / variant.graphs.full,
        weights=unet_bundle / variant.graphs.weights,
        inputs={tensor.name: tensor.spec() for tensor in variant.inputs},
        outputs={"noise_pred": variant.noise_pred.spec()},
        parameters={},
        reference=unet_bundle / variant.reference,
        precision="fp32",
        opset=23,
        multiple=variant.multiple,
    )


@pytest.fixture
def quick_export(made: ExportedUNet, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Builds of ``tiny_unet_dir`` copy its export in place of making it again. Gives the directories exported to."""
    exports: list[Path] = []

    def export(source: Any, out: Path, **_: Any) -> ExportedUNet:
        exports.append(out)
        return copy_export(made, out)

    monkeypatch.setattr(variants_module, "export", export)
    return exports


def copy_export(made: ExportedUNet, out: Path) -> ExportedUNet:
    """An export's files under the names that ``export`` gives them."""
    from dataclasses import replace

    out.mkdir(parents=True)
    shutil.copyfile(made.path, out / "unet.onnx")
    for file in (made.weights, made.reference, made.path.parent / "parameters.json"):
        shutil.copyfile(file, out / file.name)
    return replace(made, path=out / "unet.onnx", weights=out / "weights.data", reference=out / made.reference.name)


@pytest.fixture(scope="session")
def every_cut(tiny_unet_dir: Path, made: ExportedUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_unet_dir`` with every cut, on both engines."""
    path = tmp_path_factory.mktemp("bundles") / "every-cut.offcut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants_module, "export", lambda source, out, **_: copy_export(made, out))
        offcut.build(tiny_unet_dir, path, cuts=UNET_CUTS, engine=["onnxruntime", "openvino"])
    return path


@pytest.fixture
def open_pair(every_cut: Path) -> Iterator[Callable[..., EnginePair]]:
    """Open an engine of ``every_cut``, or of another bundle; closed at the end."""
    opened: list[EnginePair] = []

    def get(engine: str, bundle: Path = every_cut, **options: Any) -> EnginePair:
        pair = offcut.Bundle.open(bundle).open_pair(engine, **options)
        opened.append(pair)
        return pair

    yield get
    for pair in opened:
        pair.close()


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which an engine is given a graph to read."""
    import offcut.engines.onnxruntime as onnxruntime_module
    import offcut.engines.openvino as openvino_module

    def refuse(*args: object) -> None:
        pytest.fail("a graph was deserialised")

    monkeypatch.setattr(onnxruntime_module, "open", refuse)
    monkeypatch.setattr(openvino_module, "open", refuse)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a directory but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
