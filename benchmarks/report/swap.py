"""The page's section on LoRAs: what exchanging the weights of open engines takes, beside a rebuild."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..swap import Swap, SwapRow
from . import words
from .markup import Markup, tag
from .tables import Column, table

_COLUMNS = (
    Column("Engine", numeric=False),
    Column("Computes in", numeric=False),
    Column("Load", "unet.load_lora; the median and, in brackets, the range of the rounds"),
    Column("Another scale", "unet.set_loras"),
    Column("Unload", "unet.unload_lora"),
    Column("First calls", "a full and a shallow call right after a load"),
    Column("Later calls", "the same calls once more, the LoRA still on"),
    Column("The same calls", "before any LoRA was loaded"),
    Column("Back bit for bit", "A, off, A again", numeric=False),
    Column("Rebuild", "offcut build with the LoRA fused, and opening that bundle"),
    Column("Rebuild / load"),
)


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
        table("What an exchange of weights takes", _COLUMNS, [_row(row) for row in swap.rows]),
        id=key,
    )


def _row(row: SwapRow) -> list[Markup | str]:
    rebuilt = None if row.rebuilt is None or row.rebuilt_opened is None else row.rebuilt + row.rebuilt_opened
    return [
        row.engine,
        row.precision,
        _range(row.loaded),
        _range(row.rescaled),
        _range(row.unloaded),
        _range(row.first_calls),
        _range(row.later_calls) if row.later_calls else words.NONE,
        words.seconds(row.calls),
        "yes" if row.restored else "NO",
        words.seconds(rebuilt),
        words.NONE if rebuilt is None else f"{rebuilt / row.swap:.1f}",
    ]


def _range(values: Sequence[float]) -> str:
    return f"{words.seconds(statistics.median(values))} ({words.seconds(min(values))} to {words.seconds(max(values))})"
