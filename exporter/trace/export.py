"""From a UNet in memory to one ONNX file with its weights beside it.

The UNet is exported once, with ``torch.export`` and PyTorch's ONNX exporter, and its weights are written once. A
linear layer's weight is stored as ``MatMul`` wants it, transposed; the parameter map keeps the way back, for swapping
LoRA weights and for refitting engines.
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
from . import video
from .convert import WEIGHTS_FILE, quiet, save, to_onnx
from .parameters import Parameter, read_parameters
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

# diffusers calls .contiguous() from batch 64 on, which torch.export takes for another program. The graph is the same.
_LARGEST_TRACED_BATCH = 63

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportedUNet:
    """A UNet as an ONNX file.

    Attributes:
        path: the ONNX file.
        weights: the file with its weights, in the same directory.
        inputs: by name, in the graph's order.
        outputs: ``noise_pred``.
        parameters: PyTorch parameter name -> initializer.
        reference: the file with inputs and what eager PyTorch made of them.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        opset: of the default ONNX domain.
        multiple: the latent's height and width must be multiples of it.
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
    """Export a model's UNet into a directory: ``unet.onnx``, ``weights.data``, ``parameters.json``,
    ``reference.safetensors``.

    Args:
        model: a hub id, a diffusers directory, or what ``locate`` gave.
        out: the directory; made if it is not there.
        precision: of weights and computation. fp16 and bf16 can cost image quality.
        opset: of the ONNX file.
        dims: fixes dimensions (``{"batch": 2, "height": 64}``); those left out stay dynamic.
        adapters: of ``residuals.ADAPTERS``; gives the graph the inputs that a ControlNet or T2I-Adapter fills.
        ip_adapters: to build into the UNet.
        revision, variant, subfolder: as in diffusers.
        attention: ``"cross-frame"`` for Text2Video-Zero; None for what the model's own pipeline uses.
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
        pairs=source.attention is not None,
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
    pairs: bool = False,
    progress: Progress = lambda step: None,
) -> ExportedUNet:
    """Export this UNet; see ``export``. Its weights must already have the precision.

    Args:
        pairs: whether the batch is even, as attention between the images of each half needs it.
    """
    if opset not in OPSETS:
        raise ModelError(f"opset {opset} is not supported; choose {OPSETS.start} to {OPSETS.stop - 1}")
    fixed = dict(dims or {})
    specs = family.specs(config, PRECISIONS[precision], adapters)
    if pairs and fixed.get("batch", 2) % 2:
        raise ModelError(f"cross-frame attention needs two halves of a batch, not {fixed['batch']}: fix an even one")
    if wrong := sorted(name for name, size in fixed.items() if name not in symbols(specs) or size < 1):
        known = ", ".join(symbols(specs))
        raise ModelError(f"dims: {', '.join(wrong)} cannot be fixed; give a size of at least 1 for any of {known}")
    multiple = downsampling(config)
    for side in ("height", "width"):
        if fixed.get(side, 0) % multiple:
            raise ModelError(f"the latent's {side} cannot be {fixed[side]}: this UNet needs a multiple of {multiple}")
    family.check_limits(config, fixed)
    out.mkdir(parents=True, exist_ok=True)
    examples = {**example_dims(config, pairs), **fixed}

    progress("trace")
    write_reference(unet, family, specs, examples, out / REFERENCE_FILE)
    program = export_program(unet, family, specs, examples, fixed, multiple, pairs)
    progress("convert")
    noise = family.noise(config, specs[0].dtype).fixed(fixed)
    model, parameters = to_onnx(program, [spec.name for spec in specs], [NOISE_PRED], opset, "unet.")
    del program
    _measure_the_sample(model, specs)
    _name_dims(model, specs, noise, fixed)
    progress("save")
    save(model, out / GRAPH_FILE, "unet")
    names = {name: asdict(parameter) for name, parameter in parameters.items()}
    (out / PARAMETERS_FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")
    return _described(out, family, config, parameters, precision=precision, opset=opset, dims=fixed, adapters=adapters)


def exported_in(
    folder: Path,
    source: ModelSource,
    *,
    precision: str,
    opset: int,
    dims: Mapping[str, int],
    adapters: Sequence[str] = (),
) -> ExportedUNet:
    """Return the export whose files lie in this directory, made by ``export`` with the same arguments."""
    parameters = read_parameters(folder / PARAMETERS_FILE)
    return _described(
        folder,
        source.family,
        source.config,
        parameters,
        precision=precision,
        opset=opset,
        dims=dims,
        adapters=adapters,
    )


def _described(
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
    """Return the description of an export whose files lie in this directory."""
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


def export_program(
    unet: torch.nn.Module,
    family: Family,
    specs: tuple[TensorSpec, ...],
    dims: Mapping[str, int],
    fixed: Mapping[str, int],
    multiple: int,
    pairs: bool = False,
) -> torch.export.ExportedProgram:
    """The UNet as a PyTorch program with flat inputs and symbolic shapes.

    Args:
        dims: of the example inputs that the UNet is traced with.
        fixed: the dimensions to leave static.
        multiple: that symbolic height and width are a multiple of.
        pairs: whether the batch is even.
    """
    import torch

    names = [spec.name for spec in specs]
    left_open = [spec.fixed(fixed) for spec in specs]
    moving = family.is_video

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            arguments = family.arguments(dict(zip(names, tensors, strict=True))) | {"return_dict": False}
            output = (video.call(self.unet, left_open, tensors, **arguments) if moving else self.unet(**arguments))[0]
            assert isinstance(output, torch.Tensor)
            return output

    symbol = dim_symbols(multiple, largest_batch=_LARGEST_TRACED_BATCH, moving=moving, pairs=pairs)
    dynamic = tuple(
        {axis: symbol(dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in left_open
    )
    examples = tuple(example_inputs(specs, dims).values())
    with torch.no_grad(), quiet():
        return torch.export.export(Flat().eval(), examples, dynamic_shapes=(dynamic,), strict=False)


def dim_symbols(
    multiple: int, largest_batch: int | None = None, moving: bool = False, pairs: bool = False
) -> Callable[[str], Any]:
    """From a dimension of a ``TensorSpec``, ``"height"`` or ``"height/4"``, to PyTorch's symbol for it.

    Args:
        multiple: that height and width are a multiple of; no divisor is larger.
        largest_batch: None for no limit.
        moving: of a video UNet, whose batch and frames PyTorch relates by itself: its named symbols know no products.
        pairs: whether the batch is even.
    """
    import torch

    units = {side: torch.export.Dim(f"_{side}") for side in ("height", "width")}
    batch = torch.export.Dim("batch", max=largest_batch)
    if pairs:
        batch = 2 * torch.export.Dim("_pairs", max=largest_batch and largest_batch // 2)
    whole = {"batch": batch, "sequence": torch.export.Dim("sequence")}

    def symbol(dim: str) -> Any:
        parts = factors(dim)
        name = parts.symbols[0]
        if name == "frames" or len(parts.symbols) > 1 or (moving and name == "batch"):
            return torch.export.Dim.DYNAMIC
        if name in whole:
            return whole[name]
        factor = multiple // parts.divisor
        return units[name] if factor == 1 else factor * units[name]

    return symbol


def _measure_the_sample(model: ir.Model, specs: tuple[TensorSpec, ...]) -> None:
    """Read sizes off the sample, where the exporter took another input for its size, such as a residual.

    It takes any input that has the size; a shallow graph would then need that input for its shape alone.
    """
    import onnx_ir as ir

    sample = model.graph.inputs[0]
    axes = {dim: axis for axis, dim in enumerate(specs[0].shape) if isinstance(dim, str)}
    shapes = {spec.name: spec.shape for spec in specs[1:]}

    def made(before: ir.Node, kind: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"{before.outputs[0].name}_{len(model.graph)}"
        model.graph.insert_before(before, node)
        return node.outputs[0]

    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or value.name not in shapes or not value.is_graph_input():
            continue
        measured = shapes[value.name]
        bounds = [node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end")]
        dims = measured[slice(*bounds)]
        taken = [Factors(dim, (), 1) if isinstance(dim, int) else factors(dim) for dim in dims]
        if not all(symbol in axes for part in taken for symbol in part.symbols):
            continue  # the text's length
        parts = []
        for each in taken:
            sizes = [made(node, "Shape", [sample], start=axes[name], end=axes[name] + 1) for name in each.symbols]
            if each.number != 1 or not sizes:
                sizes.append(made(node, "Constant", [], value_ints=[each.number]))
            size = sizes[0]
            for other in sizes[1:]:
                size = made(node, "Mul", [size, other])
            if each.divisor != 1:
                size = made(node, "Div", [size, made(node, "Constant", [], value_ints=[each.divisor])])
            parts.append(size)
        node.outputs[0].replace_all_uses_with(parts[0] if len(parts) == 1 else made(node, "Concat", parts, axis=0))
        model.graph.remove(node, safe=True)


def _name_dims(model: ir.Model, specs: tuple[TensorSpec, ...], noise: TensorSpec, fixed: Mapping[str, int]) -> None:
    """Call the inputs' and the output's symbolic dimensions batch, frames, height, width and sequence."""
    import onnx_ir as ir

    shapes = {spec.name: spec.fixed(fixed).shape for spec in specs}
    for value in model.graph.inputs:
        dims = shapes[str(value.name)]
        value.shape = ir.Shape(dims)
    output = model.graph.outputs[0]
    output.shape = ir.Shape(noise.shape)
    # Inner shapes hold the tracer's own symbols (8*s16), which no longer agree with those names.
    for node in model.graph:
        for value in node.outputs:
            if value is not output and value.shape is not None and not value.shape.is_static():
                value.shape = None
