"""Foreign ONNX: files that another exporter wrote, in the folders that optimum uses.

    DIR/unet/model.onnx, text_encoder/model.onnx, vae_decoder/model.onnx, ...   each next to its config.json

A network is taken from its ONNX file only if it has no safetensors: PyTorch's weights allow every precision and option.
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

FOREIGN_FILE = "model.onnx"
OPTIMUM_CLASSES = {
    "ORTUnet": "UNet2DConditionModel",
    "ORTVaeDecoder": "AutoencoderKL",
    "ORTVaeEncoder": "AutoencoderKL",
}
"""diffusers' classes by the names that optimum writes when it saves a pipeline that it loaded."""

_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_LATENTS = ("sample", "latent_sample")
_WEIGHTED_OPS = ("Conv", "MatMul", "Gemm")


def is_foreign(folder: Path) -> bool:
    """Return whether a network's directory holds an ONNX graph and no safetensors."""
    return (folder / FOREIGN_FILE).is_file() and not any(folder.glob("*.safetensors"))


@dataclass(frozen=True)
class ForeignGraph:
    """A network's ONNX graph from another exporter. The weights stay on disk.

    Attributes:
        path: the ONNX file.
        model: the graph in memory; changes to it do not change the file.
        files: the ONNX file and its weight files.
    """

    path: Path
    model: ir.Model
    files: tuple[Path, ...]

    @property
    def opset(self) -> int:
        """Version of the default ONNX domain."""
        return int(self.model.opset_imports[""])

    @property
    def precision(self) -> str:
        """Precision of the weights and of the latents or images: ``fp32``, ``fp16`` or ``bf16``.

        Raises:
            ModelError: the graph has weights of several precisions, or quantized weights.
        """
        graph = self.model.graph
        dtypes = {value.dtype.name for value in graph.inputs if value.dtype and value.name in _LATENTS}
        for node in graph:
            weight = node.inputs[1] if node.op_type in _WEIGHTED_OPS and len(node.inputs) > 1 else None
            if weight is not None and weight.is_initializer() and weight.dtype is not None:
                dtypes.add(weight.dtype.name)
            elif "Integer" in node.op_type or "QLinear" in node.op_type or "Dequantize" in node.op_type:
                dtypes.add("quantized weights")
        if len(dtypes) != 1 or not dtypes <= _PRECISIONS.keys():
            raise ModelError(
                f"{self.path} computes in {' and '.join(sorted(dtypes)) or 'no precision'}; offcut takes graphs whose "
                "inputs and weights are all fp32, all fp16 or all bf16: export it again in one of these"
            )
        return _PRECISIONS[dtypes.pop()]

    def compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs of the unchanged file; see ``run``."""
        return run(self.path, inputs)


def run(path: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run an ONNX file with ONNX Runtime on the CPU and return its outputs by name.

    Args:
        path: the ONNX file, with its weights where the file refers to them.
        inputs: tensors by name, in shapes that the file accepts. They are cast to the file's dtypes.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ModelError: ONNX Runtime cannot run the file.
    """
    import torch

    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("reading foreign ONNX", "onnxruntime", "cpu") from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # ONNX Runtime warns about its own fusions
    try:
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        dtypes = {value.name: value.type for value in session.get_inputs()}
        feed = {name: inputs[name].to(getattr(torch, _TORCH_DTYPES[kind])).numpy() for name, kind in dtypes.items()}
        names = [value.name for value in session.get_outputs()]
        outputs = session.run(names, feed)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"ONNX Runtime cannot run {path}: {reason}; export it again") from error
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


_TORCH_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def open_foreign(folder: Path) -> ForeignGraph:
    """Open a network's ONNX file, and check that its weight files are complete.

    Raises:
        ModelError: the file is damaged, or its weights are missing, truncated or outside its directory.
    """
    import onnx_ir as ir

    path = folder / FOREIGN_FILE
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise exceptions of their own
        raise ModelError(f"{path} is not a readable ONNX file: export or download it again") from error
    files = [path]
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = Path(tensor.location)
        file = folder / location
        if location.is_absolute() or ".." in location.parts:
            raise ModelError(f"{path} keeps weights outside its directory, in {location}: save both in one directory")
        if not file.is_file():
            raise ModelError(f"{path} needs its weights file {location}, which is missing: copy both files")
        if file.stat().st_size < (tensor.offset or 0) + (tensor.length or 0):
            raise ModelError(f"{file} is truncated: copy or export it again")
        if file not in files:
            files.append(file)
    return ForeignGraph(path, model, tuple(files))
