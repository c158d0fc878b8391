"""A Triton model repository: the documented layout, and configurations that agree with the graphs next to them."""

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

# Fields of Triton's model_config.proto that a configuration may have: type, and whether the field repeats.
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
    """Parse a ModelConfig in protobuf's text format; an unknown field or a value of another type is an error."""
    tokens = iter(re.findall(r'"[^"]*"|[\w.+-]+|[][{}:,]', text))
    message = _message("ModelConfig", tokens, None)
    assert next(tokens, None) is None
    return message


def _message(kind: str, tokens: Iterator[str], end: str | None) -> dict[str, Any]:
    message: dict[str, Any] = {}
    while (name := next(tokens, None)) != end:
        assert name in SCHEMA[kind], f"{kind} has no field {name}"
        of_type, repeats = SCHEMA[kind][name]
        token = next(tokens)
        if token == ":":
            token = next(tokens)
        if token != "[":
            assert name not in message, f"{name} occurs twice"
            message[name] = _value(name, of_type, token, tokens)
            continue
        assert repeats, f"{name} is not a list"
        values = message.setdefault(name, [])
        while (token := next(tokens)) != "]":
            if token != ",":
                values.append(_value(name, of_type, token, tokens))
    return message


def _value(name: str, of_type: Any, token: str, tokens: Iterator[str]) -> Any:
    if of_type is str:
        assert token.startswith('"'), f"{name} is a string"
        return token.strip('"')
    if of_type is int:
        return int(token)
    if of_type == "enum":
        assert token in ENUMS[name], f"{token} is not a valid {name}"
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
        for configured, actual in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
            assert [each["name"] for each in configured] == [each.name for each in actual]
            assert [each["data_type"] for each in configured] == [TYPES[each.type] for each in actual]
            for tensor, argument in zip(configured, actual, strict=True):
                assert tensor["dims"] == [dim if isinstance(dim, int) else -1 for dim in argument.shape]
    full, shallow = (parsed((model / "config.pbtxt").read_text(encoding="utf-8")) for model in repository)
    feature = next(each for each in full["output"] if each["name"] != "noise_pred")
    assert feature in shallow["input"]


def test_the_shallow_model_continues_from_the_full_models_outputs(repository: tuple[Path, ...]) -> None:
    full, shallow = (onnxruntime.InferenceSession(model / "1" / "model.onnx" / "model.onnx") for model in repository)
    random = np.random.default_rng(0)
    sizes = {"batch": 2, "height": 8, "width": 8, "sequence": 7}
    inputs = {
        each.name: random.standard_normal([sizes.get(dim, dim) for dim in each.shape]).astype(np.float32)
        for each in full.get_inputs()
    }
    outputs = dict(zip([each.name for each in full.get_outputs()], full.run(None, inputs), strict=True))
    shallow_inputs = {each.name: {**inputs, **outputs}[each.name] for each in shallow.get_inputs()}
    (noise,) = shallow.run(["noise_pred"], shallow_inputs)
    assert np.array_equal(noise, outputs["noise_pred"])


def test_invalid_repositories_are_refused(repository: tuple[Path, ...], unet_bundle: Path, tmp_path: Path) -> None:
    bundle = offcut.Bundle.open(unet_bundle)
    with pytest.raises(EngineError, match="no backend for openvino"):
        write_repository(bundle, tmp_path, name="tiny", engine="openvino")
    with pytest.raises(EngineError):
        write_repository(bundle, tmp_path, name="tiny", engine="tensorrt")
    with pytest.raises(UserError, match="exists already"):
        write_repository(bundle, repository[0].parent, name="tiny", engine="onnxruntime")


def test_the_configuration_of_a_tensorrt_model() -> None:
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
    ("text", "complaint"),
    [
        ('nam: "x"', "no field nam"),
        ("name: x", "is a string"),
        ("input [ { data_type: FP32 } ]", "is not a valid data_type"),
    ],
)
def test_the_parser_refuses_invalid_configurations(text: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        parsed(text)
