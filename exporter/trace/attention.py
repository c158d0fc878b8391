"""Attention of another kind than the UNet's own: set before the trace, since nobody can change an engine's layers.

A new kind is one class, made when a UNet is loaded, and one line in ``ATTENTION``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CROSS_FRAME = "cross-frame"


def cross_frame() -> Any:
    """Each frame attends to the first one, as in Text2Video-Zero (arXiv 2303.13439, section 3.2).

    The batch is [2 * frames]: the frames without the prompt, then those with it. The same as diffusers'
    ``CrossFrameAttnProcessor2_0(batch_size=2)``, for a number of frames that is known only when it runs.
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
"""From the name of a kind to what makes its processor."""

PIPELINES: Mapping[str, str] = {"TextToVideoZeroPipeline": CROSS_FRAME}
"""diffusers' pipelines that set a kind on their UNet when they are called."""

PROCESSORS: Mapping[str, frozenset[str]] = {
    CROSS_FRAME: frozenset({"CrossFrameAttnProcessor", "CrossFrameAttnProcessor2_0"})
}
"""diffusers' own classes of each kind."""
