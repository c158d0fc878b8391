"""The cut on PyTorch programs: the same joins as in the ONNX graph, and the same numbers as eager PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from support.unets import SKIPS, eager, largest_difference, random_inputs

from offcut.exporter.cut import find_cuts
from offcut.exporter.load import locate
from offcut.exporter.program import BufferedProgram, UNetProgram, find_program_joins

from .conftest import Family


def trace(family: Family) -> tuple[UNetProgram, dict[str, tuple[str, ...]]]:
    """Return the traced UNet of a family, and the names of each cut's cached tensors."""
    cuts = {cut.name: tuple(spec.name for spec in cut.cached) for cut in find_cuts(family.graph)}
    features = {spec.name: spec for cut in find_cuts(family.graph) for spec in cut.cached}
    source = locate(family.model)
    return UNetProgram(source, "fp32", family.graph.inputs, features, {}, family.graph.multiple), cuts


class Programs:
    """The programs of one family, each traced once: the full one, and the shallow one for each set of features."""

    def __init__(self, family: Family) -> None:
        self.unet, self.cuts = trace(family)
        self._traced: dict[tuple[str, ...], BufferedProgram] = {}

    def full(self) -> BufferedProgram:
        return self._once((), self.unet.full)

    def shallow(self, cached: tuple[str, ...]) -> BufferedProgram:
        return self._once(cached, lambda: self.unet.shallow(cached))

    def _once(self, key: tuple[str, ...], make: Callable[[], BufferedProgram]) -> BufferedProgram:
        if key not in self._traced:
            self._traced[key] = make()
        return self._traced[key]


@pytest.fixture(scope="module")
def programs(family: Callable[[str], Family]) -> Callable[[str], Programs]:
    """Return a function from a name of ``unets.SKIPS`` to the programs of that family."""
    return functools.cache(lambda name: Programs(family(name)))


def run(program: BufferedProgram, tensors: dict[str, torch.Tensor]) -> None:
    """Call a program as an engine does; the results are in the output tensors afterwards."""
    program.exported.module()([tensors[name] for name in program.inputs], [tensors[name] for name in program.outputs])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "sdxl" else ()) for name in SKIPS]
)
def test_every_cut_computes_the_same_as_pytorch(
    name: str, family: Callable[[str], Family], programs: Callable[[str], Programs]
) -> None:
    model = family(name)
    program, cuts = programs(name), programs(name).cuts
    dims = {"batch": 3, "height": 16, "width": 8, "sequence": 5}
    inputs = random_inputs(model.model, **dims, seed=3)
    full = program.full()
    tensors = dict(inputs)
    for spec in (*program.unet.features.values(), model.graph.outputs["noise_pred"]):
        tensors[spec.name] = torch.full(spec.resolve(dims), float("nan"))
    run(full, tensors)
    expected = eager(model.model, inputs)
    assert largest_difference(tensors["noise_pred"], expected) <= 1e-4
    # Each shallow program is traced anew, so larger families only check the outermost and the last cut.
    selected = cuts if name == "plain" else dict([*cuts.items()][:1] + [*cuts.items()][-1:])
    for cut, cached in selected.items():
        shallow = program.shallow(cached)
        tensors["noise_pred"].fill_(float("nan"))
        run(shallow, tensors)
        assert largest_difference(tensors["noise_pred"], expected) <= 1e-4, cut
        assert set(shallow.inputs) <= {*inputs, *cached}
        assert set(cached) <= set(shallow.inputs)


def test_the_joins_are_counted_from_the_outermost(programs: Callable[[str], Programs]) -> None:
    program = programs("plain").unet
    joins = find_program_joins(program.module)
    assert len(joins) == SKIPS["plain"]
    order = {node: index for index, node in enumerate(program.module.graph.nodes)}
    assert all(order[outer.node] > order[inner.node] for outer, inner in pairwise(joins))
    for join in joins:
        assert order[join.skip] < order[join.hidden]


def test_a_shallow_program_grows_with_the_cut(programs: Callable[[str], Programs]) -> None:
    program = programs("plain")
    sizes = [len(program.shallow((f"deep_feature_{k}",)).exported.graph.nodes) for k in range(SKIPS["plain"])]
    assert sizes == sorted(sizes)
    weights = [len(program.shallow((f"deep_feature_{k}",)).exported.state_dict) for k in range(2)]
    assert 0 < weights[0] < weights[1] < len(program.full().exported.state_dict)
