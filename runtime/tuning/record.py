"""Watching a pipeline: the cached features of every call, in a sample of places, and the engines' times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..unet import UNet
from .moments import Moments


class Recorder:
    """Collects the features of a UNet's calls, generation by generation.

    On a shallow call the feature is what the full graph would have computed from the same inputs: the full graph is
    run as well, and what the shallow one reads is put back.

    Args:
        unet: called by a pipeline inside ``watch``.
        features: names of the cached features.
        positions: of a feature, over all images, that are kept of each call; all if it has no more.
        seed: decides which.
        reads: whether to keep what shallow calls read, too.
        reference: another UNet with the same features, whose own are the truth: it is called with the same inputs.

    Attributes:
        kept: by feature and call the true values of the generation watched last [channels, positions], fp32, on the
            CPU.
        read: in the same places those that the call read: as a forecast left them on a shallow call, and the true ones
            on a full call; empty unless they were asked for.
        true: in the same places the reference's; empty without one.
    """

    def __init__(
        self,
        unet: UNet,
        features: Sequence[str],
        positions: int = 1024,
        seed: int = 0,
        *,
        reads: bool = False,
        reference: UNet | None = None,
    ) -> None:
        self._unet, self._features, self._positions = unet, tuple(features), positions
        self._random = torch.Generator().manual_seed(seed)
        self._reads, self._reference = reads, reference
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.read: dict[str, list[torch.Tensor]] = {}
        self.true: dict[str, list[torch.Tensor]] = {}
        self._where: dict[str, torch.Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """One generation runs inside."""
        self.kept = {name: [] for name in self._features}
        self.read = {name: [] for name in self._features} if self._reads else {}
        self.true = {name: [] for name in self._features} if self._reference is not None else {}
        self._where = {}
        hook = self._unet.register_forward_hook(self._seen, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def add_to(self, moments: Mapping[str, Moments]) -> None:
        """Add the generation that was watched: its calls, and with a reference then those of the reference."""
        for name, each in moments.items():
            each.add(torch.stack([*self.kept[name], *self.true.get(name, [])], dim=1))

    def empty(self) -> dict[str, Moments]:
        """Moments that generations like the one watched can be added to."""
        return {
            name: Moments(len(kept) + len(self.true.get(name, [])), len(kept[0])) for name, kept in self.kept.items()
        }

    def _seen(self, module: Any, arguments: Any, named: Any, output: Any) -> None:
        bound, run = self._unet.bound, self._unet.last_run
        assert bound is not None
        assert run is not None
        shallow = not run.full[-1]
        read = {name: bound.buffers[name].clone() for name in self._features} if shallow else {}
        if shallow:
            bound.full()
        for name in self._features:
            values = bound.buffers[name].movedim(1, 0).flatten(1)
            if name not in self._where:
                chosen = torch.randperm(values.shape[1], generator=self._random)[: self._positions]
                self._where[name] = chosen.sort().values.to(values.device)
            self.kept[name].append(values[:, self._where[name]].float().cpu())
            if self._reads:
                then = read[name].movedim(1, 0).flatten(1) if shallow else values
                self.read[name].append(then[:, self._where[name]].float().cpu())
        for name, values in read.items():
            bound.buffers[name].copy_(values)
        if self._reference is None:
            return
        with torch.no_grad():
            self._reference(*arguments, **named)
        there = self._reference.bound
        assert there is not None
        for name in self._features:
            values = there.buffers[name].to(bound.buffers[name].device).movedim(1, 0).flatten(1)
            self.true[name].append(values[:, self._where[name]].float().cpu())
