"""Text encoders and autoencoder, which requests share as they share the engines: calls that wait together are one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ..override import override_method
from .request import Request

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

POSITIONS = 2 * 64 * 64
"""Of latents, or tokens, in one call: two images of 512x512, whose decoding needs the memory of no more at once."""

_Module = TypeVar("_Module", bound=torch.nn.Module)


@dataclass(eq=False)
class ModuleCall:
    """A call of a module by a request, which waits to be made.

    Attributes:
        key: calls with the same one can be made as one.
        forward: takes the tensors by name, and whatever else the call was given.
        tensors: [rows, ...] each.
        positions: of all rows.
    """

    request: Request
    key: Hashable
    forward: Callable[..., Any]
    tensors: Mapping[str, torch.Tensor]
    options: Mapping[str, Any]
    rows: int
    positions: int
    answer: Any = None
    done: threading.Event = field(default_factory=threading.Event)


class ModuleCalls:
    """Makes them, in the batcher's thread."""

    def __init__(self) -> None:
        self._alone: set[Hashable] = set()  # keys of calls that could not be made as one

    def choose(self, waiting: Iterable[ModuleCall]) -> list[ModuleCall]:
        """Those to make next: with the one that is due first all that are alike, while there is room."""
        first, *others = sorted(waiting, key=lambda call: (call.request.due, call.request.key))
        chosen, positions = [first], first.positions
        for call in others if first.key not in self._alone else ():
            if call.key == first.key and positions + call.positions <= POSITIONS:
                chosen.append(call)
                positions += call.positions
        return chosen

    def make(self, calls: Sequence[ModuleCall]) -> list[Any]:
        """The answer of each, or the exception that it raised; where they cannot be made as one, each is made alone."""
        if len(calls) > 1:
            tensors = {name: torch.cat([call.tensors[name] for call in calls]) for name in calls[0].tensors}
            try:
                return _split(calls[0].forward(**tensors, **calls[0].options), [call.rows for call in calls])
            except Exception:  # of one, whose sender gets it, or of all together, such as a batch beyond a profile
                answers = [answer for call in calls for answer in self.make([call])]
                if not any(isinstance(answer, Exception) for answer in answers):
                    self._alone.add(calls[0].key)
                return answers
        try:
            return [calls[0].forward(**calls[0].tensors, **calls[0].options)]
        except Exception as error:
            return [error]


class Sharing:
    """The modules of one seat's pipelines, whose calls go to the batcher.

    Args:
        wait: until the batcher has made a call; its answer.
    """

    def __init__(self, wait: Callable[[ModuleCall], Any]) -> None:
        self._wait = wait
        self.request: Request | None = None
        """That whose pipeline runs."""

    def share(self, pipe: Any) -> None:
        """Let a pipeline of this seat have modules that look and compute like its own."""
        for name in TEXT_ENCODERS:
            if isinstance(module := getattr(pipe, name, None), torch.nn.Module):
                setattr(pipe, name, self._shared(module, _TextEncoder, "forward"))
        if isinstance(vae := getattr(pipe, "vae", None), AutoencoderKL | AutoencoderTiny):
            pipe.vae = self._shared(vae, _Decoder, "decode")

    def call(
        self, module: object, forward: Callable[..., Any], tensors: Mapping[str, torch.Tensor], options: dict[str, Any]
    ) -> Any:
        """What ``forward`` answers for these tensors, each [rows, ...], possibly made together with other requests'."""
        if self.request is None or not all(isinstance(value, bool | None) for value in options.values()):
            return forward(**tensors, **options)
        first = next(iter(tensors.values()))
        alike = tuple((name, each.shape[1:], each.dtype, each.device) for name, each in tensors.items())
        call = ModuleCall(
            request=self.request,
            key=(id(module), alike, tuple(sorted(options.items()))),
            forward=forward,
            tensors=tensors,
            options=options,
            rows=len(first),
            # All but an image's channels count.
            positions=len(first) * first[0].numel() // (first.shape[1] if first.dim() == 4 else 1),
        )
        return self._wait(call)

    def _shared(self, module: _Module, mixin: type, method: str) -> _Module:
        shared = copy.copy(module)  # with the same layers
        shared.__class__ = override_method(type(module), mixin, method, "in_company")  # type: ignore[arg-type]  # types are hashable
        shared.__dict__["_offcut_shared"] = self, module
        return shared


class _TextEncoder:
    """Mixed into a text encoder's class."""

    _offcut_shared: tuple[Sharing, Any]

    def in_company(self, input_ids: Any = None, attention_mask: Any = None, *rest: Any, **options: Any) -> Any:
        sharing, module = self._offcut_shared
        forward = super().forward  # type: ignore[misc]
        if rest or not isinstance(input_ids, torch.Tensor) or not isinstance(attention_mask, torch.Tensor | None):
            return forward(input_ids, attention_mask, *rest, **options)
        tensors = {"input_ids": input_ids}
        if attention_mask is not None:
            tensors["attention_mask"] = attention_mask
        return sharing.call(module, forward, tensors, options)


class _Decoder:
    """Mixed into an autoencoder's class."""

    _offcut_shared: tuple[Sharing, Any]

    def in_company(self, latents: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sharing, module = self._offcut_shared
        decode = super().decode  # type: ignore[misc]
        if rest or latents.dim() != 4:
            return decode(latents, *rest, **options)
        options.pop("generator", None)  # these two draw nothing

        def forward(latents: torch.Tensor, **options: Any) -> Any:
            return decode(latents, **options)

        return sharing.call(module, forward, {"latents": latents}, options)


def _split(answer: Any, rows: Sequence[int]) -> list[Any]:
    """Each call's part of what was answered to all.

    Raises:
        TypeError: something in it is neither of all rows nor made of such.
    """
    if answer is None:
        return [None] * len(rows)
    if isinstance(answer, torch.Tensor) and answer.dim() and len(answer) == sum(rows):
        return [part.clone() for part in torch.split(answer, list(rows))]  # none keeps the memory of all
    if isinstance(answer, Mapping):  # an output class of transformers or diffusers
        parts = {name: _split(value, rows) for name, value in answer.items()}
        return [type(answer)(**{name: each[place] for name, each in parts.items()}) for place in range(len(rows))]
    if isinstance(answer, tuple | list):
        return [type(answer)(each) for each in zip(*(_split(value, rows) for value in answer), strict=True)]
    raise TypeError(f"{type(answer).__name__} is not of several rows")
