"""Attack: altered ONNX files of a UNet. ``cuts`` and ``split`` take each or refuse it in one sentence."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import offcut
from offcut.errors import UserError
from offcut.exporter.cut import find_cuts, split
from offcut.exporter.measure import measure_cuts

DIMS = {"batch": 2, "frames": 1, "height": 8, "width": 8, "sequence": 7}
SIZES = (0, -1, 1, 7, 2**31, 2**62)


def _rewire(graph: Any, chance: random.Random) -> None:
    node, other = chance.choice(graph.node), chance.choice(graph.node)
    if node.input:
        node.input[chance.randrange(len(node.input))] = other.output[0]  # often a cycle


def _remove_node(graph: Any, chance: random.Random) -> None:
    del graph.node[chance.randrange(len(graph.node))]


def _change_operator(graph: Any, chance: random.Random) -> None:
    chance.choice(graph.node).op_type = chance.choice(("Concat", "Loop", "If", "NoSuchOp", "Conv", "Scan", ""))


def _change_weight_size(graph: Any, chance: random.Random) -> None:
    tensor = chance.choice(graph.initializer)
    if tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(SIZES)


def _change_input_size(graph: Any, chance: random.Random) -> None:
    dims = chance.choice([*graph.input, *graph.output]).type.tensor_type.shape.dim
    if dims and chance.random() < 0.5:
        chance.choice(dims).dim_value = chance.choice(SIZES)
    elif dims:
        chance.choice(dims).dim_param = chance.choice(("", "batch", "height*", "x" * 500, "\u202e"))


def _change_location(graph: Any, chance: random.Random) -> None:
    tensor = chance.choice([tensor for tensor in graph.initializer if tensor.external_data])
    chance.choice(tensor.external_data).value = chance.choice(
        ("../../etc/passwd", "/etc/passwd", "nothing", "-1", str(2**62), "", "weights.data")
    )


def _change_attribute(graph: Any, chance: random.Random) -> None:
    attributes = chance.choice([node for node in graph.node if node.attribute]).attribute
    attribute = chance.choice(attributes)
    if attribute.ints:
        attribute.ints[0] = chance.choice(SIZES)
    else:
        attribute.i = chance.choice(SIZES)


def _rename_input(graph: Any, chance: random.Random) -> None:
    chance.choice(graph.input).name = chance.choice(("", "sample", "x", "noise_pred"))


def _write_twice(graph: Any, chance: random.Random) -> None:
    chance.choice(graph.node).output[0] = chance.choice(graph.node).output[0]


CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    _rewire,
    _remove_node,
    _change_operator,
    _change_weight_size,
    _change_input_size,
    _change_location,
    _change_attribute,
    _rename_input,
    _write_twice,
)


def altered(content: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(len(CHANGES) + 2)
    if kind == len(CHANGES):
        return content[: chance.randrange(len(content))]
    if kind > len(CHANGES):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 3, 30))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    model = onnx.load_from_string(content)
    CHANGES[kind](model.graph, chance)
    return bytes(model.SerializeToString())


def attack(bundle: Path, count: int, seed: int, scratch: Path) -> int:
    """Return how many altered files are refused; any error but a ``UserError`` in one sentence fails."""
    opened = offcut.Bundle.open(bundle)
    source = bundle / opened.entry("onnxruntime").full
    shutil.copyfile(source.with_name("weights.data"), scratch / "weights.data")
    content, chance, refused = source.read_bytes(), random.Random(seed), 0
    for number in range(count):
        (scratch / "unet.onnx").write_bytes(altered(content, chance))
        try:
            cuts = find_cuts(scratch / "unet.onnx")
            if number % 5 == 0:
                split(scratch / "unet.onnx", chance.choice(cuts), scratch / "out")
                shutil.rmtree(scratch / "out")
            if number % 5 == 1:
                measure_cuts(scratch / "unet.onnx", DIMS)
        except UserError as error:
            message = str(error).replace(str(scratch), "")
            assert "\n" not in message
            assert len(message) < 500, message
            refused += 1
    return refused


def test_altered_onnx_files_are_cut_or_refused(unet_bundle: Path, tmp_path: Path) -> None:
    assert 10 < attack(unet_bundle, 40, 0, tmp_path) < 40


@pytest.mark.slow
def test_many_altered_onnx_files_are_cut_or_refused(unet_bundle: Path, tmp_path: Path) -> None:
    assert attack(unet_bundle, 1000, 1, tmp_path) > 300
