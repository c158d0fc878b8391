"""The page's section on LoRAs: what exchanging the weights of open engines takes, beside a rebuild."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ..swap import Swap, SwapRow
from . import words
from .markup import Markup, tag
from .tables import Column, table

_LINES: tuple[tuple[str, str, Callable[[SwapRow], str]], ...] = (
    ("Load", "unet.load_lora", lambda row: _range(row.loaded)),
    ("Another scale", "unet.set_loras", lambda row: _range(row.rescaled)),
    ("Unload", "unet.unload_lora", lambda row: _range(row.unloaded)),
    ("First calls", "a full and a shallow call right after a load", lambda row: _range(row.first_calls)),
    ("Later calls", "the same calls once more, the LoRA still on", lambda row: _range(row.later_calls)),
    ("The same calls", "before any LoRA was loaded", lambda row: words.seconds(row.calls)),
    ("Back bit for bit", "A, off, A again", lambda row: "yes" if row.restored else "NO"),
    (
        "Rebuild",
        "offcut build with the LoRA fused, and opening that bundle",
        lambda row: words.seconds(_rebuilt(row)),
    ),
    ("Rebuild / load", "", lambda row: words.NONE if (took := _rebuilt(row)) is None else f"{took / row.swap:.1f}"),
)
"""What a line shows, what that is, and of which row."""


def section(swap: Swap, key: str) -> Markup:
    """``key`` makes its id unique on the page."""
    sizes = ", ".join(f"{name} {size}" for name, size in swap.sizes.items())
    task = (
        f"{words.model(swap.model)}: a LoRA ({swap.lora}; {swap.layers} layers) goes onto the open engines and off "
        f"again, {swap.rounds} time{'s' if swap.rounds != 1 else ''}. The calls are full and {swap.cut}, with {sizes}."
    )
    return tag(
        "section",
        tag("h2", "LoRAs"),
        tag("p", task, class_="lead"),
        table(
            "What an exchange of weights takes: the median and, in brackets, the range of the rounds",
            [
                Column("", numeric=False),
                *(Column(f"{row.engine}, {row.precision}") for row in swap.rows),
                Column("What it is", numeric=False),
            ],
            [(name, *(value(row) for row in swap.rows), what) for name, what, value in _LINES],
        ),
        id=key,
    )


def _rebuilt(row: SwapRow) -> float | None:
    return None if row.rebuilt is None or row.rebuilt_opened is None else row.rebuilt + row.rebuilt_opened


def _range(values: Sequence[float]) -> str:
    if not values:
        return words.NONE
    return f"{words.seconds(statistics.median(values))} ({words.seconds(min(values))} to {words.seconds(max(values))})"
