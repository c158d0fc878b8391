"""Shared calls of text encoders and the autoencoder: calls that wait at the same time become one call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ..override import override_method
from .request import WorkerRequest

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

MAX_POSITIONS = 2 * 64 * 64
"""Most latent positions, or tokens, of a shared call: two images of 512x512. This bounds the memory of decoding."""

_Module = TypeVar("_Module", bound=torch.nn.Module)


@dataclass(eq=False)
class ModuleCall:
    """A request's call of a module; the call waits until the engine thread runs it.

    Attributes:
        key: calls with the same key can share a call.
        forward: function that makes the call; it takes the tensors by name, and the options.
        tensors: arguments to concatenate, each [rows, ...].
        options: the other arguments.
        rows: batch size.
        positions: number of latent positions, or tokens, of all rows.
    """

    request: WorkerRequest
    key: Hashable
    forward: Callable[..., Any]
    tensors: Mapping[str, torch.Tensor]
    options: Mapping[str, Any]
    rows: int
    positions: int
    result: Any = None
    done: threading.Event = field(default_factory=threading.Event)


class ModuleCalls:
    """Makes module calls in the engine thread."""

    def __init__(self) -> None:
        self._not_shareable: set[Hashable] = set()  # keys of calls that failed together

    def choose(self, waiting: Iterable[ModuleCall]) -> list[ModuleCall]:
        """Return the calls to make next: the one that is due first, and others with its key while there is room."""
        first, *others = sorted(waiting, key=lambda call: (call.request.due, call.request.key))
        chosen, positions = [first], first.positions
        for call in others if first.key not in self._not_shareable else ():
            if call.key == first.key and positions + call.positions <= MAX_POSITIONS:
                chosen.append(call)
                positions += call.positions
        return chosen

    def run(self, calls: Sequence[ModuleCall]) -> list[Any]:
        """Make the calls as one shared call, or one by one if the shared call fails.

        Returns:
            For each call its output, or the exception that it raised.
        """
        if len(calls) > 1:
            tensors = {name: torch.cat([call.tensors[name] for call in calls]) for name in calls[0].tensors}
            try:
                return _split(calls[0].forward(**tensors, **calls[0].options), [call.rows for call in calls])
            except Exception:  # raised by one of the calls, or because the batch is too large
                results = [result for call in calls for result in self.run([call])]
                if not any(isinstance(result, Exception) for result in results):
                    self._not_shareable.add(calls[0].key)
                return results
        try:
            return [calls[0].forward(**calls[0].tensors, **calls[0].options)]
        except Exception as error:
            return [error]


class SharedModules:
    """Modules of a request runner's pipelines whose calls go to the batcher.

    Args:
        execute: waits until the batcher has made a call, and returns its result.
    """

    def __init__(self, execute: Callable[[ModuleCall], Any]) -> None:
        self._execute = execute
        self.request: WorkerRequest | None = None
        """The request whose pipeline call runs."""

    def replace_in(self, pipe: Any) -> None:
        """Replace the text encoders and the autoencoder of a pipeline by shared copies with the same layers."""
        for name in TEXT_ENCODERS:
            if isinstance(module := getattr(pipe, name, None), torch.nn.Module):
                setattr(pipe, name, self._shared_copy(module, _SharedTextEncoder, "forward"))
        if isinstance(vae := getattr(pipe, "vae", None), AutoencoderKL | AutoencoderTiny):
            pipe.vae = self._shared_copy(vae, _SharedDecoder, "decode")

    def call(
        self, module: object, forward: Callable[..., Any], tensors: Mapping[str, torch.Tensor], options: dict[str, Any]
    ) -> Any:
        """Return the output of ``forward`` for these tensors, each [rows, ...]; other requests may share the call."""
        if self.request is None or not all(isinstance(value, bool | None) for value in options.values()):
            return forward(**tensors, **options)
        first = next(iter(tensors.values()))
        specs = tuple((name, tensor.shape[1:], tensor.dtype, tensor.device) for name, tensor in tensors.items())
        call = ModuleCall(
            request=self.request,
            key=(id(module), specs, tuple(sorted(options.items()))),
            forward=forward,
            tensors=tensors,
            options=options,
            rows=len(first),
            # Channels of latents do not count.
            positions=len(first) * first[0].numel() // (first.shape[1] if first.dim() == 4 else 1),
        )
        return self._execute(call)

    def _shared_copy(self, module: _Module, mixin: type, method: str) -> _Module:
        shared = copy.copy(module)  # it has the same layers
        shared.__class__ = override_method(type(module), mixin, method, "shared_call")  # type: ignore[arg-type]  # types are hashable
        shared.__dict__["_offcut_shared"] = self, module
        return shared


class _SharedTextEncoder:
    """Mixin for the class of a text encoder."""

    _offcut_shared: tuple[SharedModules, Any]

    def shared_call(self, input_ids: Any = None, attention_mask: Any = None, *rest: Any, **options: Any) -> Any:
        modules, module = self._offcut_shared
        forward = super().forward  # type: ignore[misc]
        if rest or not isinstance(input_ids, torch.Tensor) or not isinstance(attention_mask, torch.Tensor | None):
            return forward(input_ids, attention_mask, *rest, **options)
        tensors = {"input_ids": input_ids}
        if attention_mask is not None:
            tensors["attention_mask"] = attention_mask
        return modules.call(module, forward, tensors, options)


class _SharedDecoder:
    """Mixin for the class of an autoencoder."""

    _offcut_shared: tuple[SharedModules, Any]

    def shared_call(self, latents: torch.Tensor, *rest: Any, **options: Any) -> Any:
        modules, module = self._offcut_shared
        decode = super().decode  # type: ignore[misc]
        if rest or latents.dim() != 4:
            return decode(latents, *rest, **options)
        options.pop("generator", None)  # these two classes do not use it

        def forward(latents: torch.Tensor, **options: Any) -> Any:
            return decode(latents, **options)

        return modules.call(module, forward, {"latents": latents}, options)


def _split(output: Any, rows: Sequence[int]) -> list[Any]:
    """Split the output of a shared call into the outputs of its calls.

    Raises:
        TypeError: some part of the output is neither a tensor with all rows nor a container of such tensors.
    """
    if output is None:
        return [None] * len(rows)
    if isinstance(output, torch.Tensor) and output.dim() and len(output) == sum(rows):
        return [part.clone() for part in torch.split(output, list(rows))]  # a view would keep the memory of all rows
    if isinstance(output, Mapping):  # an output class of transformers or diffusers
        parts = {name: _split(value, rows) for name, value in output.items()}
        return [type(output)(**{name: part[index] for name, part in parts.items()}) for index in range(len(rows))]
    if isinstance(output, tuple | list):
        return [type(output)(part) for part in zip(*(_split(value, rows) for value in output), strict=True)]
    raise TypeError(f"{type(output).__name__} has no rows to split")
