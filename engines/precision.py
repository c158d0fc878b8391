"""Precisions by engine: combinations that work, their bounds, and the rounding of each engine's graphs.

The build refuses a combination whose row is a reason. Tests check the bounds of every other row.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import EngineError
from ..exporter.quantize.qdq import Scheme

LOW_PRECISIONS = ("int8", "fp8")


@dataclass(frozen=True)
class Bounds:
    """The largest allowed differences of a pair's outputs.

    Attributes:
        parity: largest difference of ``noise_pred`` from eager PyTorch with the same weights; absolute for fp32, else
            relative to the largest value of the reference.
        relative: whether ``parity`` is relative.
        across: largest difference between the shallow graph, given the full graph's fresh features, and the full graph,
            relative to the largest value. 0 means bit for bit, the project's first invariant.
    """

    parity: float
    relative: bool
    across: float


_EXACT = Bounds(parity=1e-4, relative=False, across=0.0)

# (engine, precision of the graphs, inference precision) -> bounds, or the reason why the combination cannot work.
BOUNDS: dict[tuple[str, str, str | None], Bounds | str] = {
    ("onnxruntime", "fp32", None): _EXACT,
    ("onnxruntime", "fp16", None): Bounds(parity=1e-2, relative=True, across=5e-3),
    ("onnxruntime", "bf16", None): "ONNX Runtime's CPU provider does not load bf16 graphs",
    ("openvino", "fp32", None): _EXACT,
    # OpenVINO rounds the graph's inputs too, the timestep among them: 998 becomes 1000, 777 becomes 776. Measured: up
    # to 0.077 on small UNets with random weights at such a timestep, 0.013 at others and on a trained model.
    ("openvino", "fp32", "bf16"): Bounds(parity=1e-1, relative=True, across=5e-2),
    ("openvino", "fp16", None): Bounds(parity=1e-2, relative=True, across=1e-2),
    ("openvino", "bf16", None): Bounds(parity=5e-2, relative=True, across=5e-2),
    # The two programs are compiled separately and may be fused differently around the cut.
    ("inductor", "fp32", None): Bounds(parity=1e-4, relative=False, across=1e-5),
    ("inductor", "fp16", None): Bounds(parity=1e-2, relative=True, across=1e-2),
    ("inductor", "bf16", None): Bounds(parity=5e-2, relative=True, across=5e-2),
    # Checked at inputs of the calibration. Measured there: 0.006 (OpenVINO) and 0.012 on the shapes model, 0.02 on
    # SD 1.5's architecture with random weights, and 0 across the cut.
    ("openvino", "int8", None): Bounds(parity=1e-1, relative=True, across=1e-2),
    ("onnxruntime", "int8", None): Bounds(parity=1e-1, relative=True, across=1e-2),
    ("inductor", "int8", None): "it compiles the PyTorch model, which is not rounded; choose an engine of ONNX graphs",
    # With Q/DQ nodes around them, convolutions on a CPU would still be computed in fp32, only more slowly.
    **{
        (engine, "fp8", None): "no CPU computes in fp8; use int8 on CPUs"
        for engine in ("onnxruntime", "openvino", "inductor")
    },
    # No run on a GPU has proven these yet. TensorRT chooses kernels for each graph separately, so the two graphs of a
    # pair may add in different orders. fp32 is computed without TF32, unless a setting turns it on.
    **{
        (engine, precision, None): Bounds(parity=bound, relative=True, across=bound)
        for engine in ("tensorrt", "tensorrt-rtx")
        for precision, bound in (("fp32", 5e-3), ("fp16", 1e-2), ("bf16", 5e-2), ("int8", 2.5e-1), ("fp8", 2.5e-1))
    },
}

# Rows that differ on CUDA. No run on a GPU has proven them yet.
CUDA_BOUNDS: dict[tuple[str, str, str | None], Bounds | str] = {
    (engine, precision, None): Bounds(parity=bound, relative=True, across=bound)
    for engine in ("onnxruntime", "inductor")
    for precision, bound in (("fp32", 5e-3), ("fp16", 1e-2), ("bf16", 5e-2))
} | {
    ("onnxruntime", "int8", None): "its CUDA provider has no convolution in int8; tensorrt and tensorrt-rtx do",
}


def bounds(engine: str, precision: str, inference_precision: str | None = None, device: str = "cpu") -> Bounds:
    """Return the bounds of an engine in a precision.

    Args:
        device: device that the engine runs on, as PyTorch spells it.

    Raises:
        EngineError: this engine cannot run this precision; the message says why, and what it can run.
    """
    if inference_precision == precision:
        inference_precision = None
    table = {**BOUNDS, **CUDA_BOUNDS} if device.startswith("cuda") else BOUNDS
    row = table.get(
        (engine, precision, inference_precision), "offcut has no bounds for this combination, so it does not offer it"
    )
    if isinstance(row, Bounds):
        return row
    requested = precision if inference_precision is None else f"{precision} computed in {inference_precision}"
    others = [
        other_precision if hint is None else f"{other_precision} computed in {hint}"
        for (name, other_precision, hint), other in table.items()
        if name == engine and isinstance(other, Bounds)
    ]
    raise EngineError(f"{engine} cannot run {requested}: {row}; it runs {', '.join(others)}")


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
"""How each engine's graphs are rounded, by engine and precision."""


def scheme_of(engine: str, precision: str) -> Scheme | None:
    """Return how this engine's graphs are rounded in this precision; None if they are not rounded."""
    return SCHEMES.get((engine, precision))
