"""The engine ``tensorrt``: NVIDIA TensorRT, whose plans are compiled for one kind of GPU."""

from __future__ import annotations

from ..base import Compiled, CompileJob, EngineOptions, EnginePair, EngineProbe, Graphs
from . import build_settings, library

name = library.TENSORRT.name
extra = library.TENSORRT.extra
# Every TensorRT 10 parses this opset; it fuses attention and group normalization by pattern.
default_opset = 20
SETTINGS = build_settings.SETTINGS
HELPERS = build_settings.HELPERS


def probe() -> EngineProbe:
    return library.probe(library.TENSORRT)


def compile(job: CompileJob) -> Compiled:
    from . import compile

    return compile.compile(library.TENSORRT, job)


def open(graphs: Graphs, options: EngineOptions) -> EnginePair:
    from .pair import NvidiaPair

    return NvidiaPair(library.TENSORRT, graphs, options)
