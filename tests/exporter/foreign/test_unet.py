"""Foreign UNets under offcut's contract: equal outputs, the same cuts, named weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support.foreign import save_unet_as_optimum
from support.unets import eager, largest_difference, random_inputs, run, save_family

from offcut.errors import CutError, ModelError
from offcut.exporter.cut import find_cuts, split_all
from offcut.exporter.foreign.find import is_foreign, open_foreign
from offcut.exporter.foreign.unet import export_foreign_unet, fixed_dims
from offcut.exporter.load import load_unet, locate
from offcut.exporter.trace.export import ExportedUNet
from offcut.exporter.trace.parameters import StoredWeights
from offcut.exporter.trace.reference import read_reference

ENGINES = ["onnxruntime", "openvino"]
PLAIN_CUTS = ["deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3", "mlperf"]
TIMESTEPS = {
    "scalar": torch.tensor(3.0),
    "one": torch.tensor([3.0]),
    "whole": torch.tensor([3]),  # optimum before 1.20
    "half": torch.tensor(3.0, dtype=torch.float16),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A model with weights, and its UNet as ONNX by PyTorch's older exporter; by family, timestep and opset."""
    made: dict[object, tuple[Path, Path]] = {}

    def get(name: str = "plain", timestep: str = "scalar", opset: int = 18) -> tuple[Path, Path]:
        if (name, timestep, opset) not in made:
            root = tmp_path_factory.mktemp(f"{name}-{timestep}")
            model = save_family(name, root / "model")
            folder = root / "onnx"
            folder.mkdir()
            shutil.copyfile(model / "config.json", folder / "config.json")
            save_unet_as_optimum(
                load_unet(locate(model)), folder / "model.onnx", timestep=TIMESTEPS[timestep], opset=opset
            )
            made[name, timestep, opset] = model, folder
        return made[name, timestep, opset]

    return get


@pytest.fixture
def damaged(saved: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved()[1], tmp_path / "onnx"))


def imported(folder: Path, out: Path, **settings: Any) -> ExportedUNet:
    return export_foreign_unet(locate(folder), out, **{"precision": "fp32", **settings})


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_every_image_has_a_timestep_of_its_own(
    timestep: str, saved: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Timesteps may be fractional whatever the file's dtype, because the UNet embeds them in float32."""
    model, folder = saved(timestep=timestep)
    graph = imported(folder, tmp_path)
    assert str(graph.inputs["timestep"]) == "timestep: float32[batch]"
    inputs = {**random_inputs(model, batch=3, height=8, width=12), "timestep": torch.tensor([3.25, 999.0, 0.0])}
    for engine in ENGINES:
        got = run(engine, graph.path, inputs)["noise_pred"]
        assert largest_difference(got, eager(model, inputs)) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["plain", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_it_is_cut_bit_for_bit(name: str, engine: str, saved: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    model, folder = saved(name)
    graph = imported(folder, tmp_path)
    cuts = find_cuts(graph)
    assert [cut.name for cut in cuts] == (
        PLAIN_CUTS if name == "plain" else [*(f"deepcache:{k}" for k in range(9)), "mlperf"]
    )
    inputs = random_inputs(model, batch=2, height=8, width=12)
    for pair in split_all(graph, cuts):
        full = run(engine, pair.full, inputs)
        noise_pred = full.pop("noise_pred")
        assert largest_difference(noise_pred, eager(model, inputs)) <= 1e-4
        assert torch.equal(run(engine, pair.shallow, {**inputs, **full})["noise_pred"], noise_pred)
        stale = {**inputs, **{key: torch.zeros_like(value) for key, value in full.items()}}
        assert not torch.equal(run(engine, pair.shallow, stale)["noise_pred"], noise_pred)


def test_the_reference_is_the_output_of_the_unchanged_file(
    saved: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    _, folder = saved()
    before = (folder / "model.onnx").read_bytes()
    graph = imported(folder, tmp_path)
    assert (folder / "model.onnx").read_bytes() == before
    kept = read_reference(graph.reference)
    assert len(set(kept.inputs["timestep"].tolist())) == 1
    theirs = {**kept.inputs, "timestep": kept.inputs["timestep"][0]}
    assert torch.equal(kept.noise_pred, run("onnxruntime", folder / "model.onnx", theirs)["out_sample"])
    assert torch.equal(kept.noise_pred, run("onnxruntime", graph.path, dict(kept.inputs))["noise_pred"])


@pytest.mark.parametrize("name", ["plain", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_weights_are_found_by_pytorchs_names(
    name: str, saved: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    model, folder = saved(name)
    graph = imported(folder, tmp_path)
    stored = StoredWeights(graph.path, tmp_path / "parameters.json")
    expected = dict(load_unet(locate(model)).named_parameters())
    assert {key for key, value in expected.items() if value.ndim > 1} <= stored.shapes.keys()
    for key in stored.shapes:
        assert torch.equal(stored.read(key), expected[key]), key
    assert any(parameter.transposed for parameter in graph.parameters.values())


def test_equal_weights_are_kept_apart(tmp_path: Path) -> None:
    """The exporter stores them once; a LoRA for one of them must not change the other."""
    model = save_family("plain", tmp_path / "model")
    unet = load_unet(locate(model))
    attention: Any = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    attention.to_q.weight.copy_(attention.to_k.weight)
    resnets: Any = unet.get_submodule("mid_block.resnets")
    resnets[0].conv1.weight.copy_(resnets[1].conv1.weight)
    (tmp_path / "onnx").mkdir()
    shutil.copyfile(model / "config.json", tmp_path / "onnx" / "config.json")
    save_unet_as_optimum(unet, tmp_path / "onnx" / "model.onnx")
    theirs = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert any(node.op_type == "Identity" for node in theirs.node)
    graph = imported(tmp_path / "onnx", tmp_path / "out")
    names = [parameter.initializer for parameter in graph.parameters.values()]
    assert len(set(names)) == len(names)
    stored = StoredWeights(graph.path, tmp_path / "out" / "parameters.json")
    for name in ("mid_block.resnets.0.conv1.weight", "mid_block.resnets.1.conv1.weight"):
        assert torch.equal(stored.read(name), resnets[0].conv1.weight)


def test_no_layer_is_mapped_unless_all_are_found(damaged: Path, tmp_path: Path) -> None:
    model = onnx.load(damaged / "model.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, damaged / "model.onnx")
    assert imported(damaged, tmp_path / "out").parameters == {}


def test_dimensions_may_be_fixed(saved: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    model, folder = saved()
    graph = imported(folder, tmp_path, dims={"batch": 2, "height": 8, "width": 8})
    assert [graph.inputs[name].shape for name in ("sample", "timestep")] == [(2, 4, 8, 8), (2,)]
    inputs = random_inputs(model, batch=2, height=8, width=8)
    pairs = split_all(graph, find_cuts(graph))
    assert pairs[0].cached[0].shape == (2, 16, 8, 8)
    for engine in ENGINES:
        assert largest_difference(run(engine, pairs[0].full, inputs)["noise_pred"], eager(model, inputs)) <= 1e-4
    with pytest.raises(ModelError, match="dims: depth cannot be fixed"):
        imported(folder, tmp_path / "other", dims={"depth": 2})


def test_a_file_of_one_size_keeps_it(saved: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """As ``optimum-cli export onnx --no-dynamic-axes`` writes them: batch 2, latents of 16x16, 7 tokens."""
    model, dynamic = saved()
    folder = tmp_path / "onnx"
    folder.mkdir()
    shutil.copyfile(dynamic / "config.json", folder / "config.json")
    save_unet_as_optimum(load_unet(locate(model)), folder / "model.onnx", dynamic=False)
    sizes = fixed_dims(open_foreign(folder), locate(folder))
    assert sizes == {"batch": 2, "height": 16, "width": 16, "sequence": 7}
    with pytest.raises(ModelError, match=r"sample of .* is fixed to 2, not batch = 1: export it again"):
        imported(folder, tmp_path / "other", dims={**sizes, "batch": 1})
    graph = imported(folder, tmp_path / "out", dims=sizes)
    assert [graph.inputs[name].shape for name in ("sample", "timestep")] == [(2, 4, 16, 16), (2,)]
    inputs = random_inputs(model, batch=2, height=16, width=16)
    for pair in split_all(graph, find_cuts(graph)):
        full = run("onnxruntime", pair.full, inputs)
        noise_pred = full.pop("noise_pred")
        assert largest_difference(noise_pred, eager(model, inputs)) <= 1e-4
        assert torch.equal(run("onnxruntime", pair.shallow, {**inputs, **full})["noise_pred"], noise_pred)


def test_an_older_opset_is_supported(saved: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Opset 14, long optimum's default, has no LayerNormalization."""
    model, folder = saved(opset=14)
    graph = imported(folder, tmp_path)
    assert graph.opset == 14
    inputs = random_inputs(model, batch=2, height=8, width=8)
    for engine in ENGINES:
        assert largest_difference(run(engine, graph.path, inputs)["noise_pred"], eager(model, inputs)) <= 1e-4


# ---- what is no such directory


def test_safetensors_win_over_foreign_onnx(saved: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    model, folder = saved()
    assert locate(folder).onnx
    both = Path(shutil.copytree(model, tmp_path / "both"))
    shutil.copyfile(folder / "model.onnx", both / "model.onnx")
    assert not is_foreign(both)
    assert not locate(both).onnx
    with pytest.raises(ModelError, match="holds its UNet as ONNX only, and this needs PyTorch weights"):
        load_unet(locate(folder))


def test_another_precision_is_refused(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is fp32, which cannot be made fp16: build with --precision fp32"):
        imported(damaged, tmp_path / "out", precision="fp16")


def test_weights_of_several_precisions_are_refused(damaged: Path, tmp_path: Path) -> None:
    model = onnx.load(damaged / "model.onnx")
    weight = next(each for each in model.graph.initializer if each.name == "conv_in.weight")
    weight.CopyFrom(
        helper.make_tensor(
            weight.name, TensorProto.FLOAT16, weight.dims, [0.0] * onnx.numpy_helper.to_array(weight).size
        )
    )
    onnx.save(model, damaged / "model.onnx")
    with pytest.raises(ModelError, match="computes in FLOAT and FLOAT16; offcut takes graphs whose inputs and weights"):
        imported(damaged, tmp_path / "out")


def _truncate(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])


def _externalise(folder: Path) -> Path:
    onnx.save(
        onnx.load(folder / "model.onnx"), folder / "model.onnx", save_as_external_data=True, location="model.data"
    )
    return folder / "model.data"


def _lose_the_weights(folder: Path) -> None:
    _externalise(folder).unlink()


def _cut_the_weights_short(folder: Path) -> None:
    weights = _externalise(folder)
    weights.write_bytes(weights.read_bytes()[:-100])


def _edit(change: Callable[[onnx.GraphProto], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        change(model.graph)
        onnx.save(model, folder / "model.onnx")

    return edit


def _add_input(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("mid_residual", TensorProto.FLOAT, ["n", 32, "h", "w"]))


def _add_output(graph: onnx.GraphProto) -> None:
    graph.output.append(helper.make_tensor_value_info(graph.node[-3].output[0], TensorProto.FLOAT, None))


def _fix_channels(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9


def _embed_directly(graph: onnx.GraphProto) -> None:
    """A timestep that is not expanded."""
    expand = next(node for node in graph.node if node.op_type == "Expand")
    expand.op_type = "Identity"
    del expand.input[1:]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_truncate, r"model\.onnx is not a readable ONNX file: export or download it again"),
        (_lose_the_weights, r"needs its weights file model\.data, which is missing: copy both files"),
        (_cut_the_weights_short, r"model\.data is truncated: copy or export it again"),
        (
            _edit(_add_input),
            "has the inputs sample, timestep, encoder_hidden_states, mid_residual, but the UNet of its",
        ),
        (_edit(_add_output), "has 2 outputs, but a UNet has one"),
        (_edit(_fix_channels), "sample of .* is fixed to 9, not 4: export it again"),
        (_edit(_embed_directly), "does not expand its timestep to the batch, as UNets of diffusers do"),
    ],
)
def test_a_bad_file_is_one_sentence(
    damage: Callable[[Path], None], sentence: str, damaged: Path, tmp_path: Path
) -> None:
    damage(damaged)
    with pytest.raises(ModelError, match=sentence):
        imported(damaged, tmp_path / "out")


def test_weights_in_separate_files_are_copied(damaged: Path, tmp_path: Path) -> None:
    """As those of a large model are stored; the copy is one file."""
    _externalise(damaged)
    assert [file.name for file in open_foreign(damaged).files] == ["model.onnx", "model.data"]
    graph = imported(damaged, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "unet.onnx", "weights.data", "parameters.json", "reference.safetensors",
    }  # fmt: skip
    assert graph.weights.stat().st_size > 100_000


def test_a_graph_without_skip_connections_has_no_cut(damaged: Path, tmp_path: Path) -> None:
    """Joins of another axis are none."""

    def turn(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Concat" and node.attribute[0].i == 1 and len(node.input) == 2:
                node.op_type, node.attribute[0].i = "Concat", 0

    _edit(turn)(damaged)
    with pytest.raises(CutError, match="no skip connection found"):
        find_cuts(damaged / "model.onnx")
