"""The interface of every engine: a probe for the build, and an opened pair of graphs for the runtime.

The unit is the pair, because the two graphs share the buffers of the cached features, one device and one stream.

Some engines open the bundle's ONNX graphs as they are. Others compile them ahead of time, for one kind of machine, into
files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict, runtime_checkable

from ..errors import EngineError
from ..exporter.load import ModelSource
from ..exporter.specs import Shape, TensorSpec
from ..exporter.trace.parameters import read_parameters
from .profiles import Profile

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]
"""Takes a sentence as each stage begins, and an indented sentence as a stage advances."""

Setting = str | int | float | bool | tuple[str, ...] | None
Settings = Mapping[str, Setting]
"""Values of an engine's own ``SETTINGS``, by name."""


class BoundPair(Protocol):
    """A pair bound to the buffers of one set of shapes.

    It serves one generation at a time, is not thread-safe, and is cheap, so a process may have several. The buffers
    belong to the bound pair, stay at their addresses, and live until ``close``.
    """

    buffers: Mapping[str, torch.Tensor]
    """Memory that the engine reads and writes, by name: every input, ``noise_pred`` and every cached feature."""

    dims: Mapping[str, int]
    """Dimensions that the pair is bound to, e.g. ``{"batch": 2, "height": 64, "width": 64, "sequence": 77}``."""

    def full(self) -> None:
        """Enqueue the full graph, which reads the inputs and writes ``noise_pred`` and the cached features."""
        ...

    def shallow(self, cut: str) -> None:
        """Enqueue the shallow graph of a cut, which reads the inputs and its features and writes ``noise_pred``."""
        ...

    def close(self) -> None: ...


class EnginePair(Protocol):
    """A full graph and its shallow graphs, opened on one device."""

    name: str
    """Name of the engine, e.g. ``"onnxruntime"``."""

    inputs: Mapping[str, TensorSpec]
    """Inputs of the full graph. A shallow graph takes some of them, and the features of its cut."""

    outputs: Mapping[str, TensorSpec]
    """Outputs of the full graph: ``noise_pred`` first, then the cached features."""

    cuts: Mapping[str, tuple[str, ...]]
    """Names of the features that each cut's shallow graph reads, by the cut's name (``"deepcache:0"``)."""

    device: torch.device

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundPair:
        """Allocate buffers for these input shapes and bind the graphs to them.

        Several threads may call this; each call returns a bound pair of its own.

        Raises:
            ShapeError: the engine was not built for these shapes; the message names the nearest valid ones.
        """
        ...

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace weights in the full graph and in every shallow graph that has them; all others are as built.

        Pairs that were bound earlier must not be used afterwards.

        Args:
            weights: tensors by PyTorch's parameter name, in PyTorch's layout and the graphs' dtype. An empty mapping
                restores the built weights, bit for bit.

        Raises:
            EngineError: the engine cannot replace them; every graph then has the weights that it had before.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Graphs:
    """The graphs of a pair on disk, with their inputs and outputs.

    Attributes:
        full: file of the full graph.
        shallow: file of each cut's shallow graph.
        inputs: inputs of the full graph.
        outputs: ``noise_pred`` first, then every cached feature.
        cuts: names of each cut's cached features.
        multiple: height and width of the latent must be multiples of this number.
        precision: precision of the graphs: ``fp32``, ``fp16`` or ``bf16``.
        profiles: shapes that a compiled engine takes, or that an engine compiles for when it opens the graphs; empty
            for all shapes.
        settings: the settings that the engine was compiled with.
        digest: SHA-256 over the digests of the files that the engine opens; None outside a bundle.
        parameters: file with the map from PyTorch's parameters to the graphs' weights; None if the bundle has none.
    """

    full: Path
    shallow: Mapping[str, Path]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    cuts: Mapping[str, tuple[str, ...]]
    multiple: int
    precision: str
    profiles: tuple[Profile, ...] = ()
    settings: Settings = field(default_factory=dict)
    digest: str | None = None
    parameters: Path | None = None

    def as_stored(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert weights from PyTorch's names and layout to the names and layout of the ONNX initializers.

        Raises:
            EngineError: the bundle has no map of parameters, or the map lacks one of the names.
        """
        if self.parameters is None:
            raise EngineError(
                "this bundle was built for deployment and has no map of its weights: build it without --deploy"
            )
        parameters = read_parameters(self.parameters)
        if unknown := sorted(set(weights) - set(parameters)):
            raise EngineError(f"the graphs have no weights {unknown[0]}: use PyTorch's parameter names")
        return {
            parameters[name].initializer: (value.T if parameters[name].transposed else value).contiguous()
            for name, value in weights.items()
        }


@dataclass(frozen=True)
class CompileJob:
    """The input of a compilation: graphs, shapes, settings and the directory for the result.

    Attributes:
        graphs: the ONNX graphs.
        source: the model that they were exported from.
        fixed: dimensions that the export fixed, with their sizes.
        profiles: shapes to compile for; empty leaves all dynamic dimensions dynamic.
        settings: the value of each of the engine's ``SETTINGS``.
        device: device that the engine will run on, ``"cpu"`` or ``"cuda"``, as PyTorch spells it.
        folder: an empty directory; every file that the engine leaves in it becomes part of the bundle.
        progress: called with a sentence as each stage begins, and with an indented sentence as it advances.
        component: name of the network around the UNet, e.g. ``"vae_decoder"``; None for the UNet.
    """

    graphs: Graphs
    source: ModelSource
    fixed: Mapping[str, int]
    profiles: tuple[Profile, ...]
    settings: Settings
    device: str
    folder: Path
    progress: Progress
    component: str | None = None


@dataclass(frozen=True)
class Compiled:
    """The result of a compilation.

    Attributes:
        full: file of the full graph, in the job's folder.
        shallow: file of each cut's shallow graph.
        targets: kinds of machine that can run the engine, named as in ``EngineProbe.targets``.
        profiles: shapes that the engine takes; empty for all shapes.
        later_versions: whether later versions of the engine can run the files too.
    """

    full: Path
    shallow: Mapping[str, Path]
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...] = ()
    later_versions: bool = False


def check_contract(graphs: Graphs, cut: str | None, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Check that a loaded graph has the inputs and outputs that the bundle records.

    Args:
        cut: the cut of a shallow graph; None for the full graph.
        inputs, outputs: names in the loaded graph.

    Raises:
        EngineError: the file holds another graph, e.g. a shallow graph in place of the full graph.
    """
    features = set(graphs.cuts[cut]) if cut else set()
    expected_outputs = {"noise_pred"} if cut else set(graphs.outputs)
    names = set(inputs)
    if not (features <= names <= features | set(graphs.inputs)) or set(outputs) != expected_outputs:
        file = graphs.shallow[cut] if cut else graphs.full
        raise EngineError(
            f"{file.name} is not the {f'shallow graph of {cut}' if cut else 'full graph'} of this bundle: "
            "it has other inputs or outputs; copy or build the bundle again"
        )


@dataclass(frozen=True)
class EngineOptions:
    """Options for opening a pair.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``, as PyTorch spells it.
        threads: number of threads of a CPU engine; None leaves the choice to the engine (one per core).
        inference_precision: ``"bf16"`` computes fp32 graphs in bf16 where the engine has such a hint. Costs image
            quality (relative error of one call about 1e-2). Fixed when the bundle is built.
        cuda_graphs: on CUDA, record the calls once for each shape and replay them, which saves launching every kernel
            from the host. Not possible for TensorRT-RTX plans that stream their weights, nor for ONNX Runtime's
            TensorRT provider. ONNX Runtime captures in CUDA's global mode, so another thread that allocates device
            memory meanwhile gets an error.
        weight_budget: device memory for the weights of a pair, in bytes, for TensorRT plans built with weight
            streaming. The other weights stay on the host and are streamed at each call, which is slower. None keeps all
            weights on the device.
        runtime_cache: directory for the kernels that TensorRT-RTX compiles for this GPU and for the engines that ONNX
            Runtime's TensorRT providers compile. None compiles the kernels at each start, and keeps the engines in the
            user's cache directory. Both are machine code: name a directory that only you can write to.
        provider: ONNX Runtime's provider on CUDA: ``"cuda"``, or ``"tensorrt"`` or ``"tensorrt-rtx"``, which compile
            the graphs when they are opened or first run. None means ``"cuda"``.
    """

    device: str = "cpu"
    threads: int | None = None
    inference_precision: str | None = None
    cuda_graphs: bool = True
    weight_budget: int | None = None
    runtime_cache: Path | None = None
    provider: str | None = None


class OpenOptions(TypedDict, total=False):
    """The fields of ``EngineOptions`` that callers pass on as keyword arguments."""

    threads: int | None
    cuda_graphs: bool
    weight_budget: int | None
    runtime_cache: Path | None
    provider: str | None


@dataclass(frozen=True)
class EngineProbe:
    """The result of a probe: whether an engine can be used on this machine, and why.

    Attributes:
        version: version of the installed package; None if it is not installed.
        devices: devices of this machine that the engine can run on, as PyTorch spells them.
        reason: why the engine cannot be used, or what was found.
        features: features of this machine that some builds require, e.g. ``"bf16"``.
        targets: kind of machine that engines are compiled for on each device here, e.g. ``{"cuda": "sm_89"}``; empty
            for an engine that does not compile.
        builds: whether engines can be built here, even if none can run (TensorRT-RTX without a GPU).
    """

    version: str | None
    devices: tuple[str, ...]
    reason: str
    features: frozenset[str] = field(default_factory=frozenset)
    targets: Mapping[str, str] = field(default_factory=dict)
    builds: bool = False

    @property
    def usable(self) -> bool:
        return bool(self.devices)


class Engine(Protocol):
    """The interface of an engine's module; each is one file, and one line in ``registry.ENGINES``."""

    name: str
    extra: str
    """Extra of offcut that installs the engine."""

    default_opset: int

    def probe(self) -> EngineProbe:
        """Return whether this engine works here, without loading a graph."""
        ...

    def open(self, graphs: Graphs, options: EngineOptions) -> EnginePair:
        """Load the graphs onto the device.

        Raises:
            EngineError: the engine refuses a graph or the options; the message quotes the engine's first line.
        """
        ...


@runtime_checkable
class CompilingEngine(Engine, Protocol):
    """An engine that compiles graphs ahead of time, for one kind of machine and one version of the engine."""

    SETTINGS: Settings
    """The engine's settings with their defaults."""

    HELPERS: frozenset[str]
    """Names of settings that only speed up the build, such as a cache file; the bundle does not record them."""

    def compile(self, job: CompileJob) -> Compiled:
        """Compile the graphs into the job's folder.

        Raises:
            EngineError: the engine refuses a graph, a profile or a setting.
        """
        ...
