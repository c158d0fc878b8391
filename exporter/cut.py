"""The cut on ONNX: one UNet graph becomes a full graph and a shallow graph that share cached features.

In a UNet's decoder a two-input ``Concat(hidden, skip)`` on the channel axis joins each skip connection. ``hidden``
comes from the deeper layers and changes little from one denoising step to the next; DeepCache (arXiv 2312.00858,
section 3.2) caches it. The full graph has ``hidden`` as a further output. The shallow graph has it as an input, without
the nodes that computed it.

Joins are found by topology alone: one input of the concat depends on a strict subset of the convolutions that the other
input depends on. So the cut works on a UNet from any exporter, whatever its nodes are called.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CutError, InternalError, ModelError
from .families import NOISE_PRED
from .graph import CONVOLUTIONS, PROBE_DIMS, UNetGraph, infer_shapes, read, weight_of
from .specs import Dim, Factors, Shape, TensorSpec, factors
from .trace.convert import WEIGHTS_FILE
from .trace.export import ExportedUNet

if TYPE_CHECKING:
    import onnx_ir as ir

MLPERF = "mlperf"
CONVENTIONS = "deepcache:K, paper:K (= deepcache:K+1) or mlperf"


@dataclass(frozen=True)
class CachedTensor:
    """A tensor that is an output of the full graph and an input of a shallow graph.

    Attributes:
        value: name of the tensor in the uncut graph.
        spec: name of the tensor in both graphs of a pair, its dtype, and its shape
            ``[batch, channels, height/d, width/d]``. Videos have ``batch*frames`` in place of ``batch``.
    """

    value: str
    spec: TensorSpec


@dataclass(frozen=True)
class Cut:
    """A place to cut a UNet.

    Attributes:
        name: ``deepcache:k``, with k counted from the outermost join, or ``mlperf``.
        aliases: names of the same cut in other conventions.
        tensors: the tensors that are cached there.
    """

    name: str
    aliases: tuple[str, ...]
    tensors: tuple[CachedTensor, ...]

    @property
    def cached(self) -> tuple[TensorSpec, ...]:
        return tuple(tensor.spec for tensor in self.tensors)

    @property
    def slug(self) -> str:
        """The name as part of a file name, legal on Windows."""
        return self.name.replace(":", "-")


@dataclass(frozen=True)
class GraphPair:
    """The full and the shallow graph of a cut, in one directory with their weights.

    Attributes:
        full: ONNX file with the outputs ``noise_pred`` and then the cached features.
        shallow: ONNX file with the cached features as inputs of the same names.
        cut: the cut between them.
        cached: specs of the cached features.
    """

    full: Path
    shallow: Path
    cut: Cut
    cached: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Join:
    """A skip connection's ``Concat(hidden, skip)``."""

    node: ir.Node
    hidden: ir.Value
    skip: ir.Value


def find_cuts(graph: ExportedUNet | UNetGraph | str | Path) -> list[Cut]:
    """Return every cut of a UNet's ONNX graph, outermost first, then ``mlperf``.

    Args:
        graph: result of ``export``, or the path of any UNet's ONNX file.

    Raises:
        CutError: the graph has no skip connection; the message says what was searched for.
        ModelError: the file is not a UNet's graph.
    """
    unet = _open(graph)
    joins = find_joins(unet.model)
    shapes = infer_shapes(unet)
    unknown = [str(value.name) for join in joins for value in (join.hidden, join.skip) if value.name not in shapes]
    if unknown:
        _deduce_from_skips(joins, shapes)
    cuts = [
        Cut(
            name=f"deepcache:{k}",
            aliases=(f"paper:{k - 1}",) if k else (),
            tensors=(_cached(f"deep_feature_{k}", join.hidden, unet, shapes),),
        )
        for k, join in enumerate(joins)
    ]
    if mlperf := _mlperf(joins, unet, shapes):
        cuts.append(mlperf)
    return cuts


def find_cut(cuts: Sequence[Cut], name: str) -> Cut:
    """Return the cut with this name or alias.

    Raises:
        CutError: no cut has this name; the message lists the names.
    """
    canonical = canonical_name(name)
    for cut in cuts:
        if cut.name == canonical:
            return cut
    known = ", ".join(cut.name for cut in cuts)
    raise CutError(f"this UNet has no cut {name!r}: write one of {known}, or paper:K for deepcache:K+1")


def canonical_name(name: str) -> str:
    """Return offcut's own name for a cut: ``paper:k`` is ``deepcache:k+1``."""
    paper = re.fullmatch(r"paper:(\d+)", name)
    return f"deepcache:{int(paper[1]) + 1}" if paper else name


def split(
    graph: ExportedUNet | UNetGraph | str | Path, cut: Cut | str = "deepcache:0", out: str | Path | None = None
) -> GraphPair:
    """Write the full and the shallow graph of one cut next to the weights.

    Args:
        graph: result of ``export``, or the path of any UNet's ONNX file.
        cut: a cut from ``find_cuts``, or its name.
        out: output directory, by default the graph's own; the weights are copied into any other directory.

    Raises:
        CutError, ModelError: as in ``find_cuts``.
    """
    return split_all(graph, [cut], out)[0]


def split_all(
    graph: ExportedUNet | UNetGraph | str | Path,
    cuts: Sequence[Cut | str],
    out: str | Path | None = None,
    suffix: str = "",
    link: bool = False,
) -> list[GraphPair]:
    """Write one full graph with the features of all the cuts, and a shallow graph for each cut; see ``split``.

    Args:
        suffix: appended to the names of the files, as in ``full-1a2b.onnx``, so that several sets fit in one directory.
        link: whether to link the weights into ``out`` where the file system can, instead of copying them. Only for
            temporary directories: the ``onnx`` package refuses weights with a second hard link.
    """
    from onnx_ir.serde import SerdeError

    unet = _open(graph)
    known = find_cuts(unet)
    selected = list(dict.fromkeys(find_cut(known, cut if isinstance(cut, str) else cut.name) for cut in cuts))
    if not selected:
        raise CutError(f"no cut was named: write {CONVENTIONS}")
    folder = Path(out) if out is not None else unet.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    full = folder / f"full{suffix}.onnx"
    if full.exists() and full.samefile(unet.path):
        raise ModelError(f"{full} would be overwritten by its own full graph: give another directory")
    try:
        _write_full(unet, selected, full, link)
        return [
            GraphPair(full, _write_shallow(full, cut, folder / f"shallow-{cut.slug}{suffix}.onnx"), cut, cut.cached)
            for cut in selected
        ]
    except SerdeError as error:  # e.g. a text that is not UTF-8
        raise ModelError(f"{unet.path} holds something that ONNX cannot store; export it again") from error


def find_joins(model: ir.Model) -> list[Join]:
    """Return the concats of the skip connections, outermost first.

    Raises:
        CutError: the graph has no skip connection.
    """
    upstream: dict[ir.Value, int] = {}  # the convolutions that each value depends on, one bit for each
    count = 0
    joins: list[tuple[int, Join]] = []  # number of convolutions that the join depends on, join
    for node in model.graph:
        bits = 0
        for value in node.inputs:
            if value is not None:
                bits |= upstream.get(value, 0)
        if node.op_type in CONVOLUTIONS:
            bits |= 1 << count
            count += 1
        for output in node.outputs:
            upstream[output] = bits
        if node.op_type != "Concat" or len(node.inputs) != 2 or node.attributes["axis"].as_int() not in (1, -3):
            continue
        first, second = node.inputs
        assert first is not None
        assert second is not None
        first_bits, second_bits = upstream.get(first, 0), upstream.get(second, 0)
        if is_strict_subset(second_bits, first_bits):
            joins.append((bits.bit_count(), Join(node, first, second)))
        elif is_strict_subset(first_bits, second_bits):
            joins.append((bits.bit_count(), Join(node, second, first)))
    if not joins:
        raise CutError(
            "no skip connection found: looked for a two-input Concat on axis 1, one input computed from a strict "
            f"subset of the other's convolutions, among {len(model.graph)} nodes with {count} convolutions; "
            + (_remedy_for_runtime_operators(model) or "is this a UNet?")
        )
    # A join that depends on more convolutions is further out.
    joins.sort(key=lambda entry: -entry[0])
    return [join for _, join in joins]


def _remedy_for_runtime_operators(model: ir.Model) -> str | None:
    """Return the remedy for a graph with operators of ONNX Runtime, which ONNX's shape inference does not know."""
    names = sorted({node.op_type for node in model.graph if node.domain.startswith("com.microsoft")})
    if not names:
        return None
    if any(name.startswith("QLinear") for name in names):
        return f"it has ONNX Runtime's {names[0]}: quantize with QuantFormat.QDQ, or Conv and MatMul only"
    return f"it has ONNX Runtime's {names[0]}: give the graph from before ONNX Runtime optimized it"


def is_strict_subset(bits: int, of: int) -> bool:
    """Return whether a bit set is not empty and a strict subset of another one."""
    return bool(bits) and bits != of and bits & of == bits


def needed_nodes(model: ir.Model, cached: set[str]) -> set[ir.Node]:
    """Return the nodes that ``noise_pred`` still needs when these tensors are inputs."""
    needed: set[ir.Node] = set()
    pending = [model.graph.outputs[0].producer()]  # a graph that was cut before has features among its outputs
    while pending:
        node = pending.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        pending += [value.producer() for value in node.inputs if value is not None and value.name not in cached]
    return needed


def _open(graph: ExportedUNet | UNetGraph | str | Path) -> UNetGraph:
    if isinstance(graph, UNetGraph):
        return graph
    return read(graph.path if isinstance(graph, ExportedUNet) else graph)


def _deduce_from_skips(joins: Sequence[Join], shapes: dict[str, Shape]) -> None:
    """Fill in shapes of ``hidden`` that shape inference lost: the inputs of a join differ in their channels only.

    The channels of ``hidden`` are those that the convolution after the join expects, less the channels of the skip.
    """
    for join in joins:
        hidden, skip = str(join.hidden.name), str(join.skip.name)
        if hidden in shapes or skip not in shapes:
            continue
        batch, channels, *spatial = shapes[skip]
        for use in join.node.outputs[0].uses():
            weight = weight_of(use.node) if use.node.op_type in CONVOLUTIONS else None
            if weight is not None and weight.shape is not None:
                joined_channels = int(weight.shape[1])  # type: ignore[arg-type]
                shapes[hidden] = (batch, joined_channels - channels, *spatial)


def _cached(name: str, value: ir.Value, unet: UNetGraph, shapes: dict[str, Shape]) -> CachedTensor:
    shape = shapes.get(str(value.name))
    if shape is None:
        remedy = _remedy_for_runtime_operators(unet.model)
        raise CutError(
            f"cannot tell the shape of {value.name}; "
            + (remedy or "export the UNet with shape inference, or with offcut export")
        )
    sample = unet.inputs["sample"]
    dims: list[Dim] = [_batch_dim(sample, shape[0]), shape[1]]
    for symbol, latent_size, size in zip(sample.shape[-2:], sample.resolve(PROBE_DIMS)[-2:], shape[2:], strict=True):
        ratio, remainder = divmod(latent_size, size)
        if isinstance(symbol, int):
            dims.append(size)
        elif remainder:
            raise CutError(f"{value.name} is not a whole fraction of the latent's {symbol}, so it cannot be cached")
        else:
            dims.append(symbol if ratio == 1 else f"{symbol}/{ratio}")
    return CachedTensor(str(value.name), TensorSpec(name, sample.dtype, tuple(dims)))


def _batch_dim(sample: TensorSpec, size: int) -> Dim:
    """Return a feature's first dimension: the batch, or in videos ``batch*frames``."""
    symbols = [symbol for dim in sample.shape[:-2] if isinstance(dim, str) for symbol in factors(dim).symbols]
    number, remainder = divmod(size, math.prod(PROBE_DIMS[symbol] for symbol in symbols))
    if remainder:
        product = " times ".join(symbols)
        raise CutError(f"a skip connection holds {size} images, which is not a multiple of the latent's {product}")
    return str(Factors(number, tuple(symbols), 1)) if symbols else size


def _mlperf(joins: Sequence[Join], unet: UNetGraph, shapes: dict[str, Shape]) -> Cut | None:
    """Return NVIDIA's cut of MLPerf Inference 4.0 (open division): conv_in and the whole last up block run.

    The joins of that block are those at the latent's resolution. The first of them reads the deep feature. The block's
    skips are cached and go stale, except the outermost, which conv_in computes in every call.
    """
    latent = unet.inputs["sample"].resolve(PROBE_DIMS)[-2:]
    block = [k for k, join in enumerate(joins) if shapes.get(str(join.skip.name), ())[2:] == latent]
    if len(block) < 2:
        return None
    entry = block[-1]
    tensors = [_cached(f"deep_feature_{entry}", joins[entry].hidden, unet, shapes)]
    tensors += [_cached(f"skip_feature_{k}", joins[k].skip, unet, shapes) for k in block[1:]]
    return Cut(MLPERF, (), tuple(tensors))


def _write_full(unet: UNetGraph, cuts: Sequence[Cut], full: Path, link: bool) -> None:
    import onnx_ir as ir

    model = _remove_features(ir.load(unet.path))  # the graph may be the full graph of another cut
    values = _values_by_name(model)
    model.graph.outputs[0].name = NOISE_PRED
    for tensor in dict.fromkeys(tensor for cut in cuts for tensor in cut.tensors):
        value = values[tensor.value]
        value.name = tensor.spec.name
        value.shape = ir.Shape(tensor.spec.shape)
        value.type = ir.TensorType(model.graph.outputs[0].dtype or ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = {str(weights.location) for weights in tensors if isinstance(weights, ir.ExternalTensor)}
    if external:
        for location in sorted(external):
            _link_or_copy(_weights_file(unet.path, location), full.parent / location, link)
        ir.save(model, full)
    else:
        (full.parent / WEIGHTS_FILE).unlink(missing_ok=True)  # it may be a link to another graph's weights
        ir.save(model, full, external_data=WEIGHTS_FILE)


def _weights_file(graph: Path, location: str) -> Path:
    """Return the path of a graph's weights file, which must be in the graph's directory or below, as engines require.

    Raises:
        ModelError: the file is in another directory, or missing.
    """
    file = graph.parent / location
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{graph} keeps weights outside its directory, in {location}: save both in one directory")
    if not file.is_file():
        raise ModelError(f"{graph} needs its weights file {location}, which is missing: copy both files")
    return file


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if link:
        with suppress(OSError):
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def _write_shallow(full: Path, cut: Cut, shallow: Path) -> Path:
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = ir.load(full)
    graph = model.graph
    graph.name = f"unet-{cut.slug}"
    expected = len(needed_nodes(_remove_features(model), {spec.name for spec in cut.cached}))
    values = _values_by_name(model)
    for spec in cut.cached:
        computed = values[spec.name]
        cached = ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=computed.type)
        computed.replace_all_uses_with(cached)
        computed.name = f"{spec.name}_uncached"
        graph.inputs.append(cached)
    RemoveUnusedNodesPass()(model)
    for unused in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(unused)
    if len(graph) != expected:
        raise InternalError(f"the shallow graph of {cut.name} has {len(graph)} nodes, not {expected}")
    if unread := [spec.name for spec in cut.cached if spec.name not in {value.name for value in graph.inputs}]:
        raise InternalError(f"the shallow graph of {cut.name} does not read {', '.join(unread)}")
    ir.save(model, shallow)
    return shallow


def _remove_features(model: ir.Model) -> ir.Model:
    """Remove all outputs but the first, which is the noise prediction."""
    while len(model.graph.outputs) > 1:
        model.graph.outputs.pop()
    return model


def _values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def is_cut_name(name: str) -> bool:
    """Return whether a text is a valid cut name in one of the conventions. No graph is needed."""
    return name == MLPERF or re.fullmatch(r"(deepcache|paper):\d+", name) is not None
