"""NVIDIA TensorRT: plans compiled for one kind of GPU. The implementation is shared with TensorRT-RTX."""

from __future__ import annotations

from ..base import Compiled, CompileJob, EngineOptions, EnginePair, Graphs, Probe
from . import flavour, settings

name = flavour.TENSORRT.name
extra = flavour.TENSORRT.extra
# What every TensorRT 10 parses; it fuses attention and group normalization by pattern.
default_opset = 20
SETTINGS = settings.SETTINGS
HELPERS = settings.HELPERS


def probe() -> Probe:
    return flavour.probe(flavour.TENSORRT)


def compile(job: CompileJob) -> Compiled:
    from . import compile

    return compile.compile(flavour.TENSORRT, job)


def open(graphs: Graphs, options: EngineOptions) -> EnginePair:
    from .pair import NvidiaPair

    return NvidiaPair(flavour.TENSORRT, graphs, options)
