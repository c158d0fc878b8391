"""``build``: results, reuse, refused requests, and failures, which change nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import offcut
import offcut.engines.builder.resolve as resolve_module
import offcut.engines.builder.variants as variants_module
import offcut.engines.builder.verify as verify_module
from offcut.engines.registry import Choice
from offcut.errors import BundleError, CutError, EngineError, ModelError, ParityError, UserError
from offcut.exporter.trace.reference import Reference

from ..conftest import contents

Copy = Callable[[Path], Path]
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Progress(list[str]):
    """The progress messages of a build."""

    def __call__(self, sentence: str) -> None:
        self.append(sentence)


def build(model: Path, out: Path, **options: Any) -> tuple[offcut.Bundle, Progress]:
    progress = Progress()
    return offcut.build(model, out, **{"engine": "onnxruntime", **options}, progress=progress), progress


# ---- results


def test_the_stages_are_announced(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    _, progress = build(tiny_unet_dir, tmp_path / "b")
    assert progress == [
        f"reuse the export in {os.environ['OFFCUT_CACHE']}/exports",
        "cut",
        "verify onnxruntime",
        "commit",
    ]


def test_auto_reports_its_choice_and_the_reason(
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve_module, "choose", lambda device: Choice("openvino", "the moon is full"))
    bundle, progress = build(tiny_unet_dir, tmp_path / "b", engine="auto")
    assert progress[0] == "engine openvino: the moon is full"
    assert bundle.engines == ["openvino"]


def test_the_manifest_records_the_source_of_the_model(unet_bundle: Path, tiny_unet_dir: Path) -> None:
    import hashlib

    source = offcut.Bundle.open(unet_bundle).manifest.source
    weights = hashlib.sha256((tiny_unet_dir / WEIGHTS).read_bytes()).hexdigest()
    assert source.weights_digest == hashlib.sha256(weights.encode()).hexdigest()
    assert (source.model, source.revision, source.variant) == (str(tiny_unet_dir), None, None)


def test_pipeline_files_are_copied_unchanged(tiny_bundle: Path, tiny_pipeline_dir: Path) -> None:
    parts = offcut.Bundle.open(tiny_bundle).manifest.parts
    assert "vae/diffusion_pytorch_model.safetensors" in parts
    assert not any(part.startswith("unet/") for part in parts)
    for part in parts:
        assert (tiny_bundle / part).read_bytes() == (tiny_pipeline_dir / part).read_bytes()


def test_aliases_of_a_cut_are_one_cut(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    bundle, _ = build(tiny_unet_dir, tmp_path / "b", cuts=["paper:0", "deepcache:1", "paper:0"])
    assert bundle.cuts == ["deepcache:1"]
    assert bundle.manifest.variants["fp32-opset23"].cuts[0].aliases == ("paper:0",)


def test_a_string_is_one_cut(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    bundle, _ = build(tiny_unet_dir, tmp_path / "b", cuts="mlperf")
    assert bundle.cuts == ["mlperf"]


# ---- reuse


@pytest.mark.smoke
def test_a_second_build_reuses_everything_and_reports_it(
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]
) -> None:
    first, _ = build(tiny_unet_dir, tmp_path / "b")
    before = contents(tmp_path / "b")
    second, progress = build(tiny_unet_dir, tmp_path / "b")
    (key,) = first.manifest.engines
    assert progress == ["reuse the export fp32-opset23 and its graphs", f"reuse {key}", "commit"]
    assert contents(tmp_path / "b") == before
    assert second.digest == first.digest
    assert len(quick_export) == 1


def test_another_engine_uses_the_same_graphs(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    build(tiny_unet_dir, tmp_path / "b")
    before = contents(tmp_path / "b")
    bundle, progress = build(tiny_unet_dir, tmp_path / "b", engine="openvino")
    assert progress == ["reuse the export fp32-opset23 and its graphs", "verify openvino", "commit"]
    assert bundle.engines == ["onnxruntime", "openvino"]
    assert {entry.full for entry in bundle.manifest.engines.values()} == {"unet/fp32-opset23/full.onnx"}
    after = contents(tmp_path / "b")
    assert {name: after[name] for name in before if name != "offcut.json"} == {
        name: content for name, content in before.items() if name != "offcut.json"
    }
    assert len(quick_export) == 1


@pytest.mark.smoke
def test_another_cut_needs_no_other_export(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    first, _ = build(tiny_unet_dir, tmp_path / "b", engine=["onnxruntime", "openvino"])
    weights = tmp_path / "b" / "unet" / "fp32-opset23" / "weights.data"
    inode = weights.stat().st_ino
    before = contents(tmp_path / "b")

    bundle, progress = build(tiny_unet_dir, tmp_path / "b", cuts=["mlperf"])
    assert progress[0] == "reuse the export fp32-opset23, cut it again"
    assert len(quick_export) == 1
    # No earlier file has changed, and the bundle holds one copy of the weights.
    after = contents(tmp_path / "b")
    assert all(after[name] == content for name, content in before.items() if name != "offcut.json")
    assert weights.stat().st_ino == inode
    assert weights.stat().st_nlink == 1
    assert len(list((tmp_path / "b").rglob("*.data"))) == 1

    bundle.verify_files()
    assert bundle.cuts == ["deepcache:0", "mlperf"]
    # The engine that was not built again still has its own pair.
    old = bundle.entry("openvino")
    assert old.full == first.entry("openvino").full
    assert bundle.open_pair("openvino").cuts.keys() == {"deepcache:0"}
    assert bundle.open_pair("onnxruntime").cuts.keys() == {"deepcache:0", "mlperf"}

    again, progress = build(tiny_unet_dir, tmp_path / "b", cuts=["deepcache:0", "mlperf"])
    assert progress[0] == "reuse the export fp32-opset23 and its graphs"
    assert again.digest == bundle.digest


def test_altered_files_are_not_reused(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    """The altered file is refused before it is read."""
    build(tiny_unet_dir, tmp_path / "b")
    (tmp_path / "b" / "unet" / "fp32-opset23" / "full.onnx").write_bytes(b"\0" * 10)
    with pytest.raises(BundleError, match=r"full\.onnx has 10 bytes"):
        build(tiny_unet_dir, tmp_path / "b", engine="openvino")


# ---- refused


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is exported."""
    monkeypatch.setattr(variants_module, "cached_export", lambda *args, **options: pytest.fail("a model was exported"))


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        (
            {"engine": "tensorflow"},
            EngineError,
            "there is no engine 'tensorflow'; choose auto or one of tensorrt, tensorrt-rtx, openvino",
        ),
        ({"engine": ["onnxruntime", "tpu"]}, EngineError, "there is no engine 'tpu'"),
        ({"engine": []}, EngineError, "no engine was named"),
        ({"engine": "onnxruntime", "precision": "bf16"}, EngineError, "onnxruntime cannot run bf16: .* it runs fp32"),
        ({"precision": "fp8"}, EngineError, "cannot run fp8"),
        ({"precision": "int8"}, EngineError, "int8 needs calibration: pass calibration=offcut.Calibration"),
        ({"inference_precision": "bf16"}, EngineError, "onnxruntime cannot run fp32 computed in bf16"),
        ({"cuts": ["everything"]}, CutError, "'everything' is not a valid cut name: write deepcache:K"),
        ({"cuts": []}, CutError, "no cut was named: write deepcache:K"),
    ],
    ids=str,
)
def test_an_invalid_request_is_refused_before_the_export(
    options: dict[str, Any], kind: type[UserError], sentence: str, tiny_unet_dir: Path, tmp_path: Path, no_export: None
) -> None:
    with pytest.raises(kind, match=sentence):
        build(tiny_unet_dir, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_an_engine_that_is_not_usable_is_refused_before_the_export(
    tiny_unet_dir: Path, tmp_path: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import offcut.engines.openvino as module
    from offcut.engines.base import EngineProbe

    reason = "not installed: pip install 'offcut[cpu]'"
    monkeypatch.setattr(module, "probe", lambda: EngineProbe(None, (), reason))
    with pytest.raises(EngineError, match=r"openvino cannot be used here: not installed: pip install 'offcut\[cpu\]'"):
        build(tiny_unet_dir, tmp_path / "b", engine="openvino")
    assert not (tmp_path / "b").exists()


def test_a_missing_cut_is_refused_and_leaves_no_files(
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]
) -> None:
    with pytest.raises(CutError, match="this UNet has no cut 'deepcache:7'"):
        build(tiny_unet_dir, tmp_path / "b", cuts=["deepcache:7"])
    assert not (tmp_path / "b").exists()


def test_another_model_is_refused(
    tiny_unet_dir: Path, unet_bundle: Path, copied: Copy, tmp_path: Path, no_export: None
) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_unet_dir, tmp_path / "other"))
    tensors = load_file(other / WEIGHTS)
    tensors["conv_in.bias"] += 1e-3
    save_file(tensors, other / WEIGHTS)
    bundle = copied(unet_bundle)
    before = contents(bundle)
    with pytest.raises(BundleError, match=r"holds another model \(.*\); give another directory"):
        build(other, bundle)
    assert contents(bundle) == before


def test_the_same_weights_under_another_config_are_another_model(
    tiny_unet_dir: Path, unet_bundle: Path, copied: Copy, tmp_path: Path, no_export: None
) -> None:
    """Only the config holds the number of heads. The version of diffusers in it is ignored."""
    other = Path(shutil.copytree(tiny_unet_dir, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    bundle = copied(unet_bundle)
    (other / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.1"}), encoding="utf-8")
    build(other, bundle)
    (other / "config.json").write_text(json.dumps({**config, "attention_head_dim": 4}), encoding="utf-8")
    with pytest.raises(BundleError, match="holds another model"):
        build(other, bundle)


def test_another_variant_of_the_weights_is_another_model(
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]
) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_unet_dir, tmp_path / "model"))
    tensors = load_file(model / WEIGHTS)
    tensors["conv_in.bias"] += 1e-3
    save_file(tensors, model / "diffusion_pytorch_model.ema.safetensors")
    build(model, tmp_path / "b")
    with pytest.raises(BundleError, match="holds another model"):
        build(model, tmp_path / "b", variant="ema")


def test_a_directory_with_other_files_is_refused(tiny_unet_dir: Path, tmp_path: Path, no_export: None) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("It was a dark and stormy night.", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(BundleError, match=r"is not a bundle and holds .+: give a new or an empty directory"):
        build(tiny_unet_dir, tmp_path / "thesis")
    with pytest.raises(BundleError, match="is a file; give a directory"):
        build(tiny_unet_dir, tmp_path / "thesis" / "chapter1.txt")
    assert contents(tmp_path) == before


def test_an_empty_directory_is_accepted(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    (tmp_path / "b").mkdir()
    build(tiny_unet_dir, tmp_path / "b")


def test_a_damaged_bundle_is_not_built_into(
    unet_bundle: Path, copied: Copy, tiny_unet_dir: Path, no_export: None
) -> None:
    bundle = copied(unet_bundle)
    (bundle / "offcut.json").write_text("{", encoding="utf-8")
    before = contents(bundle)
    with pytest.raises(BundleError, match="it is not JSON"):
        build(tiny_unet_dir, bundle)
    assert contents(bundle) == before


def test_a_model_that_cannot_be_loaded_leaves_no_files(tmp_path: Path, tiny_unet_dir: Path) -> None:
    broken = Path(shutil.copytree(tiny_unet_dir, tmp_path / "broken"))
    (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ModelError):
        build(broken, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ---- a failure changes nothing


def _wrong_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    real_read = verify_module.read_reference

    def read(path: Path) -> Reference:
        reference = real_read(path)
        return Reference(reference.inputs, reference.noise_pred + 2e-4)

    monkeypatch.setattr(verify_module, "read_reference", read)


def _full_disk(*functions: str, error: OSError | None = None) -> Callable[[pytest.MonkeyPatch], None]:
    def arrange(monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **options: Any) -> None:
            raise error or OSError(errno.ENOSPC, "No space left on device")

        for function in functions:
            monkeypatch.setattr(function, full)

    return arrange


def _interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module, "verify", interrupt)


FAILURES = [
    pytest.param(
        _wrong_reference, ParityError, "full against PyTorch differs by 0.0002, but at most 0.0001", id="parity"
    ),
    pytest.param(_full_disk("onnx_ir.save"), BundleError, "the disk of .* is full", id="full disk: graphs"),
    pytest.param(
        _full_disk("onnx_ir.save", error=OSError("4096 requested and 1600 written")),
        BundleError,
        "the disk of .* is full",
        id="full disk: weights, NumPy's message",
    ),
    pytest.param(
        _full_disk("shutil.copyfile", "offcut.exporter.export_cache._copy"),
        BundleError,
        "the disk of .* is full",
        id="full disk: copies",
    ),
    pytest.param(_full_disk("os.fsync"), BundleError, "the disk of .* is full", id="full disk: manifest"),
    pytest.param(_interrupted, KeyboardInterrupt, None, id="interrupted"),
]


@pytest.mark.parametrize(("arrange", "kind", "sentence"), FAILURES)
def test_a_failure_leaves_no_new_bundle(
    arrange: Callable[[pytest.MonkeyPatch], None], kind: type[BaseException], sentence: str | None,
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arrange(monkeypatch)
    with pytest.raises(kind, match=sentence):
        build(tiny_unet_dir, tmp_path / "b")
    assert contents(tmp_path / "b") == {}
    monkeypatch.undo()


@pytest.mark.parametrize(("arrange", "kind", "sentence"), FAILURES)
def test_a_failure_leaves_a_bundle_as_it_was(
    arrange: Callable[[pytest.MonkeyPatch], None], kind: type[BaseException], sentence: str | None,
    tiny_unet_dir: Path, unet_bundle: Path, copied: Copy, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The build has another cut, so that it writes new graphs and moves files in."""
    bundle = copied(unet_bundle)
    before = contents(bundle)
    with monkeypatch.context() as patch:
        arrange(patch)
        with pytest.raises(kind, match=sentence):
            build(tiny_unet_dir, bundle, cuts=["deepcache:2"])
    assert contents(bundle) == before
    assert {path.name for path in bundle.iterdir()} <= {"offcut.json", ".lock", "unet", "engines"}
    opened, _ = build(tiny_unet_dir, bundle, cuts=["deepcache:2"])
    opened.verify_files()
    assert opened.cuts == ["deepcache:0", "deepcache:2"]


def test_the_message_of_a_failed_parity_names_the_engine_and_the_figure(
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _wrong_reference(monkeypatch)
    with pytest.raises(ParityError) as caught:
        build(tiny_unet_dir, tmp_path / "b")
    message = str(caught.value)
    assert message.startswith("onnxruntime-")
    assert "try another engine or precision" in message


def test_a_wrongly_exported_weight_is_found_before_the_commit(
    tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export damages the weights, and the comparison of the built engine with PyTorch finds it."""
    real_export = variants_module.cached_export

    def export(*args: Any, **options: Any) -> Any:
        exported = real_export(*args, **options)
        weights = torch.frombuffer(bytearray(exported.weights.read_bytes()), dtype=torch.float32)
        weights[:100] += 1
        exported.weights.write_bytes(weights.numpy().tobytes())
        return exported

    monkeypatch.setattr(variants_module, "cached_export", export)
    with pytest.raises(ParityError, match="against PyTorch"):
        build(tiny_unet_dir, tmp_path / "b")
    assert not (tmp_path / "b").exists()
