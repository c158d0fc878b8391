"""Options of ONNX Runtime's providers, and the errors for a missing or invalid provider."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import offcut
from offcut.engines.base import EngineOptions
from offcut.engines.onnxruntime import pair as engine_module
from offcut.engines.onnxruntime.providers import PROVIDERS, covering, provider_of, provider_options
from offcut.engines.profiles import Profile
from offcut.errors import EngineError
from offcut.exporter.specs import TensorSpec

INPUTS = [
    TensorSpec("sample", "float16", ("batch", 4, "height", "width")),
    TensorSpec("timestep", "float16", ("batch",)),
    TensorSpec("deep_feature_0", "float16", ("batch", 320, "height/2", "width/2")),
    TensorSpec("scale", "float16", (1,)),
]
SMALL = Profile.of({"batch": (1, 2, 2), "height": (32, 64, 64), "width": (32, 64, 64)})
LARGE = Profile.of({"batch": (2, 2, 8), "height": (64, 96, 128), "width": (64, 64, 96)})


def options(name: str, **overrides: object) -> dict[str, str]:
    arguments: dict[str, object] = {"device": 1, "stream": 77, "precision": "fp16", **overrides}
    return provider_options(PROVIDERS[name], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_computes_fp32_in_fp32_and_captures_only_on_request(graphs: bool) -> None:
    assert options("cuda", cuda_graphs=graphs, cache=Path("/c"), profile=SMALL, inputs=INPUTS) == {
        "device_id": "1",
        "user_compute_stream": "77",
        "use_tf32": "0",
        "enable_cuda_graph": "1" if graphs else "0",
    }


def test_tensorrt_gets_a_cache_and_the_shapes_of_dynamic_inputs() -> None:
    settings = options("tensorrt", cuda_graphs=True, cache=Path("/c"), profile=SMALL, inputs=INPUTS)
    assert settings == {
        "device_id": "1",
        "user_compute_stream": "77",
        "trt_fp16_enable": "True",
        "trt_bf16_enable": "False",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "/c",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": "/c",
        "trt_profile_min_shapes": "sample:1x4x32x32,timestep:1,deep_feature_0:1x320x16x16",
        "trt_profile_opt_shapes": "sample:2x4x64x64,timestep:2,deep_feature_0:2x320x32x32",
        "trt_profile_max_shapes": "sample:2x4x64x64,timestep:2,deep_feature_0:2x320x32x32",
    }


def test_tensorrt_rtx_gets_a_stream_a_cache_and_shapes() -> None:
    settings = options("tensorrt-rtx", cuda_graphs=True, cache=Path("/c"), profile=SMALL, inputs=INPUTS[:2])
    assert settings == {
        "has_user_compute_stream": "1",
        "user_compute_stream": "77",
        "enable_cuda_graph": "1",
        "nv_runtime_cache_path": "/c",
        "nv_profile_min_shapes": "sample:1x4x32x32,timestep:1",
        "nv_profile_opt_shapes": "sample:2x4x64x64,timestep:2",
        "nv_profile_max_shapes": "sample:2x4x64x64,timestep:2",
    }


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(("profile", "inputs"), [(None, INPUTS), (SMALL, INPUTS[3:])])
def test_without_a_profile_or_dynamic_inputs_no_shapes_are_set(
    name: str, profile: Profile | None, inputs: list[TensorSpec]
) -> None:
    assert not [key for key in options(name, profile=profile, inputs=inputs) if "shapes" in key or "cache" in key]


@pytest.mark.parametrize(
    ("precision", "fp16", "bf16"), [("fp32", "False", "False"), ("fp16", "True", "False"), ("bf16", "False", "True")]
)
def test_tensorrt_may_use_the_graphs_precision_and_no_lower_one(precision: str, fp16: str, bf16: str) -> None:
    settings = options("tensorrt", precision=precision)
    assert (settings["trt_fp16_enable"], settings["trt_bf16_enable"]) == (fp16, bf16)


def test_covering_returns_one_profile_tuned_for_the_first() -> None:
    both = covering([SMALL, LARGE])
    assert both is not None
    for profile in (SMALL, LARGE):
        assert both.covers(profile.min)
        assert both.covers(profile.max)
    assert both.opt == SMALL.opt
    assert both.max == {"batch": 8, "height": 128, "width": 96}
    assert covering([LARGE]) == LARGE
    assert covering([]) is None


def test_a_provider_can_be_chosen_on_cuda_only() -> None:
    assert provider_of(None, "cpu") is None
    assert provider_of(None, "cuda") is PROVIDERS["cuda"]
    with pytest.raises(EngineError, match="runs on cuda, not on cpu: choose the device"):
        provider_of("tensorrt", "cpu")
    with pytest.raises(EngineError, match="no provider 'rocm' here; choose one of cuda, tensorrt, tensorrt-rtx"):
        provider_of("rocm", "cuda")


# ---- errors when a pair is opened


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cuda", r"has no CUDAExecutionProvider: pip uninstall onnxruntime, then pip install 'offcut\[cuda\]'"),
        ("tensorrt", r"has no TensorrtExecutionProvider: .*'offcut\[cuda\]', and the TensorRT"),
        ("tensorrt-rtx", "has no NvTensorRTRTXExecutionProvider: pip install onnxruntime-ep-nv-tensorrt-rtx"),
    ],
)
def test_a_missing_provider_is_refused_with_the_install_command(name: str, sentence: str, unet_bundle: Path) -> None:
    import onnxruntime

    if PROVIDERS[name].name in onnxruntime.get_available_providers():
        pytest.skip("it is installed here")
    bundle = offcut.Bundle.open(unet_bundle)
    graphs = bundle.graphs(bundle.entry("onnxruntime"))
    with pytest.raises(EngineError, match=sentence):
        engine_module.open(graphs, EngineOptions("cuda", provider=name))
    assert not (unet_bundle / "cache").exists()


def test_a_plugin_that_cannot_be_loaded_is_refused_with_its_message(
    unet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself tries to load the plugin's library."""
    library = tmp_path / "libprovider.so"
    library.write_bytes(b"not a library")
    plugin = SimpleNamespace(get_library_path=lambda: str(library))
    monkeypatch.setitem(sys.modules, PROVIDERS["tensorrt-rtx"].plugin or "", plugin)  # type: ignore[arg-type]
    bundle = offcut.Bundle.open(unet_bundle)
    graphs = bundle.graphs(bundle.entry("onnxruntime"))
    with pytest.raises(EngineError, match=r"cannot load NvTensorRTRTXExecutionProvider: .*libprovider\.so"):
        engine_module.open(graphs, EngineOptions("cuda", provider="tensorrt-rtx"))


@pytest.mark.parametrize(
    ("engine", "provider", "sentence"),
    [
        (
            "openvino",
            "tensorrt",
            "only onnxruntime has providers, openvino has none: open onnxruntime",
        ),
        ("onnxruntime", "tensorrt", "the provider tensorrt runs on cuda, not on cpu"),
        ("onnxruntime", "hailo", "no provider 'hailo'"),
    ],
)
def test_a_provider_is_never_ignored(engine: str, provider: str, sentence: str, unet_bundle: Path) -> None:
    with pytest.raises(EngineError, match=sentence):
        offcut.Bundle.open(unet_bundle).open_pair(engine, provider=provider)
    with pytest.raises(EngineError, match=sentence):
        offcut.UNet.load(unet_bundle, engine, provider=provider)


def test_onnx_graphs_get_the_profiles_of_the_bundles_compiled_engines(
    unet_bundle: Path, copied: Callable[[Path], Path]
) -> None:
    """The profiles are those of the engines that were compiled from the same graphs."""
    from offcut.engines.bundle.manifest import ProfileEntry

    bundle = offcut.Bundle.open(copied(unet_bundle))
    entry = bundle.entry("onnxruntime")
    assert bundle.graphs(entry).profiles == ()
    sizes = Profile.of({"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 8, 16), "sequence": (7, 7, 7)})
    compiled = entry.model_copy(
        update={"key": "tensorrt-1", "engine": "tensorrt", "files": ("f",), "profiles": (ProfileEntry.of(sizes),)}
    )
    bundle.manifest.engines["tensorrt-1"] = compiled
    assert bundle.graphs(entry).profiles == (sizes,)
