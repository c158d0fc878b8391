"""Names on a profiler's timeline: full calls, shallow calls, and the scheduler's work between them.

``torch.profiler`` shows them everywhere, Nsight Systems on a GPU (NVTX).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

FULL, SHALLOW, SCHEDULER = "offcut full", "offcut shallow", "offcut scheduler"


class ProfilerRanges:
    """The ranges of one UNet.

    Args:
        device: where its calls run; NVTX is written for CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvtx = device.type == "cuda"
        self._close_gap: Callable[[], None] | None = None

    @contextmanager
    def call(self, full: bool, more: bool) -> Iterator[None]:
        """Around a call of the UNet.

        Args:
            full: which graph runs.
            more: another call may follow; what happens until then is the scheduler's and the guidance's.
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
        """The generation is over, or the next call begins."""
        if self._close_gap is not None:
            self._close_gap()
            self._close_gap = None

    def _open(self, name: str) -> Callable[[], None]:
        opened = ExitStack()
        if torch._C._autograd._profiler_enabled():  # it is an operation of its own, which nobody else needs
            opened.enter_context(torch.profiler.record_function(name))
        if self._nvtx:
            opened.callback(torch.cuda.nvtx.range_end, torch.cuda.nvtx.range_start(name))
        return opened.close
