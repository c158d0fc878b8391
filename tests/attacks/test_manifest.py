"""Attack: altered manifests. Each is either opened or refused with a short ``BundleError``."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

import offcut
from offcut.engines.bundle.reading import parse_manifest
from offcut.errors import BundleError

LONGEST = 400
"""Longest message of a refusal, in characters, without the bundle's path."""

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), 0.5),
    *(
        "",
        "a",
        "/",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "a" * 5000,
        "a/" * 3000,
        "\ud800",
        "\u202e",
        "[red]",
    ),
    *("\x1b[31m", "unet/config.json", "offcut.json", ".lock", "batch", "2*batch", "batch*" * 500 + "batch"),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"a": {"a": {}}},
        [0] * 1000,
        "fp32",
        "onnxruntime",
        "deepcache:0",
        "engines/x",
    ),
]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Return every place of a document as container and key."""
    found, waiting = [], [node]
    while waiting:
        container = waiting.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            found.append((container, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def altered(manifest: Any, chance: random.Random) -> str:
    """Return a manifest with one to three changes: odd values, deletions, copies, exchanges, renamed keys."""
    document = copy.deepcopy(manifest)
    for _ in range(chance.choice((1, 1, 2, 3))):
        targets = places(document)
        if not targets:
            break
        container, key = chance.choice(targets)
        change = chance.randrange(6)
        if change == 0:
            container[key] = copy.deepcopy(chance.choice(ODD))
        elif change == 1:
            del container[key]
        elif change == 2:
            other, other_key = chance.choice(targets)
            container[key] = copy.deepcopy(other[other_key])
        elif change == 3:
            other, other_key = chance.choice(targets)
            container[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(container[key])
        elif isinstance(container, dict):
            container[str(chance.choice(ODD))] = container.pop(key)
        else:
            container.insert(chance.randrange(len(container) + 1), copy.deepcopy(chance.choice(ODD)))
    return json.dumps(document)


def check(text: str, folder: Path) -> bool:
    """Return whether a manifest is refused; any error but a short ``BundleError`` fails the test."""
    try:
        manifest = parse_manifest(text.encode("utf-8", "surrogatepass"), folder)
    except BundleError as error:
        message = str(error).replace(str(folder), "")
        assert len(message) <= LONGEST, message
        assert "\n" not in message
        return True
    bundle = offcut.Bundle(folder, manifest, "0" * 64)
    for entry in manifest.engines.values():
        bundle.graphs(entry)
    assert bundle.built_digest
    return False


def run(count: int, seed: int, bundle: Path) -> int:
    chance = random.Random(seed)
    manifest = json.loads((bundle / "offcut.json").read_text())
    return sum(check(altered(manifest, chance), bundle) for _ in range(count))


def test_altered_manifests_are_opened_or_refused(tiny_bundle: Path) -> None:
    refused = run(1000, 0, tiny_bundle)
    assert 500 < refused < 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, int(time.time()) // 86400], ids=["fixed", "today"])
def test_many_altered_manifests_are_opened_or_refused(seed: int, tiny_bundle: Path) -> None:
    assert run(20_000, seed, tiny_bundle) > 10_000


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"schema_version": 1, "files": ' + "[" * 2000 + "]" * 2000 + "}",
        '{"schema_version": 1, "model": "\\ud800"}',
        '{"schema_version": ' + "9" * 5000 + "}",
        '{"schema_version": 1e400}',
        "\ufeff{}",
        "",
        "null",
        "\0" * 1000,
    ],
)
def test_hostile_json_is_refused(text: str, tmp_path: Path) -> None:
    assert check(text, tmp_path)


def test_a_manifest_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "offcut.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(BundleError, match="which no manifest has"):
        offcut.Bundle.open(tmp_path)
