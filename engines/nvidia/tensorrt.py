"""NVIDIA TensorRT: plans compiled for one kind of GPU. The implementation is shared with TensorRT-RTX."""

from __future__ import annotations

from ..base import Compiled, CompileJob, EngineOptions, EnginePair, EngineProbe, Graphs
from . import library, settings

name = library.TENSORRT.name
extra = library.TENSORRT.extra
# What every TensorRT 10 parses; it fuses attention and group normalization by pattern.
default_opset = 20
SETTINGS = settings.SETTINGS
HELPERS = settings.HELPERS


def probe() -> EngineProbe:
    return library.probe(library.TENSORRT)


def compile(job: CompileJob) -> Compiled:
    from . import compile

    return compile.compile(library.TENSORRT, job)


def open(graphs: Graphs, options: EngineOptions) -> EnginePair:
    from .pair import NvidiaPair

    return NvidiaPair(library.TENSORRT, graphs, options)
