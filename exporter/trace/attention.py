"""Kinds of attention that replace the UNet's own. They are set before the trace, because engines have fixed layers.

A new kind is one function that returns a processor, and one line in ``ATTENTION``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CROSS_FRAME = "cross-frame"


def cross_frame() -> Any:
    """Return a processor with which each frame attends to the first, as in Text2Video-Zero (arXiv 2303.13439, 3.2).

    The batch is [2 * frames]: the frames without the prompt, then the frames with the prompt. The processor computes
    the same as diffusers' ``CrossFrameAttnProcessor2_0(batch_size=2)``, but the number of frames may be symbolic.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    class CrossFrame(AttnProcessor2_0):  # type: ignore[misc]  # diffusers is untyped
        def __call__(
            self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None
        ) -> Any:
            if encoder_hidden_states is None:
                count, tokens, width = hidden_states.shape
                halves = hidden_states.reshape(2, count // 2, tokens, width)
                first = halves[:, :1].expand(2, count // 2, tokens, width)
                encoder_hidden_states = first.reshape(count, tokens, width)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    return CrossFrame()


ATTENTION: Mapping[str, Callable[[], Any]] = {CROSS_FRAME: cross_frame}
"""Factories of attention processors by the name of their kind."""

PIPELINES: Mapping[str, str] = {"TextToVideoZeroPipeline": CROSS_FRAME}
"""diffusers' pipelines that set a kind of attention on their UNet when they are called."""

PROCESSORS: Mapping[str, frozenset[str]] = {
    CROSS_FRAME: frozenset({"CrossFrameAttnProcessor", "CrossFrameAttnProcessor2_0"})
}
"""diffusers' own processor classes by kind."""
