"""Conversion of a UNet's foreign ONNX file to the files that ``trace.export`` writes.

Only the graph's contract changes: the names of its inputs, outputs and dimensions, and one float32 timestep for each
image. The reference outputs are those of the unchanged file in ONNX Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ..families import NOISE_PRED, downsampling, example_dims, example_inputs
from ..load import PRECISIONS, ModelSource
from ..specs import TensorSpec, symbols
from ..trace.convert import WEIGHTS_FILE, save
from ..trace.export import GRAPH_FILE, PARAMETERS_FILE, ExportedUNet, Progress
from ..trace.parameters import Parameter
from ..trace.reference import REFERENCE_FILE, save_reference
from .contract import one_timestep_per_image, separate_shared_weights, set_contract
from .find import ForeignGraph, open_foreign

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


def export_foreign_unet(
    source: ModelSource,
    out: Path,
    *,
    precision: str,
    dims: Mapping[str, int] | None = None,
    progress: Progress = lambda step: None,
) -> ExportedUNet:
    """Write a foreign UNet with offcut's contract into a directory, with its weights and a reference.

    Args:
        source: a model with ``onnx`` set.
        out: directory, created if it does not exist.
        precision: precision of the file; no other is possible.
        dims: dimensions to fix; must include those that the file itself fixes (``fixed_dims``).
        progress: called with the name of each stage as it begins.

    Raises:
        ModelError: the file is damaged, or its inputs are not those of the UNet in its config.
    """
    progress("read the ONNX file")
    fixed = dict(dims or {})
    foreign = open_foreign(source.folder)
    specs = source.family.specs(source.config, PRECISIONS[precision])
    check_precision(foreign, precision)
    _check_contract(foreign, specs, fixed)
    if invalid := sorted(name for name, size in fixed.items() if name not in symbols(specs) or size < 1):
        raise ModelError(
            f"dims: {', '.join(invalid)} cannot be fixed; give a size of at least 1 for any of "
            f"{', '.join(symbols(specs))}"
        )
    multiple = downsampling(source.config)
    out.mkdir(parents=True, exist_ok=True)
    progress("compute the reference from the foreign ONNX")
    write_foreign_reference(source, {**example_dims(source.config), **fixed}, out / REFERENCE_FILE, foreign)

    progress("convert")
    model = foreign.model
    noise = source.family.noise(source.config, specs[0].dtype).fixed(fixed)
    separate_shared_weights(model)
    one_timestep_per_image(foreign)
    set_contract(model, [spec.fixed(fixed) for spec in specs], [noise])
    parameters = _name_parameters(model, source)
    progress("save")
    save(model, out / GRAPH_FILE, "unet")
    names = {name: asdict(parameter) for name, parameter in parameters.items()}
    (out / PARAMETERS_FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")
    return ExportedUNet(
        path=out / GRAPH_FILE,
        weights=out / WEIGHTS_FILE,
        inputs={spec.name: spec.fixed(fixed) for spec in specs},
        outputs={NOISE_PRED: noise},
        parameters=parameters,
        reference=out / REFERENCE_FILE,
        precision=precision,
        opset=foreign.opset,
        multiple=multiple,
    )


def check_precision(foreign: ForeignGraph, precision: str) -> None:
    """Check that a foreign graph has this precision. A graph is never cast: no reference exists for a cast graph.

    Raises:
        ModelError: the graph has another precision, which the message names.
    """
    if foreign.precision != precision:
        raise ModelError(
            f"{foreign.path} is {foreign.precision}, which cannot be made {precision}: "
            f"build with --precision {foreign.precision}"
        )


def fixed_dims(foreign: ForeignGraph, source: ModelSource) -> dict[str, int]:
    """Return the dimensions that the file itself fixes, by symbol."""
    declared = {str(value.name): value for value in foreign.model.graph.inputs}
    fixed: dict[str, int] = {}
    for spec in source.family.specs(source.config, "float32"):
        value = declared.get(spec.name)
        if value is None or value.shape is None or len(value.shape) != len(spec.shape) or spec.name == "timestep":
            continue
        for symbol, dim in zip(spec.shape, value.shape, strict=True):
            if isinstance(symbol, str) and isinstance(dim, int):
                fixed[symbol] = dim
    return fixed


def write_foreign_reference(
    source: ModelSource, dims: Mapping[str, int], path: Path, foreign: ForeignGraph | None = None
) -> None:
    """Run the unchanged file once at these dimensions, and write its inputs and output to ``path``.

    The timestep is the same for every image, because most foreign graphs take a single timestep.
    """
    import torch

    foreign = foreign or open_foreign(source.folder)
    specs = source.family.specs(source.config, PRECISIONS[foreign.precision])
    inputs = example_inputs(specs, dims)
    inputs["timestep"] = torch.full_like(inputs["timestep"], float(inputs["timestep"][0]))
    shape = next(value.shape for value in foreign.model.graph.inputs if value.name == "timestep")
    size = 0 if not shape else shape[0] if isinstance(shape[0], int) else len(inputs["timestep"])
    timestep = inputs["timestep"][:size] if size else inputs["timestep"][0]
    outputs = foreign.compute({**inputs, "timestep": timestep})
    save_reference(inputs, next(iter(outputs.values())), path)


def _check_contract(foreign: ForeignGraph, specs: tuple[TensorSpec, ...], fixed: Mapping[str, int]) -> None:
    declared = {str(value.name): value for value in foreign.model.graph.inputs}
    expected_inputs = [spec.name for spec in specs]
    if declared.keys() != set(expected_inputs):
        raise ModelError(
            f"{foreign.path} has the inputs {', '.join(declared) or 'none'}, but the UNet of its config takes "
            f"{', '.join(expected_inputs)}: export it again without ControlNets and other additions"
        )
    if len(foreign.model.graph.outputs) != 1:
        raise ModelError(f"{foreign.path} has {len(foreign.model.graph.outputs)} outputs, but a UNet has one")
    for spec in specs:
        value = declared[spec.name]
        dims = value.shape.dims if value.shape is not None else ()
        if spec.name == "timestep":
            continue
        if len(dims) != len(spec.shape):
            raise ModelError(f"{spec.name} of {foreign.path} has {len(dims)} dimensions, not {len(spec.shape)}")
        for size, dim in zip(dims, spec.shape, strict=True):
            expected = dim if isinstance(dim, int) else fixed.get(dim)
            if isinstance(size, int) and size != expected:
                label = f"{dim} = {expected}" if isinstance(dim, str) else str(expected)
                raise ModelError(f"{spec.name} of {foreign.path} is fixed to {size}, not {label}: export it again")


def _name_parameters(model: ir.Model, source: ModelSource) -> dict[str, Parameter]:
    """Rename each weight to its PyTorch parameter, and return the map from parameters to initializers.

    PyTorch's older exporter keeps the name of a parameter, except where it transposes the weight for a ``MatMul``; the
    name of that node contains the layer's name. The map is empty unless every convolution and linear layer of the
    UNet's class is found exactly once.
    """
    expected = _parameter_shapes(source)
    graph = model.graph
    matches: dict[str, tuple[ir.Value, bool]] = {}
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if len(uses) != 1 or value.shape is None:
            continue
        node, shape = uses[0].node, tuple(value.shape.numpy())
        by_column = node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
        transposed = uses[0].idx == 1 and len(shape) == 2 and (node.op_type == "MatMul" or by_column)
        layer = ".".join(part for part in str(node.name).split("/")[:-1] if part)
        for name in (str(value.name), f"{layer}.weight" if transposed else ""):
            name = name.removeprefix("unet.")
            if expected.get(name) == (shape[::-1] if transposed else shape) and name not in matches:
                matches[name] = (value, transposed)
                break
    if any(len(shape) > 1 and name not in matches for name, shape in expected.items()):
        return {}
    names_in_use = graph.initializers.keys() | {str(value.name) for node in graph for value in node.outputs}
    parameters = {}
    for name, (value, transposed) in matches.items():
        if value.name != name and name not in names_in_use:
            graph.initializers.pop(str(value.name))
            value.name = name
            graph.initializers[name] = value
        parameters[name] = Parameter(str(value.name), transposed)
    return parameters


def _parameter_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of the UNet's class by name."""
    import diffusers
    import torch

    unet_class: Any = getattr(diffusers, source.family.unet_class)
    with torch.device("meta"):
        unet: torch.nn.Module = unet_class.from_config(dict(source.config))
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
