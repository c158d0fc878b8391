"""Export of a UNet from PyTorch to one ONNX file and one weights file in the same directory.

The UNet is exported once, with ``torch.export`` and PyTorch's ONNX exporter. The weight of a linear layer is stored
transposed, as ``MatMul`` reads it. The parameter map records the transpositions, because swapping LoRA weights and
refitting engines start from PyTorch's layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ..families import NOISE_PRED, Family, downsampling, example_dims, example_inputs
from ..ip_adapter import IPAdapter
from ..load import PRECISIONS, ModelSource, load_unet, locate
from ..specs import Factors, TensorSpec, factors, symbols
from .convert import WEIGHTS_FILE, save, to_onnx
from .parameters import Parameter, read_parameters
from .program import export_program
from .reference import REFERENCE_FILE, write_reference

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

# Opset 23 keeps Attention and GroupNormalization whole: 32 and 61 nodes in Stable Diffusion 1.5 instead of hundreds.
DEFAULT_OPSET = 23
OPSETS = range(20, 25)
GRAPH_FILE = "unet.onnx"
PARAMETERS_FILE = "parameters.json"
SAMPLE = "sample"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportedUNet:
    """A UNet exported to an ONNX file.

    Attributes:
        path: the ONNX file.
        weights: the weights file, in the same directory.
        inputs: specs by name, in the graph's order.
        outputs: the spec of ``noise_pred``.
        parameters: where each PyTorch parameter is stored, by the parameter's name.
        reference: file with example inputs and the output of eager PyTorch for them.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        opset: version of the default ONNX domain.
        multiple: number that the latent's height and width must be a multiple of.
    """

    path: Path
    weights: Path
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    parameters: Mapping[str, Parameter]
    reference: Path
    precision: str
    opset: int
    multiple: int


def export(
    model: str | Path | ModelSource,
    out: str | Path,
    *,
    precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    dims: Mapping[str, int] | None = None,
    adapters: Sequence[str] = (),
    ip_adapters: Sequence[IPAdapter] = (),
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    attention: str | None = None,
    progress: Progress = lambda step: None,
) -> ExportedUNet:
    """Export a model's UNet to ONNX.

    The files are ``unet.onnx``, ``weights.data``, ``parameters.json`` and ``reference.safetensors``.

    Args:
        model: a hub id, a diffusers directory, or the result of ``locate``.
        out: output directory, created if it does not exist.
        precision: precision of weights and computation. fp16 and bf16 can cost image quality.
        opset: version of the default ONNX domain.
        dims: dimensions to fix, e.g. ``{"batch": 2, "height": 64}``; all others stay dynamic.
        adapters: names from ``residuals.ADAPTERS``; adds the inputs that a ControlNet or T2I-Adapter fills.
        ip_adapters: IP-Adapters to build into the UNet.
        revision: branch, tag or commit on the hub, as in diffusers.
        variant: variant of the weight files, as in diffusers.
        subfolder: folder of the UNet inside the model, as in diffusers.
        attention: ``"cross-frame"`` for Text2Video-Zero; None for the attention of the model's own pipeline.
        progress: called with the name of each stage as it begins.

    Raises:
        ModelError: the model cannot be read or its architecture is not supported.
    """
    source = (
        model
        if isinstance(model, ModelSource)
        else locate(
            model,
            revision=revision,
            variant=variant,
            subfolder=subfolder,
            ip_adapters=ip_adapters,
            attention=attention,
        )
    )
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    progress("load")
    unet = load_unet(source, precision)
    return trace(
        unet,
        source.family,
        source.config,
        Path(out),
        precision=precision,
        opset=opset,
        dims=dims,
        adapters=adapters,
        even_batch=source.attention is not None,
        progress=progress,
    )


def trace(
    unet: torch.nn.Module,
    family: Family,
    config: Mapping[str, Any],
    out: Path,
    *,
    precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    dims: Mapping[str, int] | None = None,
    adapters: Sequence[str] = (),
    even_batch: bool = False,
    progress: Progress = lambda step: None,
) -> ExportedUNet:
    """Export a UNet in memory, whose weights already have the precision; see ``export``.

    Args:
        even_batch: whether the batch is always even, as attention between the images of each half requires.
    """
    if opset not in OPSETS:
        raise ModelError(f"opset {opset} is not supported; choose {OPSETS.start} to {OPSETS.stop - 1}")
    fixed = dict(dims or {})
    specs = family.specs(config, PRECISIONS[precision], adapters)
    if even_batch and fixed.get("batch", 2) % 2:
        raise ModelError(f"cross-frame attention needs two halves of a batch, not {fixed['batch']}: fix an even one")
    if invalid := sorted(name for name, size in fixed.items() if name not in symbols(specs) or size < 1):
        known = ", ".join(symbols(specs))
        raise ModelError(f"dims: {', '.join(invalid)} cannot be fixed; give a size of at least 1 for any of {known}")
    multiple = downsampling(config)
    for side in ("height", "width"):
        if fixed.get(side, 0) % multiple:
            raise ModelError(f"the latent's {side} cannot be {fixed[side]}: this UNet needs a multiple of {multiple}")
    family.check_limits(config, fixed)
    out.mkdir(parents=True, exist_ok=True)
    examples = {**example_dims(config, even_batch), **fixed}

    progress("trace")
    write_reference(unet, family, example_inputs(specs, examples), out / REFERENCE_FILE)
    program = export_program(unet, family, specs, examples, fixed, multiple, even_batch)
    progress("convert")
    noise = family.noise(config, specs[0].dtype).fixed(fixed)
    model, parameters = to_onnx(program, [spec.name for spec in specs], [NOISE_PRED], opset, "unet.")
    del program
    _read_sizes_from_sample(model, specs)
    _name_dims(model, specs, noise, fixed)
    progress("save")
    save(model, out / GRAPH_FILE, "unet")
    names = {name: asdict(parameter) for name, parameter in parameters.items()}
    (out / PARAMETERS_FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")
    return _describe(out, family, config, parameters, precision=precision, opset=opset, dims=fixed, adapters=adapters)


def read_export(
    folder: Path,
    source: ModelSource,
    *,
    precision: str,
    opset: int,
    dims: Mapping[str, int],
    adapters: Sequence[str] = (),
) -> ExportedUNet:
    """Return the export in this directory, which ``export`` wrote with the same arguments."""
    parameters = read_parameters(folder / PARAMETERS_FILE)
    return _describe(
        folder,
        source.family,
        source.config,
        parameters,
        precision=precision,
        opset=opset,
        dims=dims,
        adapters=adapters,
    )


def _describe(
    folder: Path,
    family: Family,
    config: Mapping[str, Any],
    parameters: Mapping[str, Parameter],
    *,
    precision: str,
    opset: int,
    dims: Mapping[str, int],
    adapters: Sequence[str],
) -> ExportedUNet:
    """Return the ``ExportedUNet`` of the files in this directory."""
    specs = family.specs(config, PRECISIONS[precision], adapters)
    return ExportedUNet(
        path=folder / GRAPH_FILE,
        weights=folder / WEIGHTS_FILE,
        inputs={spec.name: spec.fixed(dims) for spec in specs},
        outputs={NOISE_PRED: family.noise(config, specs[0].dtype).fixed(dims)},
        parameters=parameters,
        reference=folder / REFERENCE_FILE,
        precision=precision,
        opset=opset,
        multiple=downsampling(config),
    )


def _read_sizes_from_sample(model: ir.Model, specs: tuple[TensorSpec, ...]) -> None:
    """Make the graph read sizes from the sample where PyTorch's exporter reads them from another input.

    The exporter reads a size from any input with that size, such as a residual. A shallow graph would then need that
    input for its shape alone.
    """
    import onnx_ir as ir

    sample = model.graph.inputs[0]
    axes = {dim: axis for axis, dim in enumerate(specs[0].shape) if isinstance(dim, str)}
    shapes = {spec.name: spec.shape for spec in specs[1:]}

    def insert(before: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = f"{before.outputs[0].name}_{len(model.graph)}"
        model.graph.insert_before(before, node)
        return node.outputs[0]

    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or value.name not in shapes or not value.is_graph_input():
            continue
        shape = shapes[value.name]
        bounds = [node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end")]
        dims = shape[slice(*bounds)]
        dim_factors = [Factors(dim, (), 1) if isinstance(dim, int) else factors(dim) for dim in dims]
        if not all(symbol in axes for part in dim_factors for symbol in part.symbols):
            continue  # the sample does not have this size, e.g. the length of the text
        sizes_by_dim = []
        for part in dim_factors:
            sizes = [insert(node, "Shape", [sample], start=axes[name], end=axes[name] + 1) for name in part.symbols]
            if part.number != 1 or not sizes:
                sizes.append(insert(node, "Constant", [], value_ints=[part.number]))
            size = sizes[0]
            for other in sizes[1:]:
                size = insert(node, "Mul", [size, other])
            if part.divisor != 1:
                size = insert(node, "Div", [size, insert(node, "Constant", [], value_ints=[part.divisor])])
            sizes_by_dim.append(size)
        node.outputs[0].replace_all_uses_with(
            sizes_by_dim[0] if len(sizes_by_dim) == 1 else insert(node, "Concat", sizes_by_dim, axis=0)
        )
        model.graph.remove(node, safe=True)


def _name_dims(model: ir.Model, specs: tuple[TensorSpec, ...], noise: TensorSpec, fixed: Mapping[str, int]) -> None:
    """Name the symbolic dimensions of the inputs and the output batch, frames, height, width and sequence."""
    import onnx_ir as ir

    shapes = {spec.name: spec.fixed(fixed).shape for spec in specs}
    for value in model.graph.inputs:
        dims = shapes[str(value.name)]
        value.shape = ir.Shape(dims)
    output = model.graph.outputs[0]
    output.shape = ir.Shape(noise.shape)
    # Shapes of inner values hold the tracer's own symbols (8*s16), which do not match these names.
    for node in model.graph:
        for value in node.outputs:
            if value is not output and value.shape is not None and not value.shape.is_static():
                value.shape = None
