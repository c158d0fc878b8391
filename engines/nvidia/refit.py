"""New weights for built plans: all the plans of a pair or none.

Unproven until it ran on a GPU: TensorRT refits nothing without a driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import EngineError
from .plan import LoadedPlan

if TYPE_CHECKING:
    import torch

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


def refit(trt: Any, logger: Any, plans: Iterable[LoadedPlan], weights: Mapping[str, torch.Tensor], stream: int) -> bool:
    """Replace weights in every plan that has them. Everything is checked before anything is replaced.

    Args:
        weights: by the name of the ONNX initializer, in its layout and dtype, on the CPU or on the plans' GPU.
        stream: handle of the stream that the plans run on.

    Returns:
        Whether every plan took them. If not, some may have, and the plans must be loaded again.

    Raises:
        EngineError: the plans were not built refittable, have no such weights, need others beside them, or have them
            in another size or dtype. Nothing is replaced then.
    """
    kept = {name: tensor.contiguous() for name, tensor in weights.items()}
    refitters, unknown, missing = [], set(kept), set()
    for plan in plans:
        if not plan.engine.refittable:
            raise EngineError(f"{plan.path.name} was not built to be refitted: build it with refittable")
        refitter = trt.Refitter(plan.engine, logger)
        names = set(refitter.get_all_weights())
        unknown -= names
        for name in sorted(names & set(kept)):
            _set(trt, refitter, name, kept[name])
        missing |= set(refitter.get_missing_weights())
        refitters.append(refitter)
    if unknown:
        raise EngineError(f"no plan of this pair has the weights {_some(unknown)}: name ONNX initializers")
    if missing:
        raise EngineError(f"these weights were fused with {_some(missing)}: give those too")
    return all(refitter.refit_cuda_engine_async(stream) for refitter in refitters)


def _set(trt: Any, refitter: Any, name: str, tensor: torch.Tensor) -> None:
    prototype = refitter.get_weights_prototype(name)
    dtype = _DTYPES.get(prototype.dtype.name, prototype.dtype.name)
    given = str(tensor.dtype).removeprefix("torch.")
    if (prototype.size, dtype) != (tensor.numel(), given):
        raise EngineError(
            f"the weights {name} are {tensor.numel()} values of {given}, the plan's {prototype.size} of {dtype}: "
            "give them as they were exported"
        )
    place = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
    weights = trt.Weights(prototype.dtype, tensor.data_ptr(), tensor.numel())
    if not refitter.set_named_weights(name, weights, place):
        raise EngineError(f"TensorRT refuses the new weights {name}: its log, on the screen, says why")


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} others" if others else first
