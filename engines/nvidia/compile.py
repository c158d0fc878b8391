"""Compilation of ONNX graphs to plans: one for the full graph and one for each cut, with the same profiles."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ...errors import EngineError
from ...exporter.specs import TensorSpec
from ..base import Compiled, CompileJob
from ..profiles import Profile, check, in_pixels, trained_side
from .attention import separate_queries
from .build_settings import config, targets, timing_cache
from .library import NvidiaLibrary, load, this_gpu
from .log import ErrorMessages, captured_log
from .progress import BuildPhases, monitor

LOG = "build.log"


def compile(library: NvidiaLibrary, job: CompileJob) -> Compiled:
    """Compile the graphs; see ``base.CompilingEngine``. TensorRT's log is written next to the plans.

    Raises:
        EngineError: the library refuses a graph (the message quotes it), or a setting is not possible here.
        ShapeError: a profile does not fit the graphs.
    """
    with _gpu(job.device):
        return _compile(library, load(library), job)


def _compile(library: NvidiaLibrary, trt: Any, job: CompileJob) -> Compiled:
    gpus = targets(library, trt, job.settings)
    graphs = job.graphs
    # No fused kernel takes attention in fp32, so its scores are held in memory: 17 GB for one guided image of 1024x1024
    # in SD 1.5. Four images would need more than the builder accepts.
    images = 1 if graphs.precision == "fp32" else None
    native = trained_side(job.source.config.get("sample_size"))
    frames = job.source.family.trained_frames(job.source.config)
    profiles = job.profiles or in_pixels(  # defaults for the UNet; the other networks have profiles
        graphs.inputs, multiple=graphs.multiple, max_batch=images, native=native, frames=frames
    )
    check(profiles, graphs.inputs, graphs.multiple)
    shallow = {cut: job.folder / f"shallow-{cut.replace(':', '-')}.plan" for cut in graphs.shallow}
    full = job.folder / "full.plan"
    with captured_log(job.folder / LOG) as messages:
        build = _PlanBuilder(library, trt, job, gpus, profiles, messages)
        build(graphs.full, full, graphs.inputs.values())
        for cut, onnx in graphs.shallow.items():
            features = [graphs.outputs[name] for name in graphs.cuts[cut]]
            build(onnx, shallow[cut], [*graphs.inputs.values(), *features])
    site_packages = Path(trt.__file__).parents[1]
    _remove_paths(job.folder / LOG, [*build.folders, site_packages])
    later = bool(job.settings["version_compatible"])
    return Compiled(full, shallow, gpus, profiles, later_versions=later)


def _remove_paths(log: Path, folders: Iterable[Path]) -> None:
    """Remove this machine's directories from the log, which is copied with the bundle."""
    text = log.read_text(encoding="utf-8")
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    log.write_text(text, encoding="utf-8")


class _PlanBuilder:
    """Builds plans one after the other with the same settings.

    Attributes:
        folders: directories that graphs were read from.
    """

    def __init__(
        self,
        library: NvidiaLibrary,
        trt: Any,
        job: CompileJob,
        gpus: tuple[str, ...],
        profiles: tuple[Profile, ...],
        messages: ErrorMessages,
    ) -> None:
        self._library, self._trt, self._job, self._gpus = library, trt, job, gpus
        self._profiles, self._messages = profiles, messages
        self.folders: set[Path] = set()

    def __call__(self, onnx: Path, plan: Path, inputs: Iterable[TensorSpec]) -> None:
        """Write the plan of one graph, whose inputs are among ``inputs``."""
        from polygraphy.backend.trt import EngineBytesFromNetwork
        from polygraphy.exception import PolygraphyException

        specs = {spec.name: spec for spec in inputs}
        self._job.progress(f"compile {plan.stem} for {', '.join(self._gpus)}")
        phases = BuildPhases(plan.stem, self._job.progress)
        self._messages.clear()
        try:
            with separate_queries(onnx) if self._library.rtx else nullcontext(onnx) as file:
                self.folders.add(file.parent)
                builder, network, parser = self._parse(file)
                names = [network.get_input(index).name for index in range(network.num_inputs)]
                profiles = [_polygraphy_profile(profile, [specs[name] for name in names]) for profile in self._profiles]
                settings = self._job.settings
                watch = monitor(self._trt, phases)
                configure = config(self._library, self._trt, settings, self._gpus, profiles, watch)
                cache = timing_cache(settings)
                plan.write_bytes(EngineBytesFromNetwork((builder, network, parser), configure, cache)())
        except PolygraphyException as error:
            if phases.failure is not None:
                raise phases.failure from None
            raise EngineError(f"{self._library.name} refuses {onnx.name}: {self._reason(str(error))}") from error

    def _parse(self, onnx: Path) -> Any:
        """Return the builder, the network and the parser; the weights are read from the file's directory."""
        from polygraphy.backend.trt import NetworkFromOnnxPath, SetDecomposableAttentions

        network = NetworkFromOnnxPath(str(onnx), strongly_typed=True)
        if hasattr(self._trt.LayerType, "ATTENTION_INPUT"):
            # Without this, an attention that no fused kernel takes, such as one in fp32, is refused.
            network = SetDecomposableAttentions(network)
        return network()

    def _reason(self, summary: str) -> str:
        reason = self._messages.reason(summary.splitlines()[0])
        if "CUDA driver" in reason and this_gpu() is None:
            return f"this build needs an NVIDIA GPU, and this machine has none: build on one that has ({reason})"
        if "OutOfMemory" in reason:
            or_in_fp16 = ", or in fp16" if self._job.graphs.precision == "fp32" else ""
            remedy = f"build for smaller images or fewer{or_in_fp16}"
            return f"the largest shapes need more memory than the machine has: {remedy} ({reason})"
        return reason


def _gpu(device: str) -> AbstractContextManager[Any]:
    """Return a context in which TensorRT times its kernels on the requested GPU, if the device names one."""
    if ":" not in device:
        return nullcontext()
    import torch

    return torch.cuda.device(device)


def _polygraphy_profile(profile: Profile, specs: Iterable[TensorSpec]) -> Any:
    from polygraphy.backend.trt import Profile as PolygraphyProfile

    shapes = PolygraphyProfile()
    for name, (smallest, best, largest) in profile.shapes(specs).items():
        shapes.add(name, min=smallest, opt=best, max=largest)
    return shapes
