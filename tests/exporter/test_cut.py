"""The cut, on graphs of every family and on foreign graphs. Its first invariant is equality bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from support.models import save_stable_diffusion
from support.unets import SKIPS, eager, largest_difference, random_inputs, run

from offcut.errors import CutError, ModelError, UserError
from offcut.exporter.cut import GraphPair, find_cut, find_cuts, is_cut_name, split, split_all

from .conftest import Family

ENGINES = ["onnxruntime", "openvino"]
FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name == "sdxl" else ()) for name in SKIPS]
SHAPE = {"batch": 2, "height": 8, "width": 12}


def names_of(graph: object) -> list[str]:
    return [cut.name for cut in find_cuts(graph)]  # type: ignore[arg-type]


def assert_exact(pair: GraphPair, inputs: dict[str, torch.Tensor], engine: str) -> torch.Tensor:
    """With the full graph's fresh features, the shallow graph computes the full graph's output bit for bit."""
    full = run(engine, pair.full, inputs)
    noise_pred = full.pop("noise_pred")
    result = run(engine, pair.shallow, {**inputs, **full})
    assert list(result) == ["noise_pred"]
    assert torch.isfinite(noise_pred).all()
    assert torch.equal(result["noise_pred"], noise_pred), pair.cut.name
    for spec in pair.cached:
        stale = {**inputs, **full, spec.name: torch.zeros_like(full[spec.name])}
        without = run(engine, pair.shallow, stale)["noise_pred"]
        assert not torch.equal(without, noise_pred), f"{pair.cut.name} does not depend on {spec.name}"
    return noise_pred


@pytest.fixture(scope="module")
def pairs(
    family: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[GraphPair]]:
    """Every cut of a family's graph."""
    made: dict[str, list[GraphPair]] = {}

    def get(name: str) -> list[GraphPair]:
        if name not in made:
            graph = family(name).graph
            made[name] = split_all(graph, find_cuts(graph), tmp_path_factory.mktemp(f"{name}-cuts"))
        return made[name]

    return get


# ---- finding


@pytest.mark.parametrize(
    ("name", "skips"), [pytest.param(*p.values, SKIPS[str(p.values[0])], marks=p.marks) for p in FAMILIES]
)
def test_every_skip_connection_is_a_cut(name: str, skips: int, family: Callable[[str], Family]) -> None:
    cuts = find_cuts(family(name).graph)
    assert [cut.name for cut in cuts] == [*(f"deepcache:{k}" for k in range(skips)), "mlperf"]
    assert [cut.aliases for cut in cuts] == [(), *((f"paper:{k}",) for k in range(skips - 1)), ()]


def test_stable_diffusion_has_twelve_cuts_of_the_shapes_that_diffusers_computes(
    tiny_bundle: Path, tiny_pipeline_dir: Path
) -> None:
    """The shapes are those that the up blocks' layers get from below, in eager PyTorch."""
    from diffusers import UNet2DConditionModel

    graph = next((tiny_bundle / "unet").glob("*/full.onnx"))
    cuts = find_cuts(graph)
    assert len(cuts) == 12 + 1

    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_dir / "unet").eval()
    hidden: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], _: object) -> None:
        skip = skips.pop()
        hidden.append((arguments[0].shape[1] - skip, *arguments[0].shape[2:]))

    # Channels of the skips, innermost last, as the decoder takes them from the end.
    skips = [16, 16, 16, 16, 32, 32, 32, 32, 32, 32, 32, 32]
    for block in unet.up_blocks:
        for resnet in block.resnets:
            resnet.register_forward_hook(note)
    inputs = random_inputs(tiny_pipeline_dir / "unet", batch=1, height=16, width=32)
    with torch.no_grad():
        unet(**inputs)
    dims = {"batch": 1, "height": 16, "width": 32, "sequence": 7}
    found = [cut.cached[0].resolve(dims) for cut in cuts[:12]]
    assert found == [(1, *shape) for shape in reversed(hidden)]


def test_names_of_every_convention_lead_to_one_cut(plain: Family) -> None:
    cuts = find_cuts(plain.graph)
    assert find_cut(cuts, "paper:0") is find_cut(cuts, "deepcache:1")
    assert find_cut(cuts, "paper:2") is cuts[3]
    assert find_cut(cuts, "mlperf") is cuts[-1]
    assert [cut.slug for cut in cuts] == ["deepcache-0", "deepcache-1", "deepcache-2", "deepcache-3", "mlperf"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["deepcache:4", "paper:3", "deepcache", "deepcache:-1", "", "up_blocks.3"])
def test_an_unknown_cut_is_refused_with_the_names_of_all_cuts(name: str, plain: Family) -> None:
    with pytest.raises(CutError) as caught:
        split(plain.graph, name)
    assert f"no cut {name!r}" in str(caught.value)
    assert "deepcache:0, deepcache:1, deepcache:2, deepcache:3, mlperf" in str(caught.value)


def test_an_empty_list_of_cuts_is_refused(plain: Family, tmp_path: Path) -> None:
    with pytest.raises(CutError, match="no cut was named: write deepcache:K, paper:K"):
        split_all(plain.graph, [], tmp_path)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("deepcache:0", True),
        ("paper:11", True),
        ("mlperf", True),
        ("deepcache:", False),
        ("mlperf:1", False),
        ("", False),
    ],
)
def test_cut_names_are_checked_without_a_graph(name: str, valid: bool) -> None:
    assert is_cut_name(name) is valid


def test_the_mlperf_cut_keeps_the_features_of_the_whole_last_block(pairs: Callable[[str], list[GraphPair]]) -> None:
    """With two layers a block, as in SDXL: the deep feature of the block's first layer and two skips that go stale."""
    mlperf = pairs("sdxl")[-1]
    assert [spec.name for spec in mlperf.cached] == ["deep_feature_2", "skip_feature_1", "skip_feature_2"]
    assert all(spec.shape[2:] == ("height", "width") for spec in mlperf.cached)


# ---- cutting


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAMILIES)
def test_shallow_with_fresh_features_equals_full_bit_for_bit(
    name: str, engine: str, family: Callable[[str], Family], pairs: Callable[[str], list[GraphPair]]
) -> None:
    inputs = random_inputs(family(name).model, **SHAPE)
    expected = eager(family(name).model, inputs)
    for pair in pairs(name):
        noise_pred = assert_exact(pair, inputs, engine)
        assert largest_difference(noise_pred, expected) <= 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 16, 6, 20)])
def test_the_equality_holds_at_every_shape(
    shape: tuple[int, int, int, int], engine: str, plain: Family, pairs: Callable[[str], list[GraphPair]]
) -> None:
    batch, height, width, sequence = shape
    inputs = random_inputs(plain.model, batch=batch, height=height, width=width, sequence=sequence)
    for pair in pairs("plain"):
        assert_exact(pair, inputs, engine)


def test_the_features_are_those_of_the_decoder_in_pytorch(
    plain: Family, pairs: Callable[[str], list[GraphPair]]
) -> None:
    """A cached feature is the tensor that the up block's layer receives, before the skip is joined to it."""
    from diffusers import UNet2DConditionModel

    inputs = random_inputs(plain.model, **SHAPE)
    full = run("onnxruntime", pairs("plain")[0].full, inputs)
    unet = UNet2DConditionModel.from_pretrained(plain.model).eval()
    joined: list[torch.Tensor] = []
    for block in unet.up_blocks:
        for resnet in block.resnets:
            resnet.register_forward_hook(lambda module, arguments, output: joined.append(arguments[0]))
    with torch.no_grad():
        unet(**inputs)
    for k, tensor in enumerate(reversed(joined)):
        feature = full[f"deep_feature_{k}"]
        assert largest_difference(feature, tensor[:, : feature.shape[1]]) <= 1e-4


def test_the_files_declare_the_contract(pairs: Callable[[str], list[GraphPair]]) -> None:
    for pair in pairs("plain"):
        full, shallow = ir.load(pair.full).graph, ir.load(pair.shallow).graph
        assert full.outputs[0].name == "noise_pred"
        assert [value.name for value in shallow.outputs] == ["noise_pred"]
        given = {str(value.name): value for value in shallow.inputs}
        made = {str(value.name): value for value in full.outputs}
        assert pair.cached == pair.cut.cached
        for spec in pair.cached:
            for value in (given[spec.name], made[spec.name]):
                assert value.shape is not None
                assert tuple(d if isinstance(d, int) else d.value for d in value.shape) == spec.shape
                assert value.dtype == ir.DataType.FLOAT
        assert set(given) - {spec.name for spec in pair.cached} <= {"sample", "timestep", "encoder_hidden_states"}


def test_a_shallow_graph_keeps_only_what_it_runs(pairs: Callable[[str], list[GraphPair]]) -> None:
    full = len(ir.load(pairs("plain")[0].full).graph)
    nodes = [len(ir.load(pair.shallow).graph) for pair in pairs("plain")[:-1]]
    assert nodes == sorted(nodes)
    assert nodes[0] < full / 3
    convolutions = [node.op_type for node in ir.load(pairs("plain")[0].shallow).graph].count("Conv")
    # conv_in; the last layer's two and its shortcut, its attention block's two; conv_out.
    assert convolutions == 7


@pytest.mark.smoke
def test_the_graphs_refer_to_one_weights_file_beside_them(plain: Family, tmp_path: Path) -> None:
    pair = split(plain.graph, "deepcache:0", tmp_path / "elsewhere")
    assert {file.name for file in (tmp_path / "elsewhere").iterdir()} == {
        "full.onnx",
        "shallow-deepcache-0.onnx",
        "weights.data",
    }
    copy = tmp_path / "elsewhere" / "weights.data"
    assert copy.read_bytes() == plain.graph.weights.read_bytes()
    # The onnx package refuses weights with a second hard link, also the export's own.
    assert copy.stat().st_nlink == plain.graph.weights.stat().st_nlink == 1
    onnx.load(str(pair.full))
    onnx.load(str(pair.shallow))
    for path in (pair.full, pair.shallow):
        locations = {
            value.const_value.location
            for value in ir.load(path).graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        assert locations == {"weights.data"}


@pytest.mark.parametrize("possible", [True, False])
def test_weights_are_linked_on_request_and_copied_where_they_cannot_be(
    possible: bool, plain: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def refuse(*args: object) -> None:
        raise OSError("links are not supported here")

    if not possible:
        monkeypatch.setattr(os, "link", refuse)
    (pair,) = split_all(plain.graph, ["deepcache:1"], tmp_path, link=True)
    assert (tmp_path / "weights.data").samefile(plain.graph.weights) is possible
    assert_exact(pair, random_inputs(plain.model, **SHAPE), "onnxruntime")
    (tmp_path / "weights.data").unlink()


def test_weights_behind_a_link_are_linked_themselves(plain: Family, tmp_path: Path) -> None:
    """In a hub cache a file is a relative link, which leads nowhere from another directory."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in (plain.graph.path, plain.graph.weights):
        shutil.copyfile(file, tmp_path / "blobs" / file.name)
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    out = tmp_path / "a" / "b" / "cut"
    (pair,) = split_all(tmp_path / "snapshot" / "unet.onnx", ["deepcache:0"], out, link=True)
    assert not (pair.full.parent / "weights.data").is_symlink()
    assert_exact(pair, random_inputs(plain.model, **SHAPE), "onnxruntime")


def test_a_cut_in_the_exports_directory_leaves_the_export_unchanged(plain: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain.graph.path.parent, tmp_path / "export"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    first, second = split(folder / "unet.onnx"), split(folder / "unet.onnx", "mlperf")
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name in before} == before
    assert first.full == second.full == folder / "full.onnx"


def test_a_full_graph_can_be_cut_again(plain: Family, pairs: Callable[[str], list[GraphPair]], tmp_path: Path) -> None:
    """The result is the same as that of a first cut of the export."""
    fresh = split_all(plain.graph, ["mlperf", "deepcache:2"], tmp_path / "fresh")
    again = split_all(pairs("plain")[0].full, ["mlperf", "deepcache:2"], tmp_path / "again")
    for one, other in zip(fresh, again, strict=True):
        assert one.cut.cached == other.cut.cached
        assert_exact(other, random_inputs(plain.model, **SHAPE), "onnxruntime")
        assert [v.name for v in ir.load(one.full).graph.outputs] == [v.name for v in ir.load(other.full).graph.outputs]


def test_a_graph_is_never_overwritten_by_its_own_full_graph(
    pairs: Callable[[str], list[GraphPair]], tmp_path: Path
) -> None:
    for file in pairs("plain")[0].full.parent.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    before = (tmp_path / "full.onnx").read_bytes()
    with pytest.raises(ModelError, match="would be overwritten by its own full graph: give another directory"):
        split(tmp_path / "full.onnx")
    assert (tmp_path / "full.onnx").read_bytes() == before


def test_a_shallow_graph_is_not_taken_for_a_unet(pairs: Callable[[str], list[GraphPair]]) -> None:
    with pytest.raises(UserError):
        split(pairs("plain")[0].shallow, "deepcache:0")


# ---- what others exported


def rewritten(graph: Path, folder: Path, change: Callable[[ir.Model], None]) -> Path:
    """A copy of a graph that ``change`` was applied to."""
    folder.mkdir()
    shutil.copyfile(graph.parent / "weights.data", folder / "weights.data")
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.location == "weights.data"
    change(model)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def forget_names(model: ir.Model) -> None:
    """Remove all names, inferred shapes and metadata except those of the inputs."""
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
        node.metadata_props.clear()
        for output, value in enumerate(node.outputs):
            value.name = f"v{index}_{output}"
            if not value.is_graph_output():
                value.shape = value.type = None
    for index, value in enumerate(list(model.graph.initializers.values())):
        assert value.const_value is not None
        model.graph.initializers.pop(str(value.name))
        value.name = value.const_value.name = f"w{index}"
        model.graph.initializers[value.name] = value
    model.graph.outputs[0].name = "out_sample"
    model.producer_name = None


def swap_joins(model: ir.Model) -> None:
    """Put the skip first. The graph then computes another function, as its weights expect the other order."""
    for node in model.graph:
        if node.op_type == "Concat" and node.attributes["axis"].as_int() == 1 and len(node.inputs) == 2:
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)


def negative_axis(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Concat" and node.attributes["axis"].as_int() == 1:
            node.attributes["axis"] = ir.AttrInt64("axis", -3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [forget_names, swap_joins, negative_axis])
def test_joins_are_found_by_topology_alone(
    change: Callable[[ir.Model], None], engine: str, plain: Family, tmp_path: Path
) -> None:
    graph = rewritten(plain.graph.path, tmp_path / "foreign", change)
    cuts = find_cuts(graph)
    assert [(cut.name, cut.cached) for cut in cuts] == [(cut.name, cut.cached) for cut in find_cuts(plain.graph)]
    inputs = random_inputs(plain.model, **SHAPE)
    expected = next(iter(run(engine, graph, inputs).values()))
    for pair in split_all(graph, cuts, tmp_path / "cut"):
        assert torch.equal(assert_exact(pair, inputs, engine), expected)


def inlined(graph: Path, path: Path) -> Path:
    """The graph with its weights inside the ONNX file."""
    path.parent.mkdir(exist_ok=True)
    model = onnx.load(str(graph))
    onnx.save(model, str(path), save_as_external_data=False)
    return path


@pytest.mark.parametrize("elsewhere", [True, False])
def test_weights_inside_the_onnx_file_are_written_out_once(elsewhere: bool, plain: Family, tmp_path: Path) -> None:
    graph = inlined(plain.graph.path, tmp_path / "foreign" / "model.onnx")
    assert graph.stat().st_size > plain.graph.weights.stat().st_size
    before = graph.read_bytes()
    out = tmp_path / "cut" if elsewhere else graph.parent
    pairs = split_all(graph, ["deepcache:0", "mlperf"], out)
    weights = (out / "weights.data").stat().st_size
    assert abs(weights - plain.graph.weights.stat().st_size) < 100_000
    assert sum(file.stat().st_size for file in out.glob("*.onnx") if file != graph) < 500_000
    assert graph.read_bytes() == before
    inputs = random_inputs(plain.model, **SHAPE)
    for pair in pairs:
        assert_exact(pair, inputs, "onnxruntime")


def test_written_weights_do_not_overwrite_a_linked_file(plain: Family, tmp_path: Path) -> None:
    """A directory whose ``weights.data`` is a link to another graph's, as an earlier split leaves it."""
    kept = tmp_path / "kept.data"
    shutil.copyfile(plain.graph.weights, kept)
    kept.write_bytes(b"other people's weights" * 100_000)
    graph = inlined(plain.graph.path, tmp_path / "foreign" / "model.onnx")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "weights.data").hardlink_to(kept)
    assert_exact(split(graph, "deepcache:0", tmp_path / "cut"), random_inputs(plain.model, **SHAPE), "onnxruntime")
    assert kept.read_bytes() == b"other people's weights" * 100_000


def test_weights_in_a_folder_of_their_own_stay_there(plain: Family, tmp_path: Path) -> None:
    def move(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if isinstance(tensor := value.const_value, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    "data/unet.bin", tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape,
                    name=str(tensor.name), base_dir=str(tmp_path / "foreign"),
                )  # fmt: skip

    graph = rewritten(plain.graph.path, tmp_path / "foreign", lambda model: None)
    (tmp_path / "foreign" / "data").mkdir()
    (tmp_path / "foreign" / "weights.data").rename(tmp_path / "foreign" / "data" / "unet.bin")
    model = ir.load(graph)
    move(model)
    ir.save(model, graph)
    inputs = random_inputs(plain.model, **SHAPE)
    assert_exact(split(graph, "deepcache:0"), inputs, "onnxruntime")
    assert_exact(split(graph, "deepcache:0", tmp_path / "cut"), inputs, "onnxruntime")
    assert sorted(file.name for file in graph.parent.iterdir()) == [
        "data",
        "full.onnx",
        "model.onnx",
        "shallow-deepcache-0.onnx",
    ]


@pytest.mark.parametrize("location", ["../secret.bin", "/secret.bin", "data/../../secret.bin"])
def test_weights_outside_the_graphs_directory_are_refused(location: str, plain: Family, tmp_path: Path) -> None:
    """Splitting a foreign graph must not copy another file of this machine into the output directory."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    shutil.copyfile(plain.graph.weights, secret)
    model = onnx.load(str(plain.graph.path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.replace("/secret.bin", str(secret)) if location[0] == "/" else location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside"):
        split(folder / "model.onnx", "deepcache:0", tmp_path / "cut")
    assert not any(path.name == "secret.bin" for path in (tmp_path / "cut").rglob("*"))


def test_weights_that_are_not_there_are_refused(plain: Family, tmp_path: Path) -> None:
    shutil.copyfile(plain.graph.path, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"weights\.data"):
        split(tmp_path / "model.onnx", "deepcache:0", tmp_path / "cut")


def convolutions(path: Path, joined: bool) -> Path:
    """Two convolutions with a UNet's inputs; ``joined`` along the height, which is no skip connection."""
    value, node = helper.make_tensor_value_info, helper.make_node
    nodes = [node("Conv", ["sample", "w"], ["a"]), node("Conv", ["a", "w"], ["b"])]
    nodes.append(node("Concat", ["b", "a"], ["c"], axis=2) if joined else node("Add", ["b", "a"], ["c"]))
    nodes.append(node("Conv", ["c", "w"], ["out"]))
    graph = helper.make_graph(
        nodes,
        "no-skips",
        [value("sample", TensorProto.FLOAT, ["b", 4, "h", "w"]), value("timestep", TensorProto.FLOAT, ["b"])],
        [value("out", TensorProto.FLOAT, ["b", 4, "h", "w"])],
        [helper.make_tensor("w", TensorProto.FLOAT, [4, 4, 1, 1], [0.1] * 16)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path


@pytest.mark.parametrize("joined", [True, False])
def test_a_graph_without_skip_connections_is_refused_with_the_search_rule(joined: bool, tmp_path: Path) -> None:
    with pytest.raises(CutError) as caught:
        find_cuts(convolutions(tmp_path / "model.onnx", joined))
    message = str(caught.value)
    assert "looked for a two-input Concat on axis 1" in message
    assert "among 4 nodes with 3 convolutions" in message


@pytest.fixture(scope="module")
def torchscript(plain: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain UNet as PyTorch's older exporter writes it: traced, its weights in the file, other names."""
    import warnings

    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(plain.model).eval()

    class Tuple(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    inputs = random_inputs(plain.model, batch=2, height=8, width=8)
    path = tmp_path_factory.mktemp("torchscript") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Tuple(),
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=18,
            input_names=list(inputs),
            output_names=["out_sample"],
            dynamic_axes={
                "sample": {0: "batch_size", 1: "num_channels", 2: "h", 3: "w"},
                "timestep": {0: "steps"},
                "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
                "out_sample": {0: "batch_size", 1: "num_channels", 2: "h", 3: "w"},
            },
        )
    return path


@pytest.mark.smoke
@pytest.mark.parametrize("engine", ENGINES)
def test_a_torchscript_export_has_the_same_cuts(engine: str, torchscript: Path, plain: Family, tmp_path: Path) -> None:
    cuts = find_cuts(torchscript)
    assert [(cut.name, cut.cached) for cut in cuts] == [(cut.name, cut.cached) for cut in find_cuts(plain.graph)]
    inputs = random_inputs(plain.model, **SHAPE)
    expected = eager(plain.model, inputs)
    for pair in split_all(torchscript, cuts, tmp_path):
        assert largest_difference(assert_exact(pair, inputs, engine), expected) <= 1e-4


class CalibrationInputs(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    """Random inputs for ONNX Runtime's static quantization."""

    def __init__(self, model: Path) -> None:
        inputs = random_inputs(model, batch=2, height=8, width=8)
        self._inputs = iter([{name: tensor.numpy() for name, tensor in inputs.items()}])

    def get_next(self) -> Any:
        return next(self._inputs, None)


QUANTIZED = {
    "dynamic": ("ConvInteger", {}),
    "qdq": ("DequantizeLinear", {"quant_format": QuantFormat.QDQ}),
    "qoperator": ("QLinearConv", {"quant_format": QuantFormat.QOperator, "op_types_to_quantize": ["Conv", "MatMul"]}),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_graphs_that_onnx_runtime_quantized_are_cut(
    kind: str, torchscript: Path, plain: Family, tmp_path: Path
) -> None:
    operator, options = QUANTIZED[kind]
    path = tmp_path / "int8.onnx"
    if kind == "dynamic":
        quantize_dynamic(torchscript, path)
    else:
        quantize_static(torchscript, path, CalibrationInputs(plain.model), **options)
    assert operator in {node.op_type for node in onnx.load(path).graph.node}
    cuts = find_cuts(path)
    assert [cut.name for cut in cuts] == [cut.name for cut in find_cuts(plain.graph)]
    inputs = random_inputs(plain.model, **SHAPE)
    (expected,) = run("onnxruntime", path, inputs).values()
    for pair in split_all(path, cuts, tmp_path / "split"):
        assert torch.equal(assert_exact(pair, inputs, "onnxruntime"), expected)


def test_graphs_with_operators_of_onnx_runtime_are_refused_with_the_remedy(
    torchscript: Path, plain: Family, tmp_path: Path
) -> None:
    quantize_static(
        torchscript, tmp_path / "all.onnx", CalibrationInputs(plain.model), quant_format=QuantFormat.QOperator
    )
    with pytest.raises(CutError, match=r"quantize with QuantFormat\.QDQ, or Conv and MatMul only"):
        find_cuts(tmp_path / "all.onnx")
    for level, refused in (("ORT_ENABLE_BASIC", False), ("ORT_ENABLE_EXTENDED", True), ("ORT_ENABLE_ALL", True)):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(tmp_path / f"{level}.onnx")
        onnxruntime.InferenceSession(torchscript, options)
        if refused:
            with pytest.raises(CutError, match="give the graph from before ONNX Runtime optimized it"):
                find_cuts(tmp_path / f"{level}.onnx")
        else:
            assert find_cuts(tmp_path / f"{level}.onnx")


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline, and what ``optimum-cli export onnx --task text-to-image`` makes of it."""
    exporters = pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx holds transformers below 4.58")
    folder = tmp_path_factory.mktemp("optimum")
    model = save_stable_diffusion(folder / "model")
    exporters.main_export(str(model), folder / "onnx", task="text-to-image", do_validation=False)
    return model, folder / "onnx" / "unet" / "model.onnx"


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("engine", ENGINES)
def test_an_optimum_export_has_the_same_cuts(engine: str, optimum: tuple[Path, Path], tmp_path: Path) -> None:
    """Where optimum is installed, which is on the older stack; its UNet calls the output ``out_sample``."""
    model, graph = optimum
    cuts = find_cuts(graph)
    assert [cut.name for cut in cuts] == [*(f"deepcache:{k}" for k in range(12)), "mlperf"]
    inputs = random_inputs(model / "unet", batch=2, height=16, width=24)
    expected = eager(model / "unet", {**inputs, "timestep": torch.tensor([500.0, 500.0])})
    given = {**inputs, "timestep": one_timestep(graph)}
    for pair in split_all(graph, cuts, tmp_path):
        assert largest_difference(assert_exact(pair, given, engine), expected) <= 1e-4


def one_timestep(graph: Path) -> torch.Tensor:
    """500 in the rank and dtype that the graph takes; optimum's is one for the whole batch."""
    value = next(v for v in ir.load(graph).graph.inputs if v.name == "timestep")
    assert value.shape is not None
    dtype = torch.int64 if value.dtype == ir.DataType.INT64 else torch.float32
    return torch.full((2,) * 0 if len(value.shape) == 0 else (2 if value.shape[0] != 1 else 1,), 500, dtype=dtype)


@pytest.mark.slow
def test_static_graphs_have_the_same_cuts(static: Family, tmp_path: Path) -> None:
    inputs = random_inputs(static.model, batch=2, height=6, width=12)
    pairs = split_all(static.graph, find_cuts(static.graph), tmp_path)
    assert [pair.cut.name for pair in pairs] == ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]
    assert [spec.shape for spec in pairs[2].cached] == [(2, 32, 3, 6)]
    for engine in ENGINES:
        for pair in pairs:
            assert_exact(pair, inputs, engine)
