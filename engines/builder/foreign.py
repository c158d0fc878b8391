"""What a build of ONNX that was made elsewhere can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import EngineError, ModelError
from ...exporter.foreign.find import Original, open_original
from ...exporter.foreign.unet import check_precision
from ...exporter.load import ModelSource
from ...exporter.quantize.qdq import Scheme
from ..bundle.networks import compilable
from ..registry import compiler


def check_onnx(
    source: ModelSource,
    engines: Sequence[str],
    scheme: Scheme | None,
    opset: int | None,
    precision: str,
    *,
    adapters: Sequence[str] | None,
    attention: str | None,
) -> Original:
    """Refuse what a graph that was made elsewhere cannot become, and open it.

    Args:
        engines, opset, precision, adapters, attention: as a build was asked for them.
        scheme: of rounding; None where nothing is rounded.

    Raises:
        ModelError: it is damaged, or was asked for what takes PyTorch's weights, another precision or opset.
        EngineError: no engine of the build opens the networks beside the UNet.
    """
    wanted = {
        "a LoRA in its weights: give it to offcut run --lora, or to pipe.load_lora_weights": source.loras,
        "an IP-Adapter": source.ip_adapters,
        f"the inputs of {' and '.join(adapters or ())}": adapters,
        f"{attention} attention": attention,
        f"{precision}, which is calibrated in PyTorch": scheme,
        "graphs for inductor, which PyTorch makes": "inductor" in engines,
    }
    if refused := [what for what, asked in wanted.items() if asked]:
        what, _, remedy = refused[0].partition(": ")
        raise ModelError(
            f"{source.name} holds its UNet as ONNX, without weights for PyTorch, and cannot be given {what}: "
            + (remedy or "build from the model that it was exported from")
        )
    original = open_original(source.folder)
    check_precision(original, precision)
    if opset not in (None, original.opset):
        raise ModelError(f"{original.path} has opset {original.opset}, not {opset}: leave --opset out")
    networks = compilable(source)
    if networks and all(compiler(name) for name in engines):
        raise EngineError(
            f"{' and '.join(engines)} compiles the UNet only, and {source.name} holds {', '.join(networks)} as ONNX "
            "too: name onnxruntime or openvino beside it"
        )
    return original
