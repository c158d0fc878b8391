"""Attack: tuned schedules whose files do not fit the bundle. Each is refused before a generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import offcut
from offcut.engines.bundle.bundle import digest_file
from offcut.errors import BundleError
from offcut.runtime.tuning import artifact
from offcut.runtime.tuning.artifact import Tuned
from offcut.runtime.tuning.document import ReportRow, TunedDocument, TuningKey

CALLS = 6


@pytest.fixture(scope="module")
def feature(tiny_bundle: Path) -> tuple[str, int]:
    """Name and channels of the cached feature of deepcache:0."""
    variant = next(iter(offcut.Bundle.open(tiny_bundle).manifest.variants.values()))
    tensor = next(cut for cut in variant.cuts if cut.name == "deepcache:0").cached[0]
    assert isinstance(tensor.shape[1], int)
    return tensor.name, tensor.shape[1]


@pytest.fixture
def bundle(tiny_bundle: Path, copied: Callable[[Path], Path]) -> Path:
    bundle = copied(tiny_bundle)
    opened = offcut.Bundle.open(bundle)
    row = ReportRow(name="tuned", full_calls=2, shallow_calls=4, speed_up=2, psnr=30, worst=20)
    key = TuningKey(
        weights=opened.manifest.source.weights_digest,
        scheduler="DDIMScheduler",
        settings="0" * 64,
        steps=CALLS,
        calls=CALLS,
        guidance=(5, 5),
    )
    document = TunedDocument(
        key=key,
        cut="deepcache:0",
        full=(0, 3),
        predictors=("full", "fit", "fit") * 2,
        corrected=(1,),
        correction_guidance=5.0,
        engine="onnxruntime",
        shallow_over_full=0.2,
        samples={"fit": 1},
        measured=(row,),
    )
    artifact.save(opened, Tuned("mine", document, {}))
    return bundle


def replaced(bundle: Path, file: str, content: bytes) -> Path:
    """Replace a file of the schedule, and its digest in the manifest."""
    manifest = json.loads((bundle / "offcut.json").read_text())
    name = manifest["schedules"]["mine"][file]
    (bundle / name).write_bytes(content)
    manifest["files"][name] = {"size": len(content), "sha256": digest_file(bundle / name)}
    (bundle / "offcut.json").write_text(json.dumps(manifest))
    return bundle


def with_tensors(bundle: Path, **changed: Any) -> Path:
    kernel = {"1.correction.weight": torch.zeros(4, 8, 3, 3), "1.correction.bias": torch.zeros(4)}
    tensors = kernel | changed
    return replaced(bundle, "coefficients", save({key: t for key, t in tensors.items() if t is not None}))


def test_files_that_fit_are_loaded(bundle: Path, feature: tuple[str, int]) -> None:
    name, channels = feature
    tuned = Tuned.load(with_tensors(bundle, **{f"2.{name}.scale": torch.ones(channels)}), "mine")
    assert list(tuned.coefficients) == [2]
    assert tuned.correction is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": torch.ones(1)},
        {"..": torch.ones(1)},
        {"-1.{feature}.scale": torch.ones(1)},
        {"6.{feature}.scale": torch.ones(1)},
        {"99999999999999999999.{feature}.scale": torch.ones(1)},
        {"one.{feature}.scale": torch.ones(1)},
        {"2.{feature}.other": torch.ones(1)},
        {"2.noise_pred.scale": torch.ones(1)},
        {"2.{feature}.scale": torch.ones(3)},
        {"2.{feature}.scale": torch.ones(1, 1)},
        {"2.{feature}.scale": torch.ones(0)},
        {"2.{feature}.scale": torch.tensor(1.0)},
        {"2.{feature}.scale": torch.tensor([float("nan")])},
        {"2.{feature}.slope": torch.tensor([float("inf")])},
        {"2.{feature}.shift": torch.ones(1, dtype=torch.int64)},
        {"2.{feature}.shift": torch.ones(1, dtype=torch.float16)},
        {"1.correction.bias": torch.zeros(5)},
        {"1.correction.bias": None},
        {"1.correction.weight": torch.zeros(4, 8, 2, 2)},
        {"1.correction.weight": torch.zeros(4, 8, 3)},
        {"1.correction.weight": torch.zeros(4, 1, 33, 33)},
        {"1.correction.weight": torch.full((4, 8, 3, 3), float("nan"))},
        {"2.correction.weight": torch.zeros(4, 8, 3, 3), "2.correction.bias": torch.zeros(4)},
        {"1.correction.weight": None, "1.correction.bias": None},
    ],
    ids=lambda changed: ", ".join(
        f"{key} {None if value is None else list(value.shape)}" for key, value in changed.items()
    ),
)
def test_tensors_that_do_not_fit_are_refused(
    changed: dict[str, torch.Tensor | None], bundle: Path, feature: tuple[str, int]
) -> None:
    named = {key.replace("{feature}", feature[0]): tensor for key, tensor in changed.items()}
    with pytest.raises(BundleError, match="is damaged") as caught:
        Tuned.load(with_tensors(bundle, **named), "mine")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, (2**40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{}"]
)
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, bundle: Path) -> None:
    with pytest.raises(BundleError, match="is damaged"):
        Tuned.load(replaced(bundle, "coefficients", content), "mine")


@pytest.mark.parametrize(
    "change",
    [
        {"full": []},
        {"full": [3]},
        {"full": [0, 0]},
        {"full": [0, 6]},
        {"full": [0, -1]},
        {"cuts": ["deepcache:0"]},
        {"predictors": []},
        {"measured": []},
        {"corrected": [6]},
        {"key": {"calls": 10**12}},
        {"key": {"calls": 0}},
        {"key": {"guidance": [float("nan"), 5]}},
        {"shallow_over_full": float("inf")},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit_together_is_refused(change: dict[str, Any], bundle: Path) -> None:
    manifest = json.loads((bundle / "offcut.json").read_text())
    document = json.loads((bundle / manifest["schedules"]["mine"]["document"]).read_text())
    for key, value in change.items():
        document[key] = document[key] | value if isinstance(value, dict) else value
    with pytest.raises(BundleError, match="is damaged"):
        Tuned.load(replaced(with_tensors(bundle), "document", json.dumps(document).encode()), "mine")


def test_a_cut_that_the_bundle_does_not_have_is_refused_before_a_generation(bundle: Path) -> None:
    manifest = json.loads((bundle / "offcut.json").read_text())
    document = json.loads((bundle / manifest["schedules"]["mine"]["document"]).read_text())
    document["cut"] = "deepcache:77"
    tuned = Tuned.load(replaced(with_tensors(bundle), "document", json.dumps(document).encode()), "mine")
    unet = offcut.UNet.load(bundle, "onnxruntime", threads=1)
    with pytest.raises(offcut.errors.UserError):
        tuned.apply(unet)
    unet.close()
