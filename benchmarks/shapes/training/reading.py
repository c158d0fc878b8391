"""A training aid: small heads that read, from the text encoder's output, which object the picture shows where.

The relation decides the places, and CLIP's attention is causal: the first object's own words are encoded before the
relation is known. The velocity's error alone teaches so distant a dependency slowly (relations stay at chance for ten
thousand steps), so the text encoder is also asked for it directly: at the relation's last word, for the first object;
at the last object's noun, for that one. The heads are dropped after training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import scenes
from . import architecture as networks
from . import tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of positions that are not asked."""

PLACES = ("middle", "top", "bottom", "left", "right")
_COLOURS = tuple(scenes.COLOURS)
_FIRST: dict[scenes.Relation, str] = {"above": "top", "below": "bottom", "left of": "left", "right of": "right"}
_OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def labels(scene: scenes.Scene) -> list[list[int]]:
    """[32][3]: place, colour and shape to be read at each token of the scene's caption, or `IGNORED`."""
    rows = [[IGNORED] * 3 for _ in range(tokenizer.MAX_LENGTH)]
    words = scenes.caption(scene).split()  # every word is one token, after the start mark

    def ask(word: int, place: str, item: scenes.Item) -> None:
        rows[word + 1] = [PLACES.index(place), _COLOURS.index(item.colour), scenes.SHAPES.index(item.shape)]

    noun = words.index("on") - 1
    if scene.relation is None:
        ask(noun, "middle", scene.items[0])
        return rows
    place = _FIRST[scene.relation]
    start = next(index for index, word in enumerate(words) if word == scene.relation.split()[0])
    ask(start + len(scene.relation.split()) - 1, place, scene.items[0])
    ask(noun, _OPPOSITE[place], scene.items[1])
    return rows


def new_reader() -> torch.nn.ModuleList:
    """Untrained heads for place, colour and shape, each from 128 channels."""
    import torch

    sizes = (len(PLACES), len(_COLOURS), len(scenes.SHAPES))
    return torch.nn.ModuleList(torch.nn.Linear(networks.TEXT_WIDTH, size) for size in sizes)


def loss(reader: torch.nn.ModuleList, text: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Sum of the heads' cross-entropies at the asked positions.

    Args:
        text: hidden states [B, 32, 128].
        wanted: labels, int64 [B, 32, 3]; at least one is asked.
    """
    import torch

    asked = wanted[..., 0] != IGNORED
    states, answers = text[asked], wanted[asked]
    parts = [torch.nn.functional.cross_entropy(head(states), answers[:, i]) for i, head in enumerate(reader)]
    return torch.stack(parts).sum()
