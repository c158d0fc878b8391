from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.unets import random_inputs, run

from offcut.exporter.cut import split_all
from offcut.exporter.graph import infer_shapes, read
from offcut.exporter.load import load_unet, locate
from offcut.exporter.measure import _flops, _parameters, count_flops, measure_cuts, predicted_speed_up

from .conftest import Family

DIMS = {"batch": 2, "height": 8, "width": 12, "sequence": 7}


def test_flops_and_parameters_of_the_whole_graph_are_pytorchs(plain: Family) -> None:
    """Counted by PyTorch while it runs the UNet, and from the graph without running it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    unet = load_unet(locate(plain.model))
    # The counter knows matrix products, but not the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(**random_inputs(plain.model, **DIMS))
    graph = read(plain.graph.path)
    nodes = set(graph.model.graph)
    assert _flops(nodes, infer_shapes(graph, DIMS)) == counter.get_total_flops()
    for cost in measure_cuts(plain.graph, DIMS):
        full, shallow = count_flops(plain.graph.path, DIMS, cost.cut.name)
        assert full == counter.get_total_flops()
        assert shallow == round(cost.flops * full)
    # The graph holds a few constants besides, of the time embedding.
    parameters = sum(p.numel() for p in unet.parameters())
    assert parameters <= _parameters(nodes) <= parameters + 200


def test_deeper_cuts_have_costlier_shallow_steps(plain: Family) -> None:
    costs = measure_cuts(plain.graph, DIMS)
    assert [cost.cut.name for cost in costs] == ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]
    for of in ("nodes", "parameters", "flops"):
        values = [getattr(cost, of) for cost in costs[:-1]]
        assert values == sorted(values), of
    for cost in costs:
        assert 0 < cost.flops < 1
        assert 0 < cost.parameters < 1


def test_cache_bytes_are_those_of_the_features(plain: Family, tmp_path: Path) -> None:
    inputs = random_inputs(plain.model, **DIMS)
    for cost in measure_cuts(plain.graph, DIMS):
        (pair,) = split_all(plain.graph, [cost.cut], tmp_path / cost.cut.slug)
        outputs = run("onnxruntime", pair.full, inputs)
        assert cost.cache_bytes == sum(outputs[spec.name].nbytes for spec in pair.cached)


@pytest.mark.parametrize(
    ("shallow", "interval", "speed_up"),
    [(0.0, 5, 5.0), (1.0, 5, 1.0), (0.1, 1, 1.0), (0.5, 2, 4 / 3), (0.1, 5, 5 / 1.4)],
)
def test_a_predicted_speed_up_is_that_of_one_full_step_in_n(shallow: float, interval: int, speed_up: float) -> None:
    assert predicted_speed_up(shallow, interval) == pytest.approx(speed_up)
