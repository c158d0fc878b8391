"""ONNX files that were made elsewhere, as optimum lays them out: found, checked to be whole, asked for their answers.

    DIR/unet/model.onnx, text_encoder/model.onnx, vae_decoder/model.onnx, ...   each beside its config.json

Only a network without safetensors is taken from its ONNX file: PyTorch's weights can be exported in every way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

ORIGINAL_FILE = "model.onnx"
OPTIMUMS_NAMES = {"ORTUnet": "UNet2DConditionModel", "ORTVaeDecoder": "AutoencoderKL", "ORTVaeEncoder": "AutoencoderKL"}
"""What a pipeline that optimum loaded and saved again calls its networks, and what they are."""

_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_LATENTS = ("sample", "latent_sample")
_WEIGHED = ("Conv", "MatMul", "Gemm")


def made_elsewhere(folder: Path) -> bool:
    """Whether a network's directory holds an ONNX graph, and no safetensors that PyTorch could load."""
    return (folder / ORIGINAL_FILE).is_file() and not any(folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Original:
    """A network's ONNX file as somebody else wrote it; its weights are left on disk.

    Attributes:
        path: the file.
        model: the graph, to be changed at will: the file stays as it is.
        files: the file and those with its weights.
    """

    path: Path
    model: ir.Model
    files: tuple[Path, ...]

    @property
    def opset(self) -> int:
        """Of the default ONNX domain."""
        return int(self.model.opset_imports[""])

    @property
    def precision(self) -> str:
        """Of its weights and of its latents or images.

        Raises:
            ModelError: it has weights of several precisions, or rounded ones.
        """
        graph = self.model.graph
        named = {value.dtype.name for value in graph.inputs if value.dtype and value.name in _LATENTS}
        for node in graph:
            weight = node.inputs[1] if node.op_type in _WEIGHED and len(node.inputs) > 1 else None
            if weight is not None and weight.is_initializer() and weight.dtype is not None:
                named.add(weight.dtype.name)
            elif "Integer" in node.op_type or "QLinear" in node.op_type or "Dequantize" in node.op_type:
                named.add("rounded weights")
        if len(named) != 1 or not named <= _PRECISIONS.keys():
            raise ModelError(
                f"{self.path} computes in {' and '.join(sorted(named)) or 'no precision'}; offcut takes graphs whose "
                "inputs and weights are all fp32, all fp16 or all bf16: export it again in one of these"
            )
        return _PRECISIONS[named.pop()]

    def answers(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What ``run`` gives of the untouched file."""
        return run(self.path, inputs)


def run(path: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ONNX Runtime computes with a file on the CPU: every output by name.

    Args:
        path: the ONNX file, its weights where it says.
        inputs: in the shapes that the file takes; their dtypes are made its.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ModelError: it does not run the file.
    """
    import torch

    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("reading ONNX made elsewhere", "onnxruntime", "cpu") from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # its warnings are about its own fusions
    try:
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        dtypes = {value.name: value.type for value in session.get_inputs()}
        feed = {name: inputs[name].to(getattr(torch, _TORCH[kind])).numpy() for name, kind in dtypes.items()}
        names = [value.name for value in session.get_outputs()]
        answers = session.run(names, feed)
    except Exception as error:  # its exceptions share no public base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"ONNX Runtime cannot run {path}: {reason}; export it again") from error
    return {name: torch.from_numpy(answer) for name, answer in zip(names, answers, strict=True)}


_TORCH = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def open_original(folder: Path) -> Original:
    """A network's ONNX file, checked to be whole.

    Raises:
        ModelError: it is damaged, or its weights are missing, cut short or outside its directory.
    """
    import onnx_ir as ir

    path = folder / ORIGINAL_FILE
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own
        raise ModelError(f"{path} is not a readable ONNX file: export or download it again") from error
    files = [path]
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = Path(tensor.location)
        file = folder / location
        if location.is_absolute() or ".." in location.parts:
            raise ModelError(f"{path} keeps weights outside its directory, in {location}: save it with them beside it")
        if not file.is_file():
            raise ModelError(f"{path} needs its weights {location} beside it, which are not there: copy both")
        if file.stat().st_size < (tensor.offset or 0) + (tensor.length or 0):
            raise ModelError(f"{file} is cut short: copy or export it again")
        if file not in files:
            files.append(file)
    return Original(path, model, tuple(files))
