"""The engine ``tensorrt-rtx``: NVIDIA TensorRT-RTX, whose plans for RTX GPUs are built on any machine."""

from __future__ import annotations

from ..base import Compiled, CompileJob, EngineOptions, EnginePair, EngineProbe, Graphs
from . import build_settings, library

name = library.TENSORRT_RTX.name
extra = library.TENSORRT_RTX.extra
# This opset keeps attention and group normalization whole.
default_opset = 23
SETTINGS = build_settings.SETTINGS_RTX
HELPERS = build_settings.HELPERS


def probe() -> EngineProbe:
    return library.probe(library.TENSORRT_RTX)


def compile(job: CompileJob) -> Compiled:
    from . import compile

    return compile.compile(library.TENSORRT_RTX, job)


def open(graphs: Graphs, options: EngineOptions) -> EnginePair:
    from .pair import NvidiaPair

    return NvidiaPair(library.TENSORRT_RTX, graphs, options)
