"""The cut: one UNet graph becomes a full graph and a shallow one, joined by the cached features.

In a UNet's decoder every skip connection is joined by a two-input ``Concat(hidden, skip)`` on the channel axis.
``hidden`` comes from the deeper layers and changes little from one denoising step to the next: it is what DeepCache
(arXiv 2312.00858, section 3.2) keeps. The full graph hands ``hidden`` out as one more output; the shallow graph
takes it as an input, and all that fed it is dropped.

The joins are found by topology alone: one input of the concat was computed from a strict subset of the other's
convolutions. So the cut works on any exporter's UNet, whatever its nodes are called.
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
from .graph import PROBE, UNetGraph, infer_shapes, read
from .specs import Dim, Factors, Shape, TensorSpec, factors
from .trace.convert import WEIGHTS_FILE
from .trace.export import ExportedUNet

if TYPE_CHECKING:
    import onnx_ir as ir

MLPERF = "mlperf"
CONVENTIONS = "deepcache:K, paper:K (= deepcache:K+1) or mlperf"


@dataclass(frozen=True)
class CachedTensor:
    """A tensor that the full graph hands out and a shallow graph takes.

    Attributes:
        value: its name in the graph that was cut.
        spec: its name in both graphs of the pair, dtype and shape, ``[batch, channels, height/d, width/d]``; of a video
            ``batch*frames`` in place of ``batch``.
    """

    value: str
    spec: TensorSpec


@dataclass(frozen=True)
class Cut:
    """A place to cut.

    Attributes:
        name: ``deepcache:k``, k counted from the outermost join; or ``mlperf``.
        aliases: the same cut in other people's counting.
        tensors: what is cached.
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
class TwinGraph:
    """The two graphs of a cut, in one directory with their weights.

    Attributes:
        full: ONNX file; its outputs are ``noise_pred`` and then the cached features.
        shallow: ONNX file; it takes the cached features under the same names.
        cut: where it was cut.
        cached: the features.
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
    """Every cut of a UNet's ONNX graph, outermost first, then ``mlperf``.

    Args:
        graph: what ``export`` gave, or the path of any UNet's ONNX file.

    Raises:
        CutError: the graph has no skip connection; the message says what was looked for.
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
    if whole_block := _mlperf(joins, unet, shapes):
        cuts.append(whole_block)
    return cuts


def find_cut(cuts: Sequence[Cut], name: str) -> Cut:
    """The cut of this name, in any of the conventions.

    Raises:
        CutError: there is none; the message lists those there are.
    """
    canonical = canonical_name(name)
    for cut in cuts:
        if cut.name == canonical:
            return cut
    known = ", ".join(cut.name for cut in cuts)
    raise CutError(f"there is no cut {name!r} in this UNet; write {CONVENTIONS}: it has {known}")


def canonical_name(name: str) -> str:
    """offcut's own name for a cut: ``paper:k`` is ``deepcache:k+1``."""
    paper = re.fullmatch(r"paper:(\d+)", name)
    return f"deepcache:{int(paper[1]) + 1}" if paper else name


def split(
    graph: ExportedUNet | UNetGraph | str | Path, cut: Cut | str = "deepcache:0", out: str | Path | None = None
) -> TwinGraph:
    """Write the full and the shallow graph of one cut beside the weights.

    Args:
        graph: what ``export`` gave, or the path of any UNet's ONNX file.
        cut: from ``find_cuts``, or a name.
        out: the directory; the graph's own by default. Weights are copied into another one.

    Raises:
        CutError, ModelError: as ``find_cuts``.
    """
    return split_all(graph, [cut], out)[0]


def split_all(
    graph: ExportedUNet | UNetGraph | str | Path,
    cuts: Sequence[Cut | str],
    out: str | Path | None = None,
    suffix: str = "",
    link: bool = False,
) -> list[TwinGraph]:
    """As ``split``, for several cuts: one full graph that hands out every cut's features, and a shallow graph each.

    Args:
        suffix: added to the files' names, as in ``full-1a2b.onnx``, for several cuttings in one directory.
        link: links weights into another directory where the file system can, in place of copying them. For a directory
            that does not stay: the ``onnx`` package refuses weights with a second hard link.
    """
    unet = _open(graph)
    known = find_cuts(unet)
    chosen = list(dict.fromkeys(find_cut(known, cut if isinstance(cut, str) else cut.name) for cut in cuts))
    if not chosen:
        raise CutError(f"no cut was named: write {CONVENTIONS}")
    folder = Path(out) if out is not None else unet.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    full = folder / f"full{suffix}.onnx"
    if full.exists() and full.samefile(unet.path):
        raise ModelError(f"{full} would be overwritten by its own full graph: give another directory")
    _write_full(unet, chosen, full, link)
    return [
        TwinGraph(full, _write_shallow(full, cut, folder / f"shallow-{cut.slug}{suffix}.onnx"), cut, cut.cached)
        for cut in chosen
    ]


def find_joins(model: ir.Model) -> list[Join]:
    """The skip connections' concats, outermost first.

    Raises:
        CutError: there is none.
    """
    convolutions: dict[ir.Value, int] = {}  # value -> the convolutions it was computed from, as bits
    count = 0
    found: list[tuple[int, Join]] = []
    for node in model.graph:
        behind = 0
        for value in node.inputs:
            if value is not None:
                behind |= convolutions.get(value, 0)
        if node.op_type == "Conv":
            behind |= 1 << count
            count += 1
        for output in node.outputs:
            convolutions[output] = behind
        if node.op_type != "Concat" or len(node.inputs) != 2 or node.attributes["axis"].as_int() not in (1, -3):
            continue
        first, second = node.inputs
        assert first is not None
        assert second is not None
        a, b = convolutions.get(first, 0), convolutions.get(second, 0)
        if b and a != b and a & b == b:
            found.append((behind.bit_count(), Join(node, first, second)))
        elif a and a != b and a & b == a:
            found.append((behind.bit_count(), Join(node, second, first)))
    if not found:
        raise CutError(
            "no skip connection found: looked for a two-input Concat on axis 1, one input computed from a strict "
            f"subset of the other's convolutions, among {len(model.graph)} nodes with {count} convolutions; "
            "is this a UNet?"
        )
    # The more convolutions lie behind a join, the further out it is.
    found.sort(key=lambda pair: -pair[0])
    return [join for _, join in found]


def needed_nodes(model: ir.Model, cached: set[str]) -> set[ir.Node]:
    """The nodes that still run for ``noise_pred`` when these tensors are given."""
    kept: set[ir.Node] = set()
    pending = [model.graph.outputs[0].producer()]  # a graph that was cut before has features among its outputs
    while pending:
        node = pending.pop()
        if node is None or node in kept:
            continue
        kept.add(node)
        pending += [value.producer() for value in node.inputs if value is not None and value.name not in cached]
    return kept


def _open(graph: ExportedUNet | UNetGraph | str | Path) -> UNetGraph:
    if isinstance(graph, UNetGraph):
        return graph
    return read(graph.path if isinstance(graph, ExportedUNet) else graph)


def _deduce_from_skips(joins: Sequence[Join], shapes: dict[str, Shape]) -> None:
    """Where inference lost the decoder's shapes: a join's two inputs agree in all but channels.

    The channels of ``hidden`` are what the convolution or normalisation after the join expects, less the skip's.
    """
    for join in joins:
        hidden, skip = str(join.hidden.name), str(join.skip.name)
        if hidden in shapes or skip not in shapes:
            continue
        batch, channels, *spatial = shapes[skip]
        for use in join.node.outputs[0].uses():
            weight = use.node.inputs[1] if len(use.node.inputs) > 1 else None
            if use.node.op_type == "Conv" and weight is not None and weight.shape is not None:
                together = int(weight.shape[1])  # type: ignore[arg-type]
                shapes[hidden] = (batch, together - channels, *spatial)


def _cached(name: str, value: ir.Value, unet: UNetGraph, shapes: dict[str, Shape]) -> CachedTensor:
    shape = shapes.get(str(value.name))
    if shape is None:
        raise CutError(
            f"cannot tell the shape of {value.name}; export the UNet with shape inference, or with offcut export"
        )
    sample = unet.inputs["sample"]
    dims: list[Dim] = [_leading(sample, shape[0]), shape[1]]
    for symbol, whole, part in zip(sample.shape[-2:], sample.resolve(PROBE)[-2:], shape[2:], strict=True):
        ratio, rest = divmod(whole, part)
        if isinstance(symbol, int):
            dims.append(part)
        elif rest:
            raise CutError(f"{value.name} is not a whole fraction of the latent's {symbol}, so it cannot be cached")
        else:
            dims.append(symbol if ratio == 1 else f"{symbol}/{ratio}")
    return CachedTensor(str(value.name), TensorSpec(name, sample.dtype, tuple(dims)))


def _leading(sample: TensorSpec, size: int) -> Dim:
    """A feature's first dimension: the latent's batch, or of a video all frames of all videos, one after the other."""
    symbols = [symbol for dim in sample.shape[:-2] if isinstance(dim, str) for symbol in factors(dim).symbols]
    number, rest = divmod(size, math.prod(PROBE[symbol] for symbol in symbols))
    if rest:
        raise CutError(f"a skip connection holds {size} images, no multiple of the latent's {' and '.join(symbols)}")
    return str(Factors(number, tuple(symbols), 1)) if symbols else size


def _mlperf(joins: Sequence[Join], unet: UNetGraph, shapes: dict[str, Shape]) -> Cut | None:
    """NVIDIA's cut in MLPerf Inference 4.0 (open division): conv_in and the whole last up block run.

    The block's own joins are those at the latent's resolution. Its first one takes the deep feature; every skip but the
    outermost, which conv_in makes afresh, is kept and goes stale.
    """
    latent = unet.inputs["sample"].resolve(PROBE)[-2:]
    block = [k for k, join in enumerate(joins) if shapes.get(str(join.skip.name), ())[2:] == latent]
    if len(block) < 2:
        return None
    entry = block[-1]
    tensors = [_cached(f"deep_feature_{entry}", joins[entry].hidden, unet, shapes)]
    tensors += [_cached(f"skip_feature_{k}", joins[k].skip, unet, shapes) for k in block[1:]]
    return Cut(MLPERF, (), tuple(tensors))


def _write_full(unet: UNetGraph, cuts: Sequence[Cut], full: Path, link: bool) -> None:
    import onnx_ir as ir

    model = _only_noise(ir.load(unet.path))  # the graph may have been cut before, elsewhere
    values = _values(model)
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
            _bring(_beside(unet.path, location), full.parent / location, link)
        ir.save(model, full)
    else:
        (full.parent / WEIGHTS_FILE).unlink(missing_ok=True)  # it may be a link to another graph's weights
        ir.save(model, full, external_data=WEIGHTS_FILE)


def _beside(graph: Path, location: str) -> Path:
    """A graph's weights file; it must lie in the graph's directory or below, as engines demand too."""
    file = graph.parent / location
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{graph} keeps weights outside its directory, in {location}: save it with them beside it")
    if not file.is_file():
        raise ModelError(f"{graph} needs its weights {location} beside it, which are not there: copy both")
    return file


def _bring(source: Path, target: Path, link: bool) -> None:
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
    expected = len(needed_nodes(_only_noise(model), {spec.name for spec in cut.cached}))
    values = _values(model)
    for spec in cut.cached:
        made = values[spec.name]
        given = ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=made.type)
        made.replace_all_uses_with(given)
        made.name = f"{spec.name}_uncached"
        graph.inputs.append(given)
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    if len(graph) != expected:
        raise InternalError(f"the shallow graph of {cut.name} has {len(graph)} nodes, not {expected}")
    if lost := [spec.name for spec in cut.cached if spec.name not in {value.name for value in graph.inputs}]:
        raise InternalError(f"the shallow graph of {cut.name} does not read {', '.join(lost)}")
    ir.save(model, shallow)
    return shallow


def _only_noise(model: ir.Model) -> ir.Model:
    while len(model.graph.outputs) > 1:
        model.graph.outputs.pop()
    return model


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def is_cut_name(name: str) -> bool:
    """Whether this is a cut's name in one of the conventions; says nothing of a graph."""
    return name == MLPERF or re.fullmatch(r"(deepcache|paper):\d+", name) is not None
