"""Shape profiles: their spellings, and the choice of a profile for a size."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offcut.engines.profiles import Profile, check, in_pixels, in_shapes, select, trained_side
from offcut.errors import EngineError, ShapeError
from offcut.exporter.specs import TensorSpec

SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("sample", "float32", ("batch", 4, "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", 768)),
    )
}
NAMES = ("batch", "height", "width", "sequence")


def dims(*sizes: int) -> dict[str, int]:
    return dict(zip(NAMES, sizes, strict=True))


def pixels(**options: Any) -> tuple[Profile, ...]:
    return in_pixels(SPECS, **{"multiple": 8, **options})


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    ranges = {}
    for name in ("height", "width"):
        smallest, best, largest = sorted(draw(st.lists(st.integers(1, 12), min_size=3, max_size=3)))
        ranges[name] = (smallest, best, largest)
    return Profile.of(ranges)


SIZES = st.fixed_dictionaries({"height": st.integers(1, 14), "width": st.integers(1, 14)})
SEVERAL = st.lists(profiles(), min_size=1, max_size=5)


# ---- selection


@given(SEVERAL, SIZES)
def test_the_narrowest_covering_profile_is_selected(candidates: list[Profile], sizes: dict[str, int]) -> None:
    covering = [profile for profile in candidates if profile.covers(sizes)]
    assume(covering)
    selected = candidates[select(candidates, sizes)]
    assert selected.covers(sizes)
    assert selected.span() == min(profile.span() for profile in covering)


@given(SEVERAL, SIZES)
def test_the_error_names_sizes_that_a_profile_covers(candidates: list[Profile], sizes: dict[str, int]) -> None:
    assume(not any(profile.covers(sizes) for profile in candidates))
    with pytest.raises(ShapeError) as caught:
        select(candidates, sizes)
    named_sizes = re.findall(r"(\w+) (\d+)", str(caught.value).partition("sizes are ")[2].partition("(")[0])
    assert any(profile.covers({name: int(size) for name, size in named_sizes}) for profile in candidates)


@given(profiles(), SIZES)
def test_the_nearest_sizes_are_covered_and_a_covered_size_is_its_own(profile: Profile, sizes: dict[str, int]) -> None:
    nearest = profile.nearest(sizes)
    assert profile.covers(nearest)
    assert (nearest == sizes) is profile.covers(sizes)


def test_a_static_profile_is_preferred_to_a_dynamic_one() -> None:
    static, dynamic = pixels(static=["512x512"], dynamic="256..1024")
    assert select([dynamic, static], dims(2, 64, 64, 77)) == 1
    assert select([dynamic, static], dims(2, 64, 72, 77)) == 0


def test_the_error_names_the_requested_and_the_nearest_sizes() -> None:
    with pytest.raises(ShapeError) as caught:
        select(pixels(), dims(2, 160, 64, 77))
    assert str(caught.value) == (
        "no profile of this engine covers batch 2, height 160, width 64, sequence 77; the nearest covered sizes are "
        "batch 2, height 128, width 64, sequence 77 (build with other shapes for more)"
    )


# ---- sizes in pixels


def test_by_default_one_profile_from_256_to_1024_pixels() -> None:
    assert pixels() == (Profile(min=dims(1, 32, 32, 77), opt=dims(2, 64, 64, 77), max=dims(8, 128, 128, 308)),)


def test_a_static_size_is_width_by_height_in_pixels_and_one_guided_image() -> None:
    (profile,) = pixels(static=["512x768"])
    assert profile.min["width"] == profile.max["width"] == 64
    assert profile.min["height"] == profile.max["height"] == 96
    assert (profile.min["batch"], profile.opt["batch"], profile.max["batch"]) == (2, 2, 2)
    (unguided,) = pixels(static=["512x768"], guidance=False)
    assert unguided.max["batch"] == 1


def test_several_static_sizes_and_a_dynamic_range() -> None:
    result = pixels(static=["512x512", "768x512"], dynamic="512..1024")
    assert [profile.span() > 1000 for profile in result] == [False, False, True]
    assert (result[2].min["height"], result[2].opt["height"], result[2].max["height"]) == (64, 64, 128)


def test_the_batch_is_twice_the_number_of_guided_images() -> None:
    for profile in pixels(static=["512x512"], dynamic="256..512", max_batch=4):
        assert (profile.min["batch"], profile.opt["batch"], profile.max["batch"]) == (1, 2, 8)
    assert pixels(max_batch=3, guidance=False)[0].max["batch"] == 3


def test_the_range_is_tuned_for_the_models_own_size() -> None:
    assert pixels(native=1024)[0].opt["height"] == 128
    assert pixels(native=2048)[0].max["height"] == 256
    assert pixels(native=1024, dynamic="256..768")[0].opt["height"] == 96


@pytest.mark.parametrize(("sample_size", "side"), [(64, 512), ([96, 128], 1024), (None, 512)])
def test_the_models_own_size_is_in_its_config(sample_size: Any, side: int) -> None:
    assert trained_side(sample_size) == side


def test_another_vae_has_another_scale() -> None:
    assert pixels(static=["512x512"], scale=16)[0].opt["height"] == 32


def test_a_dimension_that_is_fixed_is_in_no_profile() -> None:
    assert set(pixels(fixed=("batch", "sequence"))[0].opt) == {"height", "width"}
    assert set(in_pixels({"sample": TensorSpec("sample", "float32", ("batch", 4, 64, 64))}, multiple=8)[0].opt) == {
        "batch"
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"static": ["500x512"]}, "--static 500x512: 500 pixels are not a multiple of 64, .*; the nearest is 512"),
        ({"static": ["0x512"]}, "--static 0x512: 0 pixels are .* the nearest is 64"),
        ({"static": ["512"]}, "--static 512 is not a size: write WIDTHxHEIGHT in pixels, e.g. 512x768"),
        ({"static": ["-512x512"]}, "is not a size"),
        ({"dynamic": "256-1024"}, r"--dynamic 256-1024 is not a range: write SMALLEST\.\.LARGEST in pixels"),
        ({"dynamic": "1024..256"}, "--dynamic 1024..256 runs backwards: write the smaller side first"),
        ({"dynamic": "100..256"}, "100 pixels are not a multiple of 64, .*; the nearest is 128"),
        ({"max_batch": 0}, "--max-batch is 0: give a number of images, at least 1"),
    ],
)
def test_an_invalid_size_is_refused_with_a_valid_one(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ShapeError, match=sentence):
        pixels(**options)


def test_a_size_cannot_be_chosen_where_the_export_has_fixed_it() -> None:
    with pytest.raises(EngineError, match="has a fixed height and width: leave --static and --dynamic out"):
        pixels(fixed=("height",), static=["512x512"])


def test_a_dimension_without_a_known_range_is_named() -> None:
    with pytest.raises(EngineError, match="no range is known for frames: give --min-shapes"):
        in_pixels({"sample": TensorSpec("sample", "float32", ("batch", "frames"))}, multiple=8)


# ---- trtexec's spelling


def shapes(batch: int, side: int, sequence: int = 77) -> str:
    return f"sample:{batch}x4x{side}x{side},timestep:{batch},encoder_hidden_states:{batch}x{sequence}x768"


def test_trtexecs_spelling_gives_the_same_profile() -> None:
    profile = in_shapes(
        SPECS, multiple=8, min_shapes=shapes(1, 32), opt_shapes=shapes(2, 64), max_shapes=shapes(8, 128, 308)
    )
    assert (profile,) == pixels()


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ((shapes(1, 32), None, shapes(8, 64)), "--opt-shapes must be given too"),
        ((None, shapes(2, 64), None), "--min-shapes and --max-shapes must be given too"),
        ((shapes(1, 32), shapes(2, 30), shapes(8, 64)), "--opt-shapes: the latent's height is 30, .* nearest is 32"),
        (
            (shapes(4, 32), shapes(2, 64), shapes(8, 64)),
            "a profile's batch has min 4, opt 2 and max 8: give 1 <= min",
        ),
        (
            ("sample:1x4", shapes(2, 64), shapes(8, 64)),
            "--min-shapes gives sample, but this graph's inputs are sample",
        ),
        (("sample=1x4", shapes(2, 64), shapes(8, 64)), "--min-shapes: 'sample=1x4' is not a shape: write NAME:AxBxC"),
        ((shapes(1, 32) + ",x:1", shapes(2, 64), shapes(8, 64)), "encoder_hidden_states, x, but this graph's inputs"),
    ],
)
def test_invalid_trtexec_shapes_are_refused(texts: tuple[str | None, str | None, str | None], sentence: str) -> None:
    smallest, best, largest = texts
    with pytest.raises(ShapeError, match=sentence):
        in_shapes(SPECS, multiple=8, min_shapes=smallest, opt_shapes=best, max_shapes=largest)


# ---- shapes of a graph


def test_a_cached_feature_has_the_latents_shape_divided() -> None:
    feature = TensorSpec("deep_feature_0", "float32", ("batch", 320, "height/4", "width"))
    (profile,) = pixels()
    assert profile.shapes([SPECS["timestep"], feature]) == {
        "timestep": ((1,), (2,), (8,)),
        "deep_feature_0": ((1, 320, 8, 32), (2, 320, 16, 64), (8, 320, 32, 128)),
    }


@pytest.mark.parametrize(
    ("ranges", "sentence"),
    [
        (
            {"batch": (1, 2, 8)},
            "a profile gives batch, but this graph's dynamic dimensions are batch, height, width, sequence: give",
        ),
        (dict.fromkeys(NAMES, (8, 8, 12)), "the latent (height|width) 12, .* multiple of 8: the nearest is 16"),
        ({**dict.fromkeys(NAMES, (8, 8, 8)), "batch": (0, 1, 1)}, "batch has min 0, opt 1 and max 1"),
    ],
)
def test_a_profile_that_does_not_fit_the_graph_is_refused(ranges: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ShapeError, match=sentence):
        check([Profile.of(ranges)], SPECS, multiple=8)


def test_a_graph_without_dynamic_dimensions_has_a_profile_that_covers_it() -> None:
    static = {"sample": TensorSpec("sample", "float32", (2, 4, 64, 64))}
    result = in_pixels(static, multiple=8)
    check(result, static, multiple=8)
    assert result[0].shapes(static.values()) == {"sample": ((2, 4, 64, 64),) * 3}
    assert select(result, {}) == 0


VIDEO = {
    "sample": TensorSpec("sample", "float32", ("batch", 4, "frames", "height", "width")),
    "encoder_hidden_states": TensorSpec("encoder_hidden_states", "float32", ("batch*frames", "sequence", 768)),
}


def test_a_videos_profiles_take_its_own_length_and_one_guided_video() -> None:
    static, dynamic = in_pixels(VIDEO, multiple=8, static=["512x512"], dynamic="256..512", frames=16)
    assert {sizes["frames"] for profile in (static, dynamic) for sizes in (profile.min, profile.max)} == {16}
    assert (dynamic.min["batch"], dynamic.opt["batch"], dynamic.max["batch"]) == (1, 2, 2)
    assert static.shapes(VIDEO.values())["encoder_hidden_states"][2] == (32, 4 * 77, 768)
