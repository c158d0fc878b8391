"""What every engine offers: to the build a check of what it can take, to the runtime a pair of graphs.

The unit is the pair, because what matters is what the two graphs share: the buffers of the cached features,
and one device and stream.

Some engines open the bundle's ONNX graphs as they are; others compile them, ahead and for one kind of machine, into
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
"""How an engine compiles, by the names of its own ``SETTINGS``."""


class BoundPair(Protocol):
    """A pair bound to the buffers of one set of shapes.

    One generation at a time; not thread-safe, cheap to have several. The buffers belong to the bound pair, stay
    at their address, and live until ``close``.
    """

    buffers: Mapping[str, torch.Tensor]
    """Every input, ``noise_pred`` and every cached feature by name: memory that the engine reads and writes."""

    dims: Mapping[str, int]
    """The dimensions that this pair is bound to, e.g. ``{"batch": 2, "height": 64, "width": 64, "sequence": 77}``."""

    def full(self) -> None:
        """Enqueue the full graph: reads the input buffers, writes ``noise_pred`` and the cached features."""
        ...

    def shallow(self, cut: str) -> None:
        """Enqueue the shallow graph of this cut: reads the inputs and the features, writes ``noise_pred``."""
        ...

    def close(self) -> None: ...


class EnginePair(Protocol):
    """A full graph and its shallow graphs, opened on one device."""

    name: str
    """The engine's name, e.g. ``"onnxruntime"``."""

    inputs: Mapping[str, TensorSpec]
    """The full graph's inputs; a shallow graph takes some of them and the features of its cut."""

    outputs: Mapping[str, TensorSpec]
    """``noise_pred`` first, then the cached features."""

    cuts: Mapping[str, tuple[str, ...]]
    """Each cut's name (``"deepcache:0"``) with the names of the features that its shallow graph reads."""

    device: torch.device

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundPair:
        """Allocate buffers for these input shapes and bind both graphs to them.

        May be called from several threads; each call gives a pair of its own.

        Raises:
            ShapeError: the shapes are outside what was built, with the nearest valid ones.
        """
        ...

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace weights in the full graph and in every shallow graph that has them; all others are as built.

        Pairs that were bound before are not to be used any more.

        Args:
            weights: by PyTorch's parameter name, in its layout and the graphs' dtype. None brings back the built ones,
                bit for bit.

        Raises:
            EngineError: the engine cannot; then all graphs have the weights that they had before.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Graphs:
    """The graphs of a pair on disk, and their contract.

    Attributes:
        full: the file that the engine opens for the full graph.
        shallow: the same for each cut's shallow graph.
        inputs: of the full graph.
        outputs: ``noise_pred`` first, then every cached feature.
        cuts: each cut's cached features by name.
        multiple: height and width of the latent must be multiples of it.
        precision: of the graphs: ``fp32``, ``fp16`` or ``bf16``.
        profiles: the shapes that a compiled engine takes, or that one which compiles when it is opened should; none
            for all.
        settings: that it was compiled with.
        digest: SHA-256 over the digests of the files that the engine opens; None outside a bundle.
        parameters: file with the map from PyTorch's parameters to the graphs' weights; None if it was left out.
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
        """PyTorch's parameters by the name of the ONNX initializer, in its layout.

        Raises:
            EngineError: the map is not there.
        """
        if self.parameters is None:
            raise EngineError("this bundle was built for deployment and knows no weights by name: build it without")
        places = read_parameters(self.parameters)
        return {
            places[name].initializer: (value.T if places[name].transposed else value).contiguous()
            for name, value in weights.items()
        }


@dataclass(frozen=True)
class CompileJob:
    """What an engine compiles from, and where to.

    Attributes:
        graphs: the ONNX graphs and their contract.
        source: the model that they were exported from.
        fixed: the dimensions that were fixed in the export.
        profiles: the shapes that are asked for; none leaves all dynamic dimensions dynamic.
        settings: each of the engine's ``SETTINGS``.
        device: that it is to run on, ``"cpu"`` or ``"cuda"``, as PyTorch spells it.
        component: the network around the UNet that ``graphs.full`` is, e.g. ``"vae_decoder"``; None for the UNet.
        folder: an empty directory; all that the engine leaves in it becomes part of the bundle.
        progress: called with a sentence as each stage begins, and with an indented one as it advances.
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
    """What an engine made of a job.

    Attributes:
        full: the file that it opens for the full graph, in the job's folder.
        shallow: the same for each cut's shallow graph.
        targets: the machines that can run it, any of them, as ``EngineProbe.targets`` names them.
        profiles: the shapes that it takes; none if it takes all.
        later_versions: whether later versions of the engine can run it too.
    """

    full: Path
    shallow: Mapping[str, Path]
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...] = ()
    later_versions: bool = False


def check_contract(graphs: Graphs, cut: str | None, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Hold a loaded graph against what the bundle says of it.

    Args:
        cut: whose shallow graph it is; None for the full graph.
        inputs, outputs: names as the engine read them.

    Raises:
        EngineError: it is another graph, e.g. a shallow one in the full one's place.
    """
    features = set(graphs.cuts[cut]) if cut else set()
    made = {"noise_pred"} if cut else set(graphs.outputs)
    given = set(inputs)
    if not (features <= given <= features | set(graphs.inputs)) or set(outputs) != made:
        file = graphs.shallow[cut] if cut else graphs.full
        raise EngineError(
            f"{file.name} is not the {f'shallow graph of {cut}' if cut else 'full graph'} of this bundle: "
            "its inputs and outputs are others; copy or build the bundle again"
        )


@dataclass(frozen=True)
class EngineOptions:
    """How to open a pair.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``, as PyTorch spells it.
        threads: of the CPU engines; None leaves it to the engine (one a core).
        inference_precision: computes fp32 graphs in ``"bf16"`` where the engine has a hint for it. Costs image quality
            (relative error of one call about 1e-2). Fixed when the bundle is built.
        cuda_graphs: record the calls once for each shape and replay them, which saves the host's work of launching
            every kernel. On CUDA; TensorRT-RTX cannot with plans that stream their weights, ONNX Runtime's TensorRT
            provider not at all. ONNX Runtime captures in CUDA's global mode: another thread that allocates device
            memory at that moment gets an error.
        weight_budget: device memory for the weights of a pair, in bytes; the others stay on the host and are streamed
            at each call, which is slower. None keeps all on the device. Of TensorRT plans built with weight streaming.
        runtime_cache: directory for the kernels that TensorRT-RTX compiles for this GPU and for the engines that ONNX
            Runtime's TensorRT providers compile. None compiles the kernels at each start, and keeps the engines in the
            user's cache directory. Both are machine code: name a directory that only you can write to.
        provider: of ONNX Runtime on CUDA: ``"cuda"``, or ``"tensorrt"`` or ``"tensorrt-rtx"``, which compile the graphs
            when they are opened or first run. None is ``"cuda"``.
    """

    device: str = "cpu"
    threads: int | None = None
    inference_precision: str | None = None
    cuda_graphs: bool = True
    weight_budget: int | None = None
    runtime_cache: Path | None = None
    provider: str | None = None


class OpenOptions(TypedDict, total=False):
    """Those of ``EngineOptions`` that a caller chooses freely, as keyword arguments."""

    threads: int | None
    cuda_graphs: bool
    weight_budget: int | None
    runtime_cache: Path | None
    provider: str | None


@dataclass(frozen=True)
class EngineProbe:
    """Whether an engine can be used here.

    Attributes:
        version: of the installed package, None when it is not installed.
        devices: those it can run on here, as PyTorch spells them.
        reason: why it cannot be used, or what was found.
        features: what the machine adds that some builds require, e.g. ``"bf16"``.
        targets: what engines are compiled for on each device here, e.g. ``{"cuda": "sm_89"}``; none where they are not.
        builds: whether engines can be built here although none can run (TensorRT-RTX without a GPU).
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
    """What an engine's module offers; each is one file in this folder and one line in ``registry.ENGINES``."""

    name: str
    extra: str
    """The extra of offcut that installs it."""

    default_opset: int

    def probe(self) -> EngineProbe:
        """Look, without loading a graph, whether this engine works here."""
        ...

    def open(self, graphs: Graphs, options: EngineOptions) -> EnginePair:
        """Load both graphs onto the device.

        Raises:
            EngineError: the engine refuses a graph or the options; the message is the engine's own first line.
        """
        ...


@runtime_checkable
class CompilingEngine(Engine, Protocol):
    """An engine that compiles the graphs ahead, into files that fit one kind of machine and its own version."""

    SETTINGS: Settings
    """How it compiles: each setting with its default."""

    HELPERS: frozenset[str]
    """Those settings that only help the build, such as a cache file: the bundle does not record them."""

    def compile(self, job: CompileJob) -> Compiled:
        """Compile the pair into the job's folder.

        Raises:
            EngineError: the engine refuses a graph, a profile or a setting.
        """
        ...
