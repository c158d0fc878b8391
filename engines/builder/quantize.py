"""Rounding of an export to low precision, in three steps: observe trajectories, choose ranges and layers, round.

A ``Calibrator`` of ``runtime`` runs the trajectories, because ``engines`` cannot import pipelines and schedules.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ...errors import ModelError
from ...exporter.cut import split_all
from ...exporter.graph import infer_shapes, read
from ...exporter.load import ModelSource, load_unet
from ...exporter.quantize.histogram import Histogram, Range
from ...exporter.quantize.observe import stride
from ...exporter.quantize.qdq import Layer, Scheme, find_layers, high_precision_layers, quantize, write_error_graph
from ...exporter.trace.convert import WEIGHTS_FILE
from ...exporter.trace.export import GRAPH_FILE, PARAMETERS_FILE, ExportedUNet
from ...exporter.trace.reference import write_reference
from ..base import Progress
from ..bundle.manifest import Quantization
from ..onnxruntime.observer import ObservingPair, session
from .request import Calibrator

if TYPE_CHECKING:
    import torch


def quantize_export(
    exported: ExportedUNet,
    out: Path,
    source: ModelSource,
    scheme: Scheme,
    cuts: Sequence[str],
    calibrator: Calibrator,
    progress: Progress,
) -> tuple[ExportedUNet, Quantization]:
    """Round an export to low precision, into a new directory; a call of the calibration becomes its reference.

    Args:
        out: the new directory, which exists and is empty.
        cuts: cuts through which the calibration runs.

    Raises:
        ModelError: a pattern matches no layer, or a tensor overflows.
        CutError: the UNet has no such cut.
    """
    graph = read(exported.path)
    layers = find_layers(graph.model)
    excluded = high_precision_layers(layers, calibrator.keep)
    candidates = {layer.name for layer in layers} - excluded
    folder = exported.path.parent / "calibration"
    progress(f"calibrate on cached trajectories: {len(candidates)} layers")
    shapes = infer_shapes(graph)
    tensors = {name for layer in layers if layer.name in candidates for name in (layer.input, layer.output)}
    strides = {name: stride(math.prod(shapes.get(name, (1 << 20,)))) for name in sorted(tensors)}
    twins = split_all(graph, cuts, folder, link=True)
    pair = ObservingPair(twins, exported.inputs, exported.outputs, exported.multiple, exported.precision, strides)
    try:
        calibrator.run(pair, source, progress)
    finally:
        pair.close()
        shutil.rmtree(folder)  # with its link to the weights: onnx_ir does not read a file that has two links
    call_samples, histograms = pair.call_samples.chosen(), pair.histograms
    del pair, graph
    gc.collect()  # reference cycles hold the pipeline and the weights of its components
    if not call_samples:
        raise ModelError("the calibration made no call of the UNet: give it at least one sample and one step")
    ranges = _ranges(histograms, scheme, calibrator.method)

    progress("measure the error that rounding adds to each layer")
    ratios = _ratios(exported.path, scheme, ranges, layers, candidates, call_samples)
    least = median(ratios.values()) - calibrator.sensitive if ratios else 0.0
    sensitive = {name for name, ratio in ratios.items() if ratio < least}
    excluded |= sensitive
    reason = f", {len(sensitive)} of them because rounding would leave less than {least:.0f} dB" if sensitive else ""
    rounded = len(layers) - len(excluded)
    progress(f"round {rounded} layers to {scheme.name}; {len(excluded)} stay in {scheme.base}{reason}")
    quantize(exported.path, out / GRAPH_FILE, scheme, ranges, candidates - sensitive)
    _write_parameters(exported, out, candidates - sensitive)
    unet = load_unet(source, exported.precision).float()  # its weights are rounded to the precision already
    write_reference(unet, source.family, call_samples[len(call_samples) // 2], out / exported.reference.name)
    record = Quantization(
        scheme=scheme.label,
        base=scheme.base,
        method=calibrator.method,
        sensitive=calibrator.sensitive,
        calibration=calibrator.record(source),
        kept=tuple(layer.name for layer in layers if layer.name in excluded),
        rounded=rounded,
    )
    quantized = replace(
        exported, path=out / GRAPH_FILE, weights=out / WEIGHTS_FILE, reference=out / exported.reference.name
    )
    return quantized, record


def _write_parameters(exported: ExportedUNet, out: Path, rounded: set[str]) -> None:
    """Write the map of parameters without the weights that were rounded."""
    names = json.loads((exported.path.parent / PARAMETERS_FILE).read_text(encoding="utf-8"))
    unrounded = {
        key: value for key, value in names.items() if value["initializer"].removesuffix(".weight") not in rounded
    }
    (out / PARAMETERS_FILE).write_text(json.dumps(unrounded, indent=1), encoding="utf-8")


def _ranges(histograms: Mapping[str, Histogram], scheme: Scheme, method: str) -> dict[str, Range]:
    # Floating-point formats represent large values, so nothing is clipped.
    method = "minmax" if scheme.floating else method
    levels = 255 if scheme.symmetric else 256
    return {name: histogram.range(method, levels, scheme.symmetric) for name, histogram in histograms.items()}


def _ratios(
    graph: Path,
    scheme: Scheme,
    ranges: Mapping[str, Range],
    layers: Sequence[Layer],
    names: set[str],
    call_samples: Sequence[Mapping[str, torch.Tensor]],
) -> dict[str, float]:
    """Return each layer's signal-to-noise ratio in dB if only its own weight and input are rounded."""
    twins = graph.with_name(f"twins-{graph.name}")
    order = write_error_graph(graph, twins, scheme, ranges, names)
    opened = session(twins, optimize=False)
    signal, noise = dict.fromkeys(order, 0.0), dict.fromkeys(order, 0.0)
    for inputs in call_samples:
        arrays = {argument.name: inputs[argument.name].numpy() for argument in opened.get_inputs()}
        sums = iter(opened.run(None, arrays))
        for name in order:
            signal[name] += float(next(sums))
            noise[name] += float(next(sums))
    return {name: 10 * math.log10(max(signal[name], 1e-30) / max(noise[name], 1e-30)) for name in order}
