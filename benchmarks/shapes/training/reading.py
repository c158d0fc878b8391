"""Small heads that predict the objects and their places from the text encoder's output; used only in training.

The relation decides the places, and CLIP's attention is causal: the first object's words are encoded before the
relation is known. The velocity's error alone teaches this slowly: relations stay at chance for ten thousand steps. The
heads therefore predict place, colour and shape directly: of the first object at the relation's last word, and of the
last object at its noun.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import scenes
from . import architecture as networks
from . import tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of tokens without a prediction."""

PLACES = ("middle", "top", "bottom", "left", "right")
_COLOURS = tuple(scenes.COLOURS)
_FIRST: dict[scenes.Relation, str] = {"above": "top", "below": "bottom", "left of": "left", "right of": "right"}
_OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def labels(scene: scenes.Scene) -> list[list[int]]:
    """Return place, colour and shape to predict at each token of the scene's caption, or `IGNORED`: [32][3]."""
    rows = [[IGNORED] * 3 for _ in range(tokenizer.MAX_LENGTH)]
    words = scenes.caption(scene).split()  # every word is one token, after the start mark

    def predict_at(word: int, place: str, item: scenes.Item) -> None:
        rows[word + 1] = [PLACES.index(place), _COLOURS.index(item.colour), scenes.SHAPES.index(item.shape)]

    noun = words.index("on") - 1
    if scene.relation is None:
        predict_at(noun, "middle", scene.items[0])
        return rows
    place = _FIRST[scene.relation]
    start = next(index for index, word in enumerate(words) if word == scene.relation.split()[0])
    predict_at(start + len(scene.relation.split()) - 1, place, scene.items[0])
    predict_at(noun, _OPPOSITE[place], scene.items[1])
    return rows


def new_heads() -> torch.nn.ModuleList:
    """Return untrained heads for place, colour and shape, each from 128 channels."""
    import torch

    sizes = (len(PLACES), len(_COLOURS), len(scenes.SHAPES))
    return torch.nn.ModuleList(torch.nn.Linear(networks.TEXT_WIDTH, size) for size in sizes)


def loss(heads: torch.nn.ModuleList, text: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the heads' cross-entropies at the tokens with a label.

    Args:
        text: hidden states [B, 32, 128].
        targets: labels, int64 [B, 32, 3], at least one of them not `IGNORED`.
    """
    import torch

    labelled = targets[..., 0] != IGNORED
    states, classes = text[labelled], targets[labelled]
    parts = [torch.nn.functional.cross_entropy(head(states), classes[:, i]) for i, head in enumerate(heads)]
    return torch.stack(parts).sum()
