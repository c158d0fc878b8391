"""The engine ``inductor``: AOTInductor packages, which PyTorch compiles ahead of time, on the CPU and on CUDA.

The UNet is traced and cut as a PyTorch program, without ONNX. A package is native code: it runs on machines with the
instruction set that it was compiled for, and with the version of PyTorch that compiled it. It writes into the pair's
buffers; on CUDA its calls are recorded as CUDA graphs.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from ..exporter.components import component_networks, component_of
from ..exporter.program import BufferedProgram, UNetProgram, component_program
from ..exporter.specs import Shape
from .base import Compiled, CompileJob, EngineOptions, EngineProbe, Graphs, Settings
from .buffers import allocate_pair
from .cuda import CudaGraphs, PairStream

if TYPE_CHECKING:
    import torch

name = "inductor"
extra = "cpu"
default_opset = 23
# Instruction set to compile for, by PyTorch's name of the CPU's capability; a CPU without an entry uses its own.
_MARCH = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
SETTINGS: Settings = {
    "max_autotune": False,  # try more kernels for each matrix product; takes minutes longer
}

HELPERS: frozenset[str] = frozenset()


def probe() -> EngineProbe:
    import torch

    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    compiler = next((path for path in map(shutil.which, ("g++", "clang++", "c++")) if path), None)
    if compiler is None:
        return EngineProbe(torch.__version__, (), "no C++ compiler found: install g++")
    targets = {device: {"cpu": _cpu_target, "cuda": _cuda_target}[device]() for device in devices}
    return EngineProbe(torch.__version__, devices, f"compiles with {Path(compiler).name}", targets=targets)


def compile(job: CompileJob) -> Compiled:
    """Compile the graphs; see ``base.CompilingEngine``. Dimensions are fixed in the export, not by profiles."""
    if job.profiles:
        raise EngineError(
            "inductor takes no shape profiles: leave dimensions dynamic, or fix them (--fix height=64,...)"
        )
    graphs = job.graphs
    targets = (probe().targets[job.device.partition(":")[0]],)
    if job.component is not None:
        job.progress(f"compile {job.component} with inductor")
        folder = job.source.component(component_of(job.component))
        networks = component_networks(folder, precision=graphs.precision, variant=job.source.variant)
        (network,) = (network for network in networks if network.name == job.component)
        return Compiled(_package(component_program(network), job, "full"), {}, targets)
    job.progress("trace the UNet for inductor")
    features = {key: spec for key, spec in graphs.outputs.items() if key != "noise_pred"}
    unet = UNetProgram(job.source, graphs.precision, graphs.inputs, features, job.fixed, graphs.multiple)
    job.progress("compile the full graph with inductor")
    full = _package(unet.full(), job, "full")
    shallow = {}
    for cut, cached in graphs.cuts.items():
        job.progress(f"compile the shallow graph of {cut} with inductor")
        shallow[cut] = _package(unet.shallow(cached), job, f"shallow-{cut.replace(':', '-')}")
    return Compiled(full, shallow, targets)


def open(graphs: Graphs, options: EngineOptions) -> InductorPair:
    return InductorPair(graphs, options)


class InductorPair:
    """One package for the full graph and one for each cut; see ``base.EnginePair``."""

    name = name

    def __init__(self, graphs: Graphs, options: EngineOptions) -> None:
        import torch

        if options.inference_precision not in (None, graphs.precision):
            raise EngineError(
                "inductor computes in the precision that was exported; "
                f"build with precision={options.inference_precision!r}"
            )
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = torch.device(options.device)
        self.inputs, self.outputs, self.cuts = graphs.inputs, graphs.outputs, graphs.cuts
        self._graphs, self._options = graphs, options
        self._stream = PairStream(self.device) if self.device.type == "cuda" else None
        self._full: Any = _load(graphs.full, self.device)
        self._shallow = {cut: _load(path, self.device) for cut, path in graphs.shallow.items()}

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundInductorPair:
        buffers, dims = allocate_pair(self._graphs, shapes, self.device)
        graphs = CudaGraphs() if self._stream is not None and self._options.cuda_graphs else None
        return BoundInductorPair(self._full, self._shallow, buffers, dims, self._stream, graphs)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        full = _load(self._graphs.full, self.device, weights, is_full=True)
        shallow = {cut: _load(path, self.device, weights) for cut, path in self._graphs.shallow.items()}
        self._full, self._shallow = full, shallow

    def close(self) -> None:
        self._full = None
        self._shallow = {}


class BoundInductorPair:
    """See ``base.BoundPair``."""

    def __init__(
        self,
        full: _Package,
        shallow: Mapping[str, _Package],
        buffers: Mapping[str, torch.Tensor],
        dims: Mapping[str, int],
        stream: PairStream | None,
        graphs: CudaGraphs | None,
    ) -> None:
        self.buffers = buffers
        self.dims = dims
        self._stream, self._graphs = stream, graphs
        self._addresses = tuple(buffer.data_ptr() for buffer in buffers.values())
        self._full: Any = _call(full, buffers)
        self._shallow: Any = {cut: _call(package, buffers) for cut, package in shallow.items()}

    def full(self) -> None:
        self._run("full", self._full)

    def shallow(self, cut: str) -> None:
        self._run(cut, self._shallow[cut])

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        if self._graphs is not None:
            self._graphs.close()
        self._full = self._shallow = None
        self.buffers = {}

    def _run(self, key: str, call: Callable[[], None]) -> None:
        if self._stream is None:
            call()
            return
        with self._stream.ordered():
            if self._graphs is None:
                call()
            else:
                self._graphs.run(key, self._addresses, call)


@dataclass(frozen=True)
class _Package:
    """A loaded package, with the names of the tensors that it reads and writes."""

    run: Callable[[list[torch.Tensor], list[torch.Tensor]], object]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _load(
    path: Path, device: torch.device, weights: Mapping[str, torch.Tensor] | None = None, *, is_full: bool = False
) -> _Package:
    import torch

    names = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    index = device.index or 0 if device.type == "cuda" else -1
    try:
        # A CUDA graph can only be captured from an unlocked runner. On the CPU, threads take turns.
        unlocked = device.type == "cuda"
        run = torch._inductor.aoti_load_package(str(path), run_single_threaded=unlocked, device_index=index)
    except RuntimeError as error:
        raise EngineError(f"inductor refuses {path.name}: {str(error).splitlines()[0]}; build it again here") from error
    names_in_package = set(run.get_constant_fqns()) if weights else set()
    constants = {_constant(name): value for name, value in (weights or {}).items()}
    present = {name: value.to(device) for name, value in constants.items() if name in names_in_package}
    if weights and is_full and not present:  # a shallow graph may lack the changed layers; the full graph has them all
        raise EngineError(f"{path.name} names its weights in another way than this version: build the engine again")
    if present:
        run.load_constants(present, check_full_update=False)
    return _Package(run, tuple(names["inputs"]), tuple(names["outputs"]))


def _constant(parameter: str) -> str:
    """Return the name in a package of a parameter of the UNet."""
    return f"part.unet.{parameter}"


def _call(package: _Package, buffers: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    inputs = [buffers[name] for name in package.inputs]
    outputs = [buffers[name] for name in package.outputs]

    def call() -> None:
        package.run(inputs, outputs)

    return call


def _package(program: BufferedProgram, job: CompileJob, stem: str) -> Path:
    """Compile to ``stem.pt2``, and write the names of its inputs and outputs to ``stem.json``."""
    import torch
    from torch.export.passes import move_to_device_pass

    path = job.folder / f"{stem}.pt2"
    configs = {
        "max_autotune": bool(job.settings["max_autotune"]),
        "cpp.dynamic_threads": True,  # otherwise the code fixes the number of threads of the compiling machine
        "cpp.march": _MARCH.get(torch.backends.cpu.get_cpu_capability()),
    }
    exported = program.exported
    if job.device != "cpu":
        exported = move_to_device_pass(exported, job.device)
    try:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
    except Exception as error:  # PyTorch's own exceptions, and those of the C++ compiler
        raise EngineError(f"inductor cannot compile the {stem} graph: {str(error).strip().splitlines()[0]}") from error
    path.with_suffix(".json").write_text(json.dumps({"inputs": program.inputs, "outputs": program.outputs}) + "\n")
    return path


def _cpu_target() -> str:
    """Return the instruction sets that decide which kernels are compiled, e.g. ``"x86_64-avx512-bf16-amx"``."""
    import torch

    features = {
        "vnni": torch.cpu._is_vnni_supported(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return "-".join(
        [platform.machine(), capability, *(feature for feature, supported in features.items() if supported)]
    )


def _cuda_target() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
