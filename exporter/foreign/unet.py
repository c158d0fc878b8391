"""From a UNet's ONNX file that was made elsewhere to what ``trace.export`` makes of PyTorch's weights.

The graph stays as it is but for its contract: names of inputs, outputs and dimensions, and one float32 timestep for
each image. Its answers are ONNX Runtime's, of the untouched file.
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
from ..trace.reference import REFERENCE_FILE, keep_answer
from .contract import name_contract, separate_shared_weights, spread_timestep
from .find import Original, open_original

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


def import_unet(
    source: ModelSource,
    out: Path,
    *,
    precision: str,
    dims: Mapping[str, int] | None = None,
    progress: Progress = lambda step: None,
) -> ExportedUNet:
    """Give the ONNX file of a UNet offcut's contract, with its weights beside it and the answers of the original.

    Args:
        source: of a model that is ONNX.
        out: the directory; made if it is not there.
        precision: which must be the file's own.
        dims: fixes dimensions; those that the file itself fixes must be among them (``fixed_by``).
        progress: called with the name of each stage as it begins.

    Raises:
        ModelError: the file is damaged, or no UNet of its config.
    """
    progress("read the ONNX file")
    fixed = dict(dims or {})
    original = open_original(source.folder)
    specs = source.family.specs(source.config, PRECISIONS[precision])
    check_precision(original, precision)
    _check_contract(original, specs, fixed)
    if wrong := sorted(name for name, size in fixed.items() if name not in symbols(specs) or size < 1):
        raise ModelError(
            f"dims: {', '.join(wrong)} cannot be fixed; give a size of at least 1 for any of "
            f"{', '.join(symbols(specs))}"
        )
    multiple = downsampling(source.config)
    out.mkdir(parents=True, exist_ok=True)
    progress("compute the original's answers")
    write_original_answer(source, {**example_dims(source.config), **fixed}, out / REFERENCE_FILE, original)

    progress("convert")
    model = original.model
    noise = source.family.noise(source.config, specs[0].dtype).fixed(fixed)
    separate_shared_weights(model)
    spread_timestep(original)
    name_contract(model, [spec.fixed(fixed) for spec in specs], [noise])
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
        opset=original.opset,
        multiple=multiple,
    )


def check_precision(original: Original, precision: str) -> None:
    """Refuse another precision than the file has: casting would be neither's answer.

    Raises:
        ModelError: with the one to ask for.
    """
    if original.precision != precision:
        raise ModelError(
            f"{original.path} is {original.precision}, which cannot be made {precision}: "
            f"build with --precision {original.precision}"
        )


def fixed_by(original: Original, source: ModelSource) -> dict[str, int]:
    """The dimensions of the contract that the file leaves no choice of."""
    declared = {str(value.name): value for value in original.model.graph.inputs}
    fixed: dict[str, int] = {}
    for spec in source.family.specs(source.config, "float32"):
        value = declared.get(spec.name)
        if value is None or value.shape is None or len(value.shape) != len(spec.shape) or spec.name == "timestep":
            continue
        for wanted, dim in zip(spec.shape, value.shape, strict=True):
            if isinstance(wanted, str) and isinstance(dim, int):
                fixed[wanted] = dim
    return fixed


def write_original_answer(
    source: ModelSource, dims: Mapping[str, int], path: Path, original: Original | None = None
) -> None:
    """Run the untouched file once at these dimensions, and keep inputs and output.

    The timestep is the same for every image, as most files take just one.
    """
    import torch

    original = original or open_original(source.folder)
    specs = source.family.specs(source.config, PRECISIONS[original.precision])
    inputs = example_inputs(specs, dims)
    inputs["timestep"] = torch.full_like(inputs["timestep"], float(inputs["timestep"][0]))
    shape = next(value.shape for value in original.model.graph.inputs if value.name == "timestep")
    size = 0 if not shape else shape[0] if isinstance(shape[0], int) else len(inputs["timestep"])
    theirs = inputs["timestep"][:size] if size else inputs["timestep"][0]
    answers = original.answers({**inputs, "timestep": theirs})
    keep_answer(inputs, next(iter(answers.values())), path)


def _check_contract(original: Original, specs: tuple[TensorSpec, ...], fixed: Mapping[str, int]) -> None:
    declared = {str(value.name): value for value in original.model.graph.inputs}
    wanted = {spec.name for spec in specs}
    if declared.keys() != wanted:
        raise ModelError(
            f"{original.path} has the inputs {', '.join(declared) or 'none'}, but the UNet of its config takes "
            f"{', '.join(spec.name for spec in specs)}: export it again, without what is added to it"
        )
    if len(original.model.graph.outputs) != 1:
        raise ModelError(f"{original.path} has {len(original.model.graph.outputs)} outputs, but a UNet has one")
    for spec in specs:
        value = declared[spec.name]
        dims = value.shape.dims if value.shape is not None else ()
        if spec.name == "timestep":
            continue
        if len(dims) != len(spec.shape):
            raise ModelError(f"{spec.name} of {original.path} has {len(dims)} dimensions, not {len(spec.shape)}")
        for got, dim in zip(dims, spec.shape, strict=True):
            expected = dim if isinstance(dim, int) else fixed.get(dim)
            if isinstance(got, int) and got != expected:
                said = f"{dim} = {expected}" if isinstance(dim, str) else str(expected)
                raise ModelError(f"{spec.name} of {original.path} is fixed to {got}, not {said}: export it again")


def _name_parameters(model: ir.Model, source: ModelSource) -> dict[str, Parameter]:
    """Call each weight matrix after its parameter, and map the parameters that are stored as they are or transposed.

    PyTorch's older exporter keeps a parameter's name but where it transposes it for a ``MatMul``, which is called after
    the layer. Nothing is mapped unless every convolution and linear layer of the UNet's class is found, once.
    """
    expected = _shapes(source)
    graph = model.graph
    found: dict[str, tuple[ir.Value, bool]] = {}
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
            if expected.get(name) == (shape[::-1] if transposed else shape) and name not in found:
                found[name] = (value, transposed)
                break
    if any(len(shape) > 1 and name not in found for name, shape in expected.items()):
        return {}
    taken = graph.initializers.keys() | {str(value.name) for node in graph for value in node.outputs}
    parameters = {}
    for name, (value, transposed) in found.items():
        if value.name != name and name not in taken:
            graph.initializers.pop(str(value.name))
            value.name = name
            graph.initializers[name] = value
        parameters[name] = Parameter(str(value.name), transposed)
    return parameters


def _shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Of the parameters of the UNet's class, by name."""
    import diffusers
    import torch

    unet_class: Any = getattr(diffusers, source.family.unet_class)
    with torch.device("meta"):
        unet: torch.nn.Module = unet_class.from_config(dict(source.config))
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
