"""A Triton model repository of a bundle: one model for the full graph and one for each shallow graph.

    <model>_full/config.pbtxt                 inputs and outputs of the graph, in Triton's ModelConfig
    <model>_full/1/model.onnx/                the graph with its weights, or for TensorRT model.plan
    <model>_shallow_deepcache_0/...           takes the full model's output deep_feature_0

Triton runs the graphs. Its client runs the schedule, and passes the cached features from one model to the other.
The layout follows "Model Repository" in Triton's documentation, where ONNX with external data is a directory.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ...errors import EngineError, UserError
from ...exporter.specs import TensorSpec
from ..bundle.bundle import Bundle, engine_files
from ..bundle.manifest import EngineEntry

BACKENDS = {"onnxruntime": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}
"""Triton's name of the backend, and the name of the file that it opens, by engine."""

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}
_VERSION = "1"


def write_repository(bundle: Bundle, folder: Path, *, name: str, engine: str, device: str = "cpu") -> tuple[Path, ...]:
    """Write the models of one of the bundle's engines. Weights are linked, or copied where the disk cannot link.

    Args:
        folder: Triton's ``--model-repository``; other models in it are left alone.
        name: prefix of the models' names.
        engine: one of ``BACKENDS``.
        device: device that Triton runs the models on, ``cpu`` or ``cuda``.

    Returns:
        The models' directories, the full graph's first.

    Raises:
        EngineError: Triton has no backend for this engine, or the bundle does not hold the engine.
        UserError: a model of this name exists already, or the bundle has no ONNX graphs to read the inputs from.
    """
    if engine not in BACKENDS:
        raise EngineError(f"Triton has no backend for {engine}: build for {' or '.join(BACKENDS)}")
    entry = bundle.entry(engine)
    variant = bundle.manifest.variants[entry.variant]
    if variant.graphs is None:
        raise UserError("the bundle was built for deployment and holds no ONNX graphs: build it without --deploy")
    bundle.verify_files({*engine_files(entry, variant), *variant.graphs.files})
    graphs = bundle.graphs(entry)
    onnx: dict[str | None, Path] = {None: bundle.path / variant.graphs.full}
    onnx |= {cut: bundle.path / variant.graphs.shallow[cut] for cut in entry.shallow}
    written = []
    for cut, graph in onnx.items():
        model = folder / _model_name(name, cut)
        if model.exists():
            raise UserError(f"{model} exists already: give another directory, or remove it")
        inputs, outputs = _names(graph)
        specs = {**graphs.inputs, **graphs.outputs}
        config = config_text(
            model.name, engine, device, [specs[name] for name in inputs], [specs[name] for name in outputs]
        )
        model.mkdir(parents=True)
        _place(bundle, entry, cut, variant.graphs.weights, model / _VERSION)
        (model / "config.pbtxt").write_text(config, encoding="utf-8")
        written.append(model)
    return tuple(written)


def config_text(
    name: str, engine: str, device: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> str:
    """Return a ``ModelConfig`` in protobuf's text format. The batch is an ordinary dimension; dynamic ones are -1."""
    kind = "KIND_GPU" if device.startswith("cuda") else "KIND_CPU"
    return "\n".join(
        (
            f'name: "{name}"',
            f'backend: "{BACKENDS[engine][0]}"',
            f'default_model_filename: "{BACKENDS[engine][1]}"',
            "max_batch_size: 0",
            *(_tensor("input", spec) for spec in inputs),
            *(_tensor("output", spec) for spec in outputs),
            f"instance_group [ {{ count: 1 kind: {kind} }} ]",
            "",
        )
    )


def _tensor(field: str, spec: TensorSpec) -> str:
    dims = ", ".join(str(dim if isinstance(dim, int) else -1) for dim in spec.shape)
    return f'{field} [ {{ name: "{spec.name}" data_type: {_TYPES[spec.dtype]} dims: [ {dims} ] }} ]'


def _model_name(name: str, cut: str | None) -> str:
    graph = "full" if cut is None else f"shallow_{cut}"
    return re.sub(r"[^0-9A-Za-z_-]+", "_", f"{name}_{graph}")


def _names(graph: Path) -> tuple[list[str], list[str]]:
    """Return the names of a graph's inputs and outputs; a shallow graph has fewer inputs than the full graph."""
    import onnx

    loaded = onnx.load(graph, load_external_data=False).graph
    return [value.name for value in loaded.input], [value.name for value in loaded.output]


def _place(bundle: Bundle, entry: EngineEntry, cut: str | None, weights: str, version: Path) -> None:
    _, file = BACKENDS[entry.engine]
    source = bundle.path / (entry.full if cut is None else entry.shallow[cut])
    if entry.compiled:
        version.mkdir()
        _link(source, version / file)
        return
    (version / file).mkdir(parents=True)
    _link(source, version / file / file)
    _link(bundle.path / weights, version / file / Path(weights).name)


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the disk cannot link. Files of a bundle never change."""
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
