"""Refitting: new weights for the built plans of a pair, either for all plans or for none.

Unproven: TensorRT needs a driver to refit, and no test has run this on a GPU yet.
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
    """Replace weights in every plan that has them. All weights are checked before any weight is replaced.

    Args:
        weights: tensors by the name of the ONNX initializer, in its layout and dtype, on the CPU or on the plans' GPU.
        stream: handle of the stream that the plans run on.

    Returns:
        Whether every plan accepted the weights. If False, some plans may have them, and all must be loaded again.

    Raises:
        EngineError: the plans were not built refittable, do not have these weights, need further weights with them, or
            have them in another size or dtype. Nothing was replaced.
    """
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    refitters, unknown, missing = [], set(tensors), set()
    for plan in plans:
        if not plan.engine.refittable:
            raise EngineError(f"{plan.path.name} was not built to be refitted: build it with refittable")
        refitter = trt.Refitter(plan.engine, logger)
        names = set(refitter.get_all_weights())
        unknown -= names
        for name in sorted(names & set(tensors)):
            _set(trt, refitter, name, tensors[name])
        missing |= set(refitter.get_missing_weights())
        refitters.append(refitter)
    if unknown:
        raise EngineError(f"no plan of this pair has the weights {_some(unknown)}: use names of ONNX initializers")
    if missing:
        raise EngineError(f"these weights were fused with {_some(missing)}: give those too")
    return all(refitter.refit_cuda_engine_async(stream) for refitter in refitters)


def _set(trt: Any, refitter: Any, name: str, tensor: torch.Tensor) -> None:
    prototype = refitter.get_weights_prototype(name)
    dtype = _DTYPES.get(prototype.dtype.name, prototype.dtype.name)
    tensor_dtype = str(tensor.dtype).removeprefix("torch.")
    if (prototype.size, dtype) != (tensor.numel(), tensor_dtype):
        raise EngineError(
            f"the weights {name} are {tensor.numel()} values of {tensor_dtype}, but the plan's are {prototype.size} "
            f"of {dtype}: give them as they were exported"
        )
    place = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
    weights = trt.Weights(prototype.dtype, tensor.data_ptr(), tensor.numel())
    if not refitter.set_named_weights(name, weights, place):
        raise EngineError(f"TensorRT refuses the new weights {name}: TensorRT's log on the screen gives the reason")


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} others" if others else first
