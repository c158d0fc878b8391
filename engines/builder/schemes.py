"""Low precision by engine: which scheme of rounding suits it, of those that ``exporter.quantize`` writes."""

from __future__ import annotations

from ...exporter.load import PRECISIONS
from ...exporter.quantize.qdq import Scheme

LOW_PRECISIONS = ("int8", "fp8")

_OPENVINO = Scheme("int8", base="fp32", activations="uint8", outputs=False)
# ONNX Runtime runs a convolution in int8 only where its output is rounded too.
_ONNXRUNTIME = Scheme("int8", base="fp32", activations="uint8", outputs=True)
# TensorRT rounds to int8 without a zero point, and computes what is not rounded in the graph's precision.
_NVIDIA = {
    "int8": Scheme("int8", base="fp16", activations="int8", outputs=False),
    "fp8": Scheme("fp8", base="fp16", activations="float8e4m3fn", outputs=False),
}
SCHEMES: dict[tuple[str, str], Scheme] = {
    ("openvino", "int8"): _OPENVINO,
    ("onnxruntime", "int8"): _ONNXRUNTIME,
    **{(engine, name): scheme for engine in ("tensorrt", "tensorrt-rtx") for name, scheme in _NVIDIA.items()},
}


def scheme_of(engine: str, precision: str) -> Scheme | None:
    """How this engine's graphs are rounded in this precision; None if they are not."""
    return SCHEMES.get((engine, precision))


def base_of(precision: str) -> str:
    """Precision of the tensors that go in and out of a variant's graphs, from its name, e.g. ``"int8-fp16"``."""
    return next((base for base in PRECISIONS if base in precision.split("-")), "fp32")
