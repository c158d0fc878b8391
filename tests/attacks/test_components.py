"""Attack: components whose files are damaged although their digests are right: each is opened or refused."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import offcut
from offcut.errors import BundleError, UserError

ODD: list[Any] = [
    *(None, True, -1, 0, 2**31, 10**12, 1e30, "", "a" * 1000, [], {}, "../../x", ["os", "system"], [None, None]),
    *("float16", [1, 2], {"a": 1}, "CLIPTextModel", "FluxTransformer2DModel"),
]


def forge(bundle: Path, name: str, content: bytes) -> None:
    """Replace a listed file and its digest."""
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "offcut.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "offcut.json").write_text(json.dumps(manifest))


def altered_json(content: bytes, chance: random.Random) -> bytes:
    document = json.loads(content)
    places, waiting = [], [document]
    while waiting:
        container = waiting.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            places.append((container, key))
            waiting += [value] if isinstance(value, (dict, list)) else []
    container, key = chance.choice(places)
    if chance.random() < 0.2:
        del container[key]
    else:
        container[key] = chance.choice(ODD)
    return json.dumps(document).encode()


def altered_bytes(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(20 if content else 0):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return chance.choice((content[: chance.randrange(len(content) + 1)], bytes(changed), b"\0" * 100, content * 2))


def attack(bundle: Path, count: int, seed: int, scratch: Path) -> dict[str, int]:
    """Load altered copies of a bundle; any error but a short ``UserError`` fails."""
    chance = random.Random(seed)
    parts = json.loads((bundle / "offcut.json").read_text())["parts"]
    outcomes = {"opened": 0, "refused": 0}
    for number in range(count):
        copy = Path(shutil.copytree(bundle, scratch / str(number)))
        name = chance.choice(parts)
        is_json = name.endswith(".json") and chance.random() < 0.8
        forge(copy, name, (altered_json if is_json else altered_bytes)((copy / name).read_bytes(), chance))
        try:
            offcut.load(copy, "onnxruntime", threads=1).unet.close()
            outcomes["opened"] += 1
        except UserError as error:
            message = str(error).replace(str(copy), "")
            assert "\n" not in message
            assert len(message) < 400, message
            outcomes["refused"] += 1
        shutil.rmtree(copy)
    return outcomes


def test_damaged_components_are_opened_or_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    assert attack(tiny_bundle, 8, 0, tmp_path)["refused"]


@pytest.mark.slow
def test_many_damaged_components_are_opened_or_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = attack(tiny_bundle, 100, 1, tmp_path)
    assert outcomes["refused"] > 20
    assert outcomes["opened"] > 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: below 1 GiB


def test_a_scheduler_that_would_fill_the_memory_is_refused(tiny_bundle: Path, copied: Callable[[Path], Path]) -> None:
    bundle = copied(tiny_bundle)
    name = "scheduler/scheduler_config.json"
    config = json.loads((bundle / name).read_text()) | {"num_train_timesteps": 2**40}
    forge(bundle, name, json.dumps(config).encode())
    with pytest.raises(BundleError, match=r"has a scheduler of 1e\+12 timesteps"):
        offcut.load(bundle, "onnxruntime", threads=1)
