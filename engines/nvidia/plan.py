"""A plan loaded on a GPU, and its execution contexts.

Unproven: this module needs a driver, and no test has run it on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError, ShapeError
from .library import NvidiaLibrary
from .log import ErrorMessages

if TYPE_CHECKING:
    import torch


class LoadedPlan:
    """A deserialised plan, which creates execution contexts.

    Args:
        runtime: TensorRT's runtime; it must live as long as the plan.
        data: the plan's bytes, whose digest was checked.
        cache: file for the kernels that TensorRT-RTX compiles for this GPU; None compiles them each time. The file is
            machine code: keep it where only you can write.
        eager: compile the kernels for a shape before its first run, not concurrently with it, because a CUDA graph
            records only kernels that exist.

    Attributes:
        inputs, outputs: names of the plan's tensors.

    Raises:
        EngineError: TensorRT refuses the plan; the message quotes it.
    """

    def __init__(
        self,
        library: NvidiaLibrary,
        trt: Any,
        runtime: Any,
        path: Path,
        data: bytes,
        messages: ErrorMessages,
        *,
        cache: Path | None,
        eager: bool,
    ) -> None:
        self._library, self._trt, self._runtime = library, trt, runtime
        self.path = path
        self.engine = runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise EngineError(f"{library.name} refuses {path.name}: {messages.reason()}")
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self._cache_file = cache
        self._cache: Any = None
        self._context_settings = (
            self._runtime_config(eager) if library.rtx else trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )

    def context(self) -> Any:
        """Create an execution context without scratch memory."""
        context = self.engine.create_execution_context(self._context_settings)
        if context is None:
            raise EngineError(f"{self._library.name} has no memory left for {self.path.name}: use smaller shapes")
        return context

    @property
    def streamable(self) -> int:
        """Bytes of weights that can be streamed; 0 if the plan was not built for weight streaming."""
        return int(self.engine.streamable_weights_size)

    def stream_weights(self, resident: int) -> None:
        """Keep this many bytes of the streamable weights on the GPU; call it before any context is created."""
        self.engine.weight_streaming_budget_v2 = resident

    def save_cache(self) -> None:
        """Write the kernels that were compiled here to the cache file."""
        if self._cache is None or self._cache_file is None:
            return
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._cache_file.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(self._cache.serialize())
        os.replace(temporary, self._cache_file)

    def _runtime_config(self, eager: bool) -> Any:
        trt = self._trt
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if eager else strategies.LAZY
        if self._cache_file is not None:
            self._cache = config.create_runtime_cache()
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._cache)
        return config


class BoundContext:
    """An execution context for one profile and one set of shapes.

    Args:
        profile: index of the profile that covers the shapes.
        buffers: tensors by name; among them all that the plan reads and writes.
        stream: handle of the CUDA stream that the context will run on.

    Attributes:
        scratch: bytes of scratch memory that the context needs.
        names: names of its inputs and outputs.

    Raises:
        ShapeError: the plan does not take these shapes, or its outputs have other shapes than the buffers.
    """

    def __init__(self, plan: LoadedPlan, profile: int, buffers: Mapping[str, torch.Tensor], stream: int) -> None:
        self.names = (*plan.inputs, *plan.outputs)
        self._file = plan.path.name
        self._context = plan.context()
        self._addresses: tuple[int, ...] = ()
        if not self._context.set_optimization_profile_async(profile, stream):
            raise EngineError(f"{self._file} has no profile {profile}: build the bundle again")
        accepted = [self._context.set_input_shape(name, tuple(buffers[name].shape)) for name in plan.inputs]
        if not all(accepted) or self._context.infer_shapes():
            shapes = ", ".join(f"{name} {list(buffers[name].shape)}" for name in plan.inputs)
            raise ShapeError(f"{self._file} does not take {shapes}: build it with a profile for them")
        for name in plan.outputs:
            if (shape := tuple(self._context.get_tensor_shape(name))) != tuple(buffers[name].shape):
                raise ShapeError(
                    f"{self._file} writes {name} as {list(shape)}, the bundle says {list(buffers[name].shape)}: "
                    "build the bundle again"
                )

        # Memory for these shapes. A profile's bound is for its largest shapes: tens of GB where attention is not fused.
        needed = self._context.update_device_memory_size_for_shapes()
        self.scratch = int(needed or plan.engine.get_device_memory_size_for_profile_v2(profile))

    def set_addresses(self, buffers: Mapping[str, torch.Tensor], scratch: int, size: int) -> tuple[int, ...]:
        """Set the addresses that the context uses, if they have changed, and return them all.

        Args:
            scratch, size: address and bytes of the scratch memory.
        """
        addresses = (scratch, size, *(buffers[name].data_ptr() for name in self.names))
        if addresses != self._addresses:
            self._context.set_device_memory(scratch, size)
            for name, address in zip(self.names, addresses[2:], strict=True):
                self._context.set_tensor_address(name, address)
            self._addresses = addresses
        return addresses

    def enqueue(self, stream: int) -> None:
        """Enqueue the graph on this stream."""
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"TensorRT could not run {self._file}: TensorRT's log on the screen gives the reason")


def share_budget(budget: int, shallow: Mapping[str, int], full: int) -> tuple[dict[str, int], int]:
    """Split a budget of device memory for weights: first the shallow graphs, which run most, then the full graph.

    Args:
        budget: bytes for the pair.
        shallow, full: bytes of each plan's streamable weights.

    Returns:
        The bytes that each shallow plan keeps on the GPU, by cut, and the bytes that the full plan keeps.
    """
    resident = {}
    for cut, size in sorted(shallow.items(), key=lambda item: item[1]):
        resident[cut] = min(size, budget)
        budget -= resident[cut]
    return resident, min(full, budget)
