"""A small byte-pair tokenizer in CLIP's format, trained on the captions' own words.

The vocabulary has CLIP's order: 256 byte symbols, the same symbols with the end-of-word mark `</w>`, one entry for each
merge, `<|startoftext|>` and `<|endoftext|>`. Every word of a caption is one token; any other text can be encoded too.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import scenes

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 32
"""Number of tokens of a text with its start and end marks; shorter texts are padded with the end mark."""

START = "<|startoftext|>"
END = "<|endoftext|>"
_WORD_END = "</w>"


def byte_symbols() -> tuple[str, ...]:
    """Return the 256 printable characters that stand for bytes in CLIP's and GPT-2's vocabularies, in their order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = len(set(range(256)) - set(shown))
    return tuple(chr(code) for code in [*shown, *range(256, 256 + hidden)])


def learn_merges(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return byte-pair merges until every word is one symbol.

    Args:
        words: lower-case ASCII words with their counts.

    Returns:
        The merges, most frequent pair first; equal counts in alphabetical order.
    """
    spelt = {word: (*word[:-1], word[-1] + _WORD_END) for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelt.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = {word: _merge(symbols, best) for word, symbols in spelt.items()}


@functools.cache
def vocabulary() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return all entries in the order of their ids, and the merges, learned from the captions of 2000 fixed scenes."""
    rng = np.random.default_rng(0)
    captions = [scenes.caption(scenes.sample_scene(rng)) for _ in range(2000)]
    merges = learn_merges(Counter(word for text in captions for word in text.split()))
    symbols = byte_symbols()
    entries = (*symbols, *(s + _WORD_END for s in symbols), *("".join(pair) for pair in merges), START, END)
    return tuple(dict.fromkeys(entries)), tuple(merges)


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        if symbols[position : position + 2] == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(symbols[position])
            position += 1
    return tuple(merged)


def write_tokenizer(directory: Path) -> None:
    """Write vocab.json, merges.txt and the two configuration files of a CLIP tokenizer.

    Every transformers release since 4.0 reads these files.
    """
    entries, merges = vocabulary()
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "vocab.json", {entry: index for index, entry in enumerate(entries)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(directory / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(directory: Path) -> CLIPTokenizer:
    """Return the tokenizer in `directory`, as transformers loads it."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(directory)
