"""NVIDIA TensorRT-RTX: plans for RTX GPUs, built on any machine. The implementation is shared with TensorRT."""

from __future__ import annotations

from ..base import Compiled, CompileJob, EngineOptions, EnginePair, Graphs, Probe
from . import flavour, settings

name = flavour.TENSORRT_RTX.name
extra = flavour.TENSORRT_RTX.extra
# Keeps attention and group normalization whole.
default_opset = 23
SETTINGS = settings.SETTINGS_RTX
HELPERS = settings.HELPERS


def probe() -> Probe:
    return flavour.probe(flavour.TENSORRT_RTX)


def compile(job: CompileJob) -> Compiled:
    from . import compile

    return compile.compile(flavour.TENSORRT_RTX, job)


def open(graphs: Graphs, options: EngineOptions) -> EnginePair:
    from .pair import NvidiaPair

    return NvidiaPair(flavour.TENSORRT_RTX, graphs, options)
