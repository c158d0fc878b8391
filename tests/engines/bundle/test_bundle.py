"""Damaged and invalid bundles are refused, with one sentence, before an engine reads a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import offcut
from offcut.engines.bundle.manifest import SCHEMA_VERSION
from offcut.errors import BundleError, CutError, EngineError, UserError

Copy = Callable[[Path], Path]
BOTH = ["onnxruntime", "openvino"]


def refusal(action: Callable[[], object], kind: type[UserError] = BundleError) -> str:
    """Return the message of the error that the action must raise; it must be one short line."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Alter a bundle's manifest."""
    file = bundle / "offcut.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    change(manifest)
    file.write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


def entry_of(manifest: dict[str, Any], engine: str = "onnxruntime") -> dict[str, Any]:
    entry = next(entry for entry in manifest["engines"].values() if entry["engine"] == engine)
    assert isinstance(entry, dict)
    return entry


# ---- valid bundles


@pytest.mark.smoke
def test_a_bundle_lists_its_engines_and_cuts(unet_bundle: Path) -> None:
    bundle = offcut.Bundle.open(str(unet_bundle))
    assert bundle.engines == BOTH
    assert bundle.cuts == ["deepcache:0"]
    assert bundle.unet_config["_class_name"] == "UNet2DConditionModel"
    assert bundle.manifest.pipeline is None
    assert bundle.manifest.family == "unet2d-condition"
    bundle.verify_files()


def test_every_file_of_a_bundle_is_in_its_manifest(tiny_bundle: Path) -> None:
    bundle = offcut.Bundle.open(tiny_bundle)
    files = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert files == {*bundle.manifest.files, "offcut.json", ".lock"}
    assert bundle.manifest.pipeline == "StableDiffusionPipeline"
    assert {name.split("/")[0] for name in bundle.manifest.parts} == {
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "vae",
    }
    bundle.verify_files()


def test_names_in_a_bundle_are_legal_on_windows(tiny_bundle: Path) -> None:
    for name in offcut.Bundle.open(tiny_bundle).manifest.files:
        assert not set(name) & set('\\:*?"<>|'), name


def test_graphs_hold_no_paths_of_the_building_machine(unet_bundle: Path) -> None:
    for file in (unet_bundle / "unet").rglob("*.onnx"):
        assert str(Path.home()).encode() + b"/" not in file.read_bytes()
        assert str(unet_bundle.parent).encode() not in file.read_bytes()


def test_a_bundle_may_be_moved(unet_bundle: Path, copied: Copy, tmp_path: Path) -> None:
    moved = copied(unet_bundle).rename(tmp_path / "other name.offcut")
    offcut.Bundle.open(moved).open_pair("onnxruntime").close()


def test_the_digest_pins_the_manifest_and_so_every_file(unet_bundle: Path, copied: Copy) -> None:
    digest = offcut.Bundle.open(unet_bundle).digest
    assert offcut.Bundle.open(unet_bundle, expect_digest=digest.upper()).digest == digest
    altered = edit(copied(unet_bundle), lambda raw: raw["source"].update(model="somebody/else"))
    assert digest in refusal(lambda: offcut.Bundle.open(altered, expect_digest=digest))


# ---- not a bundle


def test_a_directory_without_a_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    assert "it has no offcut.json; make one with offcut build" in refusal(lambda: offcut.Bundle.open(tmp_path))
    assert "is not an offcut bundle" in refusal(lambda: offcut.Bundle.open(tmp_path / "not there"))
    (tmp_path / "offcut.json").mkdir()
    assert "is not an offcut bundle" in refusal(lambda: offcut.Bundle.open(tmp_path))


def test_a_file_is_not_a_bundle(unet_bundle: Path) -> None:
    assert "is not an offcut bundle" in refusal(lambda: offcut.Bundle.open(unet_bundle / "offcut.json"))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"schema_version"', "{}", '{"schema_version": "1"}'])
def test_an_invalid_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "offcut.json").write_text(text, encoding="utf-8")
    assert "offcut.json is " in refusal(lambda: offcut.Bundle.open(tmp_path))


def test_a_newer_schema_is_refused_before_other_fields_are_read(unet_bundle: Path, copied: Copy) -> None:
    newer = edit(copied(unet_bundle), lambda raw: (raw.clear(), raw.update(schema_version=SCHEMA_VERSION + 1)))
    message = refusal(lambda: offcut.Bundle.open(newer))
    assert f"newer offcut (schema {SCHEMA_VERSION + 1}, this one reads {SCHEMA_VERSION}): upgrade offcut" in message


# ---- altered


@pytest.mark.smoke
@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("file", ["full.onnx", "shallow-deepcache-0.onnx", "weights.data"])
@pytest.mark.parametrize("position", [0, 1000, -1])
def test_a_flipped_bit_is_found(
    position: int, file: str, engine: str, unet_bundle: Path, copied: Copy, no_engine: None
) -> None:
    bundle = copied(unet_bundle)
    path = bundle / "unet" / "fp32-opset23" / file
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    message = refusal(lambda: offcut.Bundle.open(bundle).open_pair(engine))
    assert f"unet/fp32-opset23/{file} was altered" in message


def test_every_file_is_compared_with_its_digest(unet_bundle: Path, copied: Copy) -> None:
    for name in offcut.Bundle.open(unet_bundle).manifest.files:
        bundle = copied(unet_bundle)
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 0x80
        (bundle / name).write_bytes(content)
        assert f"{name} was altered" in refusal(offcut.Bundle.open(bundle).verify_files)
        shutil.rmtree(bundle)


def test_an_altered_config_is_refused(unet_bundle: Path, copied: Copy) -> None:
    bundle = copied(unet_bundle)
    file = bundle / "unet" / "config.json"
    file.write_text(file.read_text(encoding="utf-8").replace("16", "61", 1), encoding="utf-8")
    assert "unet/config.json was altered" in refusal(lambda: offcut.Bundle.open(bundle).unet_config)


def test_a_truncated_file_is_found(unet_bundle: Path, copied: Copy, no_engine: None) -> None:
    bundle = copied(unet_bundle)
    weights = bundle / "unet" / "fp32-opset23" / "weights.data"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refusal(lambda: offcut.Bundle.open(bundle).open_pair("openvino"))
    assert f"weights.data has {size - 100} bytes, not {size}" in message


def test_a_missing_file_is_found(unet_bundle: Path, copied: Copy, no_engine: None) -> None:
    bundle = copied(unet_bundle)
    (bundle / "unet" / "fp32-opset23" / "weights.data").unlink()
    assert "weights.data is missing" in refusal(lambda: offcut.Bundle.open(bundle).open_pair("onnxruntime"))


def test_a_file_outside_the_manifest_is_refused(unet_bundle: Path, copied: Copy, no_engine: None) -> None:
    bundle = edit(copied(unet_bundle), lambda raw: raw["files"].pop("unet/fp32-opset23/full.onnx"))
    message = refusal(lambda: offcut.Bundle.open(bundle).open_pair("onnxruntime"))
    assert "unet/fp32-opset23/full.onnx is not in the manifest" in message


# ---- exchanged graphs


def test_full_and_shallow_exchanged_on_disk_are_found(unet_bundle: Path, copied: Copy, no_engine: None) -> None:
    bundle = copied(unet_bundle)
    folder = bundle / "unet" / "fp32-opset23"
    (folder / "full.onnx").rename(folder / "aside")
    (folder / "shallow-deepcache-0.onnx").rename(folder / "full.onnx")
    (folder / "aside").rename(folder / "shallow-deepcache-0.onnx")
    assert "full.onnx has " in refusal(lambda: offcut.Bundle.open(bundle).open_pair("onnxruntime"))


@pytest.mark.parametrize("engine", BOTH)
def test_full_and_shallow_exchanged_in_the_manifest_are_found(engine: str, unet_bundle: Path, copied: Copy) -> None:
    """The digests match, so only the inputs and outputs of the graphs reveal the exchange."""

    def exchange(raw: dict[str, Any]) -> None:
        entry = entry_of(raw, engine)
        entry["full"], entry["shallow"]["deepcache:0"] = entry["shallow"]["deepcache:0"], entry["full"]

    bundle = edit(copied(unet_bundle), exchange)
    message = refusal(lambda: offcut.Bundle.open(bundle).open_pair(engine), EngineError)
    assert "is not the full graph of this bundle" in message


@pytest.mark.parametrize("engine", BOTH)
def test_another_cuts_shallow_graph_is_found(engine: str, every_cut: Path, copied: Copy) -> None:
    def exchange(raw: dict[str, Any]) -> None:
        shallow = entry_of(raw, engine)["shallow"]
        shallow["deepcache:1"], shallow["mlperf"] = shallow["mlperf"], shallow["deepcache:1"]

    bundle = edit(copied(every_cut), exchange)
    message = refusal(lambda: offcut.Bundle.open(bundle).open_pair(engine), EngineError)
    assert "is not the shallow graph of " in message


def test_an_engine_of_a_missing_variant_is_refused(unet_bundle: Path, copied: Copy) -> None:
    bundle = edit(copied(unet_bundle), lambda raw: entry_of(raw).update(variant="fp16-opset23"))
    assert "names the variant fp16-opset23, which the bundle does not" in refusal(lambda: offcut.Bundle.open(bundle))


def test_an_engine_of_another_variant_is_refused(unet_bundle: Path, copied: Copy) -> None:
    """With the other variant's dtypes each buffer would have half the bytes."""

    def rename(raw: dict[str, Any]) -> None:
        other = json.loads(json.dumps(raw["variants"]["fp32-opset23"]).replace("fp32", "fp16"))
        raw["variants"]["fp16-opset23"] = other
        entry_of(raw)["variant"] = "fp16-opset23"

    bundle = edit(copied(unet_bundle), rename)
    assert "graphs of another variant than fp16-opset23" in refusal(lambda: offcut.Bundle.open(bundle))


@pytest.mark.parametrize(
    "change", [{"cuts": ["deepcache:7"]}, {"shallow": {}}, {"cuts": ["deepcache:0", "mlperf"]}], ids=str
)
def test_cuts_and_graphs_that_do_not_belong_together_are_refused(
    change: dict[str, Any], unet_bundle: Path, copied: Copy
) -> None:
    bundle = edit(copied(unet_bundle), lambda raw: entry_of(raw).update(change))
    assert "do not belong together" in refusal(lambda: offcut.Bundle.open(bundle))


# ---- paths outside the bundle

OUTSIDE = ["../x", "unet/../../x", "/etc/passwd", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "", "a\0b", "a:b"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("where", ["files", "parts", "full", "shallow", "weights", "unet_config"])
def test_a_path_that_leaves_the_bundle_is_refused(where: str, path: str, unet_bundle: Path, copied: Copy) -> None:
    def change(raw: dict[str, Any]) -> None:
        match where:
            case "files":
                raw["files"][path] = {"size": 0, "sha256": "0" * 64}
            case "parts":
                raw["parts"].append(path)
            case "full":
                entry_of(raw)["full"] = path
            case "shallow":
                entry_of(raw)["shallow"]["deepcache:0"] = path
            case "weights":
                raw["variants"]["fp32-opset23"]["graphs"]["weights"] = path
            case _:
                raw["unet_config"] = path

    bundle = edit(copied(unet_bundle), change)
    assert "is not a path inside the bundle" in refusal(lambda: offcut.Bundle.open(bundle))


@pytest.mark.parametrize("of_a_folder", [True, False])
def test_a_link_that_leaves_the_bundle_is_refused(
    of_a_folder: bool, unet_bundle: Path, copied: Copy, tmp_path: Path, no_engine: None
) -> None:
    """The link is refused even if its target has the right content."""
    bundle = copied(unet_bundle)
    inside = bundle / "unet" / "fp32-opset23"
    if not of_a_folder:
        inside = inside / "weights.data"
    outside = inside.rename(tmp_path / "outside")
    inside.symlink_to(outside)
    assert "is a link that leaves the bundle" in refusal(lambda: offcut.Bundle.open(bundle).open_pair("onnxruntime"))


def test_a_circular_link_is_refused(unet_bundle: Path, copied: Copy, no_engine: None) -> None:
    bundle = copied(unet_bundle)
    weights = bundle / "unet" / "fp32-opset23" / "weights.data"
    weights.unlink()
    weights.symlink_to(weights)
    refusal(lambda: offcut.Bundle.open(bundle).open_pair("onnxruntime"))


def test_a_link_inside_the_bundle_is_followed(unet_bundle: Path, copied: Copy) -> None:
    """Tools that deduplicate files leave such links."""
    bundle = copied(unet_bundle)
    weights = bundle / "unet" / "fp32-opset23" / "weights.data"
    weights.rename(bundle / "blob")
    weights.symlink_to(Path("..") / ".." / "blob")
    offcut.Bundle.open(bundle).verify_files()


def test_the_bundles_own_directory_may_be_a_link(unet_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(unet_bundle)
    offcut.Bundle.open(tmp_path / "link").open_pair("onnxruntime").close()


# ---- another machine


@pytest.mark.parametrize("engine", BOTH)
def test_an_engine_of_a_newer_version_is_refused(engine: str, unet_bundle: Path, copied: Copy, no_engine: None) -> None:
    bundle = edit(copied(unet_bundle), lambda raw: entry_of(raw, engine).update(version="9999.1.0"))
    message = refusal(lambda: offcut.Bundle.open(bundle).open_pair(engine), EngineError)
    assert f"was built and verified with {engine} 9999.1.0" in message
    assert "upgrade it, or build again here" in message


def test_an_engine_of_an_older_version_is_opened(unet_bundle: Path, copied: Copy) -> None:
    bundle = edit(copied(unet_bundle), lambda raw: entry_of(raw).update(version="1.2.3"))
    offcut.Bundle.open(bundle).open_pair("onnxruntime").close()


def test_a_feature_that_this_machine_lacks_is_named(unet_bundle: Path, copied: Copy, no_engine: None) -> None:
    bundle = edit(copied(unet_bundle), lambda raw: entry_of(raw, "openvino").update(requires=["avx2048", "bf16"]))
    message = refusal(lambda: offcut.Bundle.open(bundle).open_pair("openvino"), EngineError)
    assert "needs avx2048" in message
    assert "build it again here" in message


def test_an_engine_that_is_not_in_the_bundle_is_refused_with_the_command(unet_bundle: Path, copied: Copy) -> None:
    def drop(raw: dict[str, Any]) -> None:
        raw["engines"] = {key: entry for key, entry in raw["engines"].items() if entry["engine"] != "openvino"}

    bundle = offcut.Bundle.open(edit(copied(unet_bundle), drop))
    message = refusal(lambda: bundle.open_pair("openvino"), EngineError)
    assert "holds onnxruntime, not openvino: add it with offcut build --engine openvino" in message
    assert "there is no engine 'tensorflow'" in refusal(lambda: bundle.open_pair("tensorflow"), EngineError)
    assert "cannot run on cuda here" in refusal(lambda: bundle.open_pair("onnxruntime", device="cuda"), EngineError)


def test_a_build_that_is_not_in_the_bundle_is_refused(unet_bundle: Path) -> None:
    bundle = offcut.Bundle.open(unet_bundle)
    message = refusal(lambda: bundle.open_pair("openvino", precision="fp16"), EngineError)
    assert "holds no such build of openvino; it holds onnxruntime-" in message
    message = refusal(lambda: bundle.entry("openvino", cut="deepcache:9"), CutError)
    assert "was not built with the cut deepcache:9; it has deepcache:0" in message


# ---- fuzzing


@pytest.fixture(scope="module")
def scratch(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a bundle for tests that alter its manifest repeatedly."""
    return Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("fuzz") / "bundle"))


def opens_or_is_refused(bundle: Path, manifest: bytes) -> None:
    """Require that a pair opens and runs, or that a user error is raised."""
    (bundle / "offcut.json").write_bytes(manifest)
    message = ""
    try:
        pair = offcut.Bundle.open(bundle).open_pair("onnxruntime")
        pair.prepare({"sample": (1, 4, 4, 4), "timestep": (1,), "encoder_hidden_states": (1, 2, 16)}).full()
        pair.close()
    except UserError as error:
        message = str(error)
    assert "\n" not in message


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_flipped_bytes_in_the_manifest_never_crash(data: st.DataObject, unet_bundle: Path, scratch: Path) -> None:
    text = bytearray((unet_bundle / "offcut.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    opens_or_is_refused(scratch, bytes(text))


@FUZZ
@given(share=st.floats(0, 1))
@example(share=0)
@example(share=0.9999)
def test_a_truncated_manifest_is_refused(share: float, unet_bundle: Path, scratch: Path) -> None:
    text = (unet_bundle / "offcut.json").read_bytes().strip()
    (scratch / "offcut.json").write_bytes(text[: int(share * (len(text) - 1))])
    with pytest.raises(BundleError):
        offcut.Bundle.open(scratch)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": ["batch", 6, "height", "width"]}, r"deep_feature_0 has the shape \[1, 6, 4, 4\] by the manifest"),
        ({"dtype": "float16"}, "deep_feature_0 is float16 by the manifest, but float32 in the graph"),
    ],
    ids=["shape", "dtype"],
)
def test_a_tensor_that_is_not_the_graphs_is_refused_before_the_engine_runs(
    change: dict[str, Any], message: str, engine: str, unet_bundle: Path, scratch: Path
) -> None:
    manifest = json.loads((unet_bundle / "offcut.json").read_text(encoding="utf-8"))
    (variant,) = manifest["variants"].values()
    feature = variant["cuts"][0]["cached"][0]
    feature |= change
    (scratch / "offcut.json").write_text(json.dumps(manifest), encoding="utf-8")
    pair = offcut.Bundle.open(scratch).open_pair(engine)
    with pytest.raises(BundleError, match=message):
        pair.prepare({"sample": (1, 4, 4, 4), "timestep": (1,), "encoder_hidden_states": (1, 2, 16)})
    pair.close()


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        10**30,
        1.5,
        "",
        "x",
        "float64",
        "../x",
        "height/0",
        "\ud800",
        [],
        {},
        [[]],
        {"x": None},
        ["x"],
    ]
)


@FUZZ
@given(data=st.data())
def test_odd_values_in_the_manifest_never_crash(data: st.DataObject, unet_bundle: Path, scratch: Path) -> None:
    raw = json.loads((unet_bundle / "offcut.json").read_text(encoding="utf-8"))
    node = raw
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.integers(0, 4)) == 0:
            break
        node = node[key]
    if data.draw(st.booleans()):
        node[key] = data.draw(ODD)
    else:
        del node[key]
    opens_or_is_refused(scratch, json.dumps(raw).encode())
