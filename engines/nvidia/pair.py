"""A full plan and its shallow plans on one GPU, with one stream, one block of scratch memory and CUDA graphs.

Unproven: this module needs a driver, and no test has run it on a GPU yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError
from ...exporter.specs import Shape, solve
from ..base import EngineOptions, Graphs, check_contract
from ..buffers import allocate
from ..cuda import CudaGraphs, PairStream
from ..profiles import select
from .build_settings import recordable
from .library import NvidiaLibrary, load
from .log import captured_log
from .plan import BoundContext, LoadedPlan, share_budget
from .refit import refit

if TYPE_CHECKING:
    import torch

Cut = str | None
"""A cut's name; None means the full graph."""


class NvidiaPair:
    """A pair of TensorRT or TensorRT-RTX plans; see ``base.EnginePair``.

    Calls of its bound pairs run one after the other on the pair's stream, so they share one block of scratch memory.
    The block is as large as the graph that needs most, at the largest shapes that were prepared.
    """

    def __init__(self, library: NvidiaLibrary, graphs: Graphs, options: EngineOptions) -> None:
        import torch

        if options.inference_precision not in (None, graphs.precision):
            raise EngineError(
                f"{library.name} computes in the precision that was exported: "
                f"build with precision={options.inference_precision!r}"
            )
        self.name = library.name
        self._trt = load(library)
        if torch.device(options.device).type != "cuda" or not torch.cuda.is_available():
            remedy = "open it on cuda" if torch.cuda.is_available() else "PyTorch sees no GPU here"
            raise EngineError(f"{library.name} runs on an NVIDIA GPU, not on {options.device}: {remedy}")
        index = torch.device(options.device).index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.inputs, self.outputs, self.cuts = graphs.inputs, graphs.outputs, graphs.cuts
        self.graphs, self.options = graphs, options
        self.stream = PairStream(self.device)
        self.scratch = ScratchMemory(self.device)
        self.cuda_graphs = options.cuda_graphs and recordable(library, graphs.settings)
        self.weights_version = 0  # a CUDA graph is replayed only with the weights that it was recorded with
        self._library = library
        self._has_weights = not graphs.settings.get("strip_plan")
        self._refitted: dict[str, torch.Tensor] = {}  # replaced weights, by the name of the ONNX initializer
        self._digests: dict[Cut, str] = {}
        self._plans: dict[Cut, LoadedPlan] | None = self._load()

    @property
    def plans(self) -> Mapping[Cut, LoadedPlan]:
        if self._plans is None:
            raise EngineError(f"this pair of {self.name} is closed: open it again")
        return self._plans

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundNvidiaPair:
        dims = solve(self.inputs, shapes, self.graphs.multiple)
        profile = select(self.graphs.profiles, dims)
        if not self._has_weights:
            raise EngineError(
                f"these plans of {self.name} were stripped of their weights: refit them with all weights first"
            )
        buffers = allocate((*self.inputs.values(), *self.outputs.values()), dims, self.device)
        return BoundNvidiaPair(self, profile, buffers, dims)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace weights in the full graph and in every shallow graph that has them, or in none.

        Args:
            weights: tensors by PyTorch's parameter name, in its layout and the graphs' dtype; all other weights are as
                built. The first refit of stripped plans needs all weights.

        Raises:
            EngineError: the plans do not accept the weights; every plan then has the weights that it had before.
        """
        before, new = self._refitted, self.graphs.as_stored(weights)
        if set(before) - set(new):
            self.restore()
        if not new:
            return
        try:
            self._refit(new)
        except EngineError:
            if before and not self._refitted:
                self._refit(before)
            raise

    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        with captured_log() as messages, self.stream.ordered() as stream:
            done = refit(self._trt, self._logger(), self.plans.values(), weights, stream)
            self.weights_version += 1
        self._has_weights = True
        if not done:
            self.restore()
            raise EngineError(f"{self.name} failed to refit ({messages.reason()}): the earlier weights were restored")
        self._refitted = dict(weights)

    def restore(self) -> None:
        """Restore the built weights, bit for bit, by loading the plans again."""
        self.stream.synchronize()
        self._has_weights = not self.graphs.settings.get("strip_plan")
        self.weights_version += 1
        self._refitted = {}
        self._plans = None  # if loading fails, the pair is closed, not half refitted
        self._plans = self._load()

    def close(self) -> None:
        if self._plans is not None:
            self.stream.synchronize()
            for plan in self._plans.values():
                plan.save_cache()
        self._plans = None
        self.scratch.close()

    def _load(self) -> dict[Cut, LoadedPlan]:
        import torch

        files: dict[Cut, Path] = {None: self.graphs.full}
        files.update(self.graphs.shallow)
        with torch.cuda.device(self.device), captured_log() as messages:
            runtime = self._trt.Runtime(self._logger())
            # Only version-compatible plans contain code that runs on the host.
            runtime.engine_host_code_allowed = bool(self.graphs.settings.get("version_compatible"))
            plans = {}
            for cut, path in files.items():
                data = self._read(cut, path)
                kernels = self.options.runtime_cache
                cache = kernels / path.parent.name / f"{path.stem}.cache" if kernels else None
                plan = LoadedPlan(
                    self._library,
                    self._trt,
                    runtime,
                    path,
                    data,
                    messages,
                    cache=cache,
                    eager=self.cuda_graphs,
                )
                check_contract(self.graphs, cut, plan.inputs, plan.outputs)
                plans[cut] = plan
        self._stream_weights(plans)
        return plans

    def _read(self, cut: Cut, path: Path) -> bytes:
        """Read a plan, and check that later reads give the same bytes: the bundle checks its digest only once."""
        data = path.read_bytes()
        if self.graphs.settings.get("refittable") or not self._has_weights:
            digest = hashlib.sha256(data).hexdigest()
            if self._digests.setdefault(cut, digest) != digest:
                raise EngineError(f"{path.name} was altered since it was opened: copy or build the bundle again")
        return data

    def _stream_weights(self, plans: Mapping[Cut, LoadedPlan]) -> None:
        budget = self.options.weight_budget
        if budget is None:
            return
        if not any(plan.streamable for plan in plans.values()):
            raise EngineError(f"{self.name} streams no weights of these plans: build them with weight_streaming")
        sizes = {cut: plan.streamable for cut, plan in plans.items() if cut is not None}
        resident, full = share_budget(budget, sizes, plans[None].streamable)
        for cut, plan in plans.items():
            plan.stream_weights(full if cut is None else resident[cut])

    def _logger(self) -> Any:
        from polygraphy.backend.trt import get_trt_logger

        return get_trt_logger()


class BoundNvidiaPair:
    """A pair of plans bound to buffers; see ``base.BoundPair``."""

    def __init__(
        self, pair: NvidiaPair, profile: int, buffers: Mapping[str, torch.Tensor], dims: Mapping[str, int]
    ) -> None:
        self.buffers = buffers
        self.dims = dims
        self._pair = pair
        self._profile = profile
        self._graphs = CudaGraphs() if pair.cuda_graphs else None
        self._plans: Any = pair.plans
        with pair.stream.ordered() as stream:
            self._contexts: Any = self._bind(stream)

    def full(self) -> None:
        self._run(None)

    def shallow(self, cut: str) -> None:
        self._run(cut)

    def close(self) -> None:
        self._pair.stream.synchronize()
        if self._graphs is not None:
            self._graphs.close()
        self._contexts = None
        self.buffers = {}

    def _bind(self, stream: int) -> dict[Cut, BoundContext]:
        contexts = {
            cut: BoundContext(plan, self._profile, self.buffers, stream) for cut, plan in self._pair.plans.items()
        }
        self._pair.scratch.reserve(max(context.scratch for context in contexts.values()))
        return contexts

    def _run(self, cut: Cut) -> None:
        with self._pair.stream.ordered() as stream:
            if self._contexts is not None and self._plans is not self._pair.plans:  # the plans were loaded again
                self._contexts, self._plans = self._bind(stream), self._pair.plans
            context: BoundContext = self._contexts[cut]
            addresses = context.set_addresses(self.buffers, self._pair.scratch.address, self._pair.scratch.size)
            if self._graphs is None:
                context.enqueue(stream)
            else:
                state = (self._pair.weights_version, addresses)
                self._graphs.run(cut, state, lambda: context.enqueue(stream))


class ScratchMemory:
    """One block of device memory, for graphs that run one after the other on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block: torch.Tensor | None = None

    def reserve(self, size: int) -> None:
        """Make the block at least this many bytes. A block that is too small is replaced, so its address may change."""
        import torch

        if size > self.size:
            self._block = torch.empty(size, dtype=torch.uint8, device=self._device)

    @property
    def address(self) -> int:
        return 0 if self._block is None else self._block.data_ptr()

    @property
    def size(self) -> int:
        return 0 if self._block is None else self._block.numel()

    def close(self) -> None:
        self._block = None
