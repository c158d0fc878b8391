"""Ranges on a profiler's timeline: full calls, shallow calls, and the scheduler's work between them.

``torch.profiler`` shows the ranges on every device, Nsight Systems shows them on a GPU (NVTX).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

FULL, SHALLOW, SCHEDULER = "offcut full", "offcut shallow", "offcut scheduler"


class ProfilerRanges:
    """Ranges of one UNet's calls.

    Args:
        device: device of the calls; NVTX ranges are written for CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvtx = device.type == "cuda"
        self._close_gap: Callable[[], None] | None = None

    @contextmanager
    def call(self, full: bool, more: bool) -> Iterator[None]:
        """Open a range around a call of the UNet.

        Args:
            full: whether the full graph runs.
            more: whether another call may follow; if so, the time until that call gets a range of the scheduler.
        """
        self.end()
        close = self._open(FULL if full else SHALLOW)
        try:
            yield
        finally:
            close()
        if more:
            self._close_gap = self._open(SCHEDULER)

    def end(self) -> None:
        """Close the range after the last call: the generation is over, or the next call begins."""
        if self._close_gap is not None:
            self._close_gap()
            self._close_gap = None

    def _open(self, name: str) -> Callable[[], None]:
        opened = ExitStack()
        if torch._C._autograd._profiler_enabled():  # record_function costs an operation of its own
            opened.enter_context(torch.profiler.record_function(name))
        if self._nvtx:
            opened.callback(torch.cuda.nvtx.range_end, torch.cuda.nvtx.range_start(name))
        return opened.close
