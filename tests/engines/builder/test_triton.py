"""A Triton model repository: the documented layout, and configurations that agree with the graphs beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import offcut
from offcut.engines.builder.triton import config_text, write_repository
from offcut.errors import EngineError, UserError
from offcut.exporter.specs import TensorSpec

# What a configuration here may have of Triton's model_config.proto: a field's type, and whether it repeats.
SCHEMA: dict[str, dict[str, tuple[Any, bool]]] = {
    "ModelConfig": {
        "name": (str, False),
        "platform": (str, False),
        "backend": (str, False),
        "default_model_filename": (str, False),
        "max_batch_size": (int, False),
        "input": ("ModelInput", True),
        "output": ("ModelOutput", True),
        "instance_group": ("ModelInstanceGroup", True),
    },
    "ModelInput": {"name": (str, False), "data_type": ("enum", False), "dims": (int, True)},
    "ModelOutput": {"name": (str, False), "data_type": ("enum", False), "dims": (int, True)},
    "ModelInstanceGroup": {"count": (int, False), "kind": ("enum", False)},
}
ENUMS = {
    "data_type": {"TYPE_FP32", "TYPE_FP16", "TYPE_BF16", "TYPE_INT64"},
    "kind": {"KIND_CPU", "KIND_GPU"},
}
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64"}


def parsed(text: str) -> dict[str, Any]:
    """A ModelConfig in protobuf's text format; an unknown field or a value of another type is an error."""
    tokens = iter(re.findall(r'"[^"]*"|[\w.+-]+|[][{}:,]', text))
    message = _message("ModelConfig", tokens, None)
    assert next(tokens, None) is None
    return message


def _message(kind: str, tokens: Iterator[str], end: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while (name := next(tokens, None)) != end:
        assert name in SCHEMA[kind], f"{kind} has no field {name}"
        of_type, repeats = SCHEMA[kind][name]
        token = next(tokens)
        if token == ":":
            token = next(tokens)
        if token != "[":
            assert name not in found, f"{name} is there twice"
            found[name] = _value(name, of_type, token, tokens)
            continue
        assert repeats, f"{name} is no list"
        values = found.setdefault(name, [])
        while (token := next(tokens)) != "]":
            if token != ",":
                values.append(_value(name, of_type, token, tokens))
    return found


def _value(name: str, of_type: Any, token: str, tokens: Iterator[str]) -> Any:
    if of_type is str:
        assert token.startswith('"'), f"{name} is a string"
        return token.strip('"')
    if of_type is int:
        return int(token)
    if of_type == "enum":
        assert token in ENUMS[name], f"{token} is no {name}"
        return token
    assert token == "{"
    return _message(of_type, tokens, "}")


@pytest.fixture(scope="module")
def repository(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("triton")
    return write_repository(offcut.Bundle.open(unet_bundle), folder, name="tiny", engine="onnxruntime")


def test_the_layout_is_the_documented_one(repository: tuple[Path, ...], unet_bundle: Path) -> None:
    assert [model.name for model in repository] == ["tiny_full", "tiny_shallow_deepcache_0"]
    weights = offcut.Bundle.open(unet_bundle).manifest.variants["fp32-opset23"].graphs.weights  # type: ignore[union-attr]
    for model in repository:
        files = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
        assert files == ["1/model.onnx/model.onnx", "1/model.onnx/weights.data", "config.pbtxt"]
        assert (model / files[1]).samefile(unet_bundle / weights)


def test_a_configuration_agrees_with_its_graph(repository: tuple[Path, ...]) -> None:
    for model in repository:
        config = parsed((model / "config.pbtxt").read_text(encoding="utf-8"))
        assert (config["name"], config["backend"], config["max_batch_size"]) == (model.name, "onnxruntime", 0)
        assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
        session = onnxruntime.InferenceSession(model / "1" / "model.onnx" / config["default_model_filename"])
        for said, has in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
            assert [each["name"] for each in said] == [each.name for each in has]
            assert [each["data_type"] for each in said] == [TYPES[each.type] for each in has]
            for mine, theirs in zip(said, has, strict=True):
                assert mine["dims"] == [dim if isinstance(dim, int) else -1 for dim in theirs.shape]
    full, shallow = (parsed((model / "config.pbtxt").read_text(encoding="utf-8")) for model in repository)
    feature = next(each for each in full["output"] if each["name"] != "noise_pred")
    assert feature in shallow["input"]


def test_the_two_models_are_the_pair_that_the_bundle_has(repository: tuple[Path, ...]) -> None:
    full, shallow = (onnxruntime.InferenceSession(model / "1" / "model.onnx" / "model.onnx") for model in repository)
    random = np.random.default_rng(0)
    sizes = {"batch": 2, "height": 8, "width": 8, "sequence": 7}
    given = {
        each.name: random.standard_normal([sizes.get(dim, dim) for dim in each.shape]).astype(np.float32)
        for each in full.get_inputs()
    }
    made = dict(zip([each.name for each in full.get_outputs()], full.run(None, given), strict=True))
    wanted = {each.name: {**given, **made}[each.name] for each in shallow.get_inputs()}
    (noise,) = shallow.run(["noise_pred"], wanted)
    assert np.array_equal(noise, made["noise_pred"])


def test_what_cannot_be_written_is_refused(repository: tuple[Path, ...], unet_bundle: Path, tmp_path: Path) -> None:
    bundle = offcut.Bundle.open(unet_bundle)
    with pytest.raises(EngineError, match="no backend for openvino"):
        write_repository(bundle, tmp_path, name="tiny", engine="openvino")
    with pytest.raises(EngineError):
        write_repository(bundle, tmp_path, name="tiny", engine="tensorrt")
    with pytest.raises(UserError, match="exists already"):
        write_repository(bundle, repository[0].parent, name="tiny", engine="onnxruntime")


def test_a_plan_for_a_gpu() -> None:
    text = config_text(
        "x",
        "tensorrt",
        "cuda",
        [TensorSpec("sample", "float16", ("batch", 4, 64, 64))],
        [TensorSpec("noise_pred", "bfloat16", ("batch", 4, 64, 64))],
    )
    config = parsed(text)
    assert (config["backend"], config["default_model_filename"]) == ("tensorrt", "model.plan")
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    assert config["input"] == [{"name": "sample", "data_type": "TYPE_FP16", "dims": [-1, 4, 64, 64]}]
    assert config["output"][0]["data_type"] == "TYPE_BF16"


@pytest.mark.parametrize(
    ("text", "says"),
    [('nam: "x"', "no field nam"), ("name: x", "is a string"), ("input [ { data_type: FP32 } ]", "is no data_type")],
)
def test_the_checker_sees_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        parsed(text)
