"""Exports that are kept, or taken from a bundle, and copied in place of being made again."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import offcut
from offcut.engines.builder import variants
from offcut.exporter.trace.export import ExportedUNet


def exported(path: Path) -> ExportedUNet:
    """The export that a bundle was built from; its graph has the features as further outputs."""
    bundle = offcut.Bundle.open(path)
    variant = bundle.manifest.variants["fp32-opset23"]
    assert variant.graphs is not None
    return ExportedUNet(
        path=path / variant.graphs.full,
        weights=path / variant.graphs.weights,
        inputs={tensor.name: tensor.spec() for tensor in variant.inputs},
        outputs={"noise_pred": variant.noise_pred.spec()},
        parameters={},
        reference=path / variant.reference,
        precision="fp32",
        opset=23,
        multiple=variant.multiple,
    )


def copy_export(made: ExportedUNet, out: Path) -> ExportedUNet:
    """An export's files under the names that ``export`` gives them."""
    out.mkdir(parents=True)
    shutil.copyfile(made.path, out / "unet.onnx")
    for file in (made.weights, made.reference, made.path.parent / "parameters.json"):
        shutil.copyfile(file, out / file.name)
    return replace(made, path=out / "unet.onnx", weights=out / "weights.data", reference=out / made.reference.name)


def keep(made: ExportedUNet, folder: Path) -> None:
    """For ``kept``, in any of the processes that run the tests."""
    (folder / "export").write_bytes(pickle.dumps(made))


def kept(folder: Path) -> ExportedUNet:
    made = pickle.loads((folder / "export").read_bytes())
    assert isinstance(made, ExportedUNet)
    return made


def build_from(model: Path, made: ExportedUNet, bundle: Path, **options: Any) -> offcut.Bundle:
    """``offcut.build`` that copies the model's export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "export", lambda source, out, **_: copy_export(made, out))
        return offcut.build(model, bundle, **options)
