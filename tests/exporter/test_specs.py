from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offcut.errors import InternalError, ShapeError
from offcut.exporter.specs import Factors, TensorSpec, factors, is_dim, solve, symbols

SPECS = {
    "sample": TensorSpec("sample", "float32", ("batch", 4, "height", "width")),
    "timestep": TensorSpec("timestep", "float32", ("batch",)),
    "encoder_hidden_states": TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", 16)),
}
SHAPES = {"sample": (2, 4, 16, 24), "timestep": (2,), "encoder_hidden_states": (2, 7, 16)}
DIMS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 64),
        "height": st.integers(1, 64).map(lambda n: 8 * n),
        "width": st.integers(1, 64).map(lambda n: 8 * n),
        "sequence": st.integers(1, 512),
    }
)


@given(DIMS)
def test_solving_undoes_resolving(dims: dict[str, int]) -> None:
    shapes = {name: spec.resolve(dims) for name, spec in SPECS.items()}
    assert solve(SPECS, shapes, multiple=8) == dims


@given(DIMS, st.sampled_from([1, 2, 4, 8]))
def test_a_divided_dimension_is_that_part_of_the_latent(dims: dict[str, int], divisor: int) -> None:
    feature = TensorSpec("feature", "float32", ("batch", 32, f"height/{divisor}", f"width/{divisor}"))
    assert feature.resolve(dims) == (dims["batch"], 32, dims["height"] // divisor, dims["width"] // divisor)


@given(
    st.integers(1, 99),
    st.lists(st.sampled_from(["batch", "frames", "height"]), min_size=1, max_size=2, unique=True),
    st.integers(1, 9),
)
def test_a_dimension_is_read_as_it_was_written(number: int, names: list[str], divisor: int) -> None:
    made = Factors(number, tuple(names), divisor)
    assert factors(str(made)) == made
    assert is_dim(str(made))


@pytest.mark.parametrize(
    "text", ["channels", "batch*", "*frames", "0*frames", "height/0", "batch-frames", "s0*s1", "7"]
)
def test_what_offcut_does_not_write_is_no_dimension(text: str) -> None:
    assert not is_dim(text)


VIDEO = {
    "sample": TensorSpec("sample", "float32", ("batch", 4, "frames", "height", "width")),
    "timestep": TensorSpec("timestep", "float32", ("batch",)),
    "encoder_hidden_states": TensorSpec("encoder_hidden_states", "float32", ("batch*frames", "sequence", 16)),
}


@given(DIMS, st.integers(1, 64), st.sets(st.sampled_from(["batch", "frames", "height", "sequence"])))
def test_solving_undoes_resolving_with_products_whatever_is_fixed(
    dims: dict[str, int], frames: int, known: set[str]
) -> None:
    dims = {**dims, "frames": frames}
    fixed = {name: dims[name] for name in known}
    specs = {name: spec.fixed(fixed) for name, spec in VIDEO.items()}
    shapes = {name: spec.resolve(dims) for name, spec in VIDEO.items()}
    assert {name: spec.resolve(dims) for name, spec in specs.items()} == shapes
    left = {name: size for name, size in dims.items() if name not in known}
    assert solve(specs, shapes, multiple=8) == left
    assert set(symbols(specs.values())) == set(left)


def test_a_product_with_one_factor_fixed_keeps_the_other() -> None:
    text = VIDEO["encoder_hidden_states"]
    assert text.fixed({"batch": 2}).shape == ("2*frames", "sequence", 16)
    assert text.fixed({"frames": 14}).shape == ("14*batch", "sequence", 16)
    assert text.fixed({"batch": 2, "frames": 14}).shape == (28, "sequence", 16)


def test_a_product_that_the_latent_contradicts_is_refused() -> None:
    shapes = {"sample": (2, 4, 3, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 7, 16)}
    with pytest.raises(ShapeError, match=r"encoder_hidden_states has shape \[2, 7, 16\], .* with batch\*frames = 6"):
        solve(VIDEO, shapes)


def test_symbols_are_listed_once_in_order_of_first_use_and_undivided() -> None:
    divided = TensorSpec("feature", "float32", ("height/2", "depth"))
    assert symbols([*SPECS.values(), divided]) == ("batch", "height", "width", "sequence", "depth")


def test_a_spec_prints_as_name_dtype_and_shape() -> None:
    assert str(SPECS["sample"]) == "sample: float32[batch, 4, height, width]"


def test_a_symbol_that_nobody_gave_is_our_own_fault() -> None:
    with pytest.raises(InternalError, match="sequence"):
        SPECS["encoder_hidden_states"].resolve({"batch": 1})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"timestep": None}, "needs timestep, which the pipeline did not pass"),
        ({"text_embeds": (2, 8)}, "no input named text_embeds; it has sample, timestep, encoder_hidden_states"),
        ({"sample": (2, 4, 16)}, r"sample has shape \[2, 4, 16\], but the engine takes \['batch', 4, "),
        ({"sample": (2, 9, 16, 24)}, r"sample has shape \[2, 9, 16, 24\]"),
        ({"timestep": (1,)}, r"timestep has shape \[1\], .* with batch = 2"),
        ({"encoder_hidden_states": (4, 7, 16)}, r"encoder_hidden_states has shape \[4, 7, 16\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(change: dict[str, tuple[int, ...] | None], sentence: str) -> None:
    shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape is not None}
    with pytest.raises(ShapeError, match=sentence):
        solve(SPECS, shapes, multiple=8)


@given(st.integers(1, 300), st.sampled_from(["height", "width"]))
def test_a_latent_that_cannot_be_halved_is_refused_with_the_nearest_size_that_can(size: int, side: str) -> None:
    dims = {"batch": 1, "height": 16, "width": 16, "sequence": 7, side: size}
    shapes = {name: spec.resolve(dims) for name, spec in SPECS.items()}
    if size % 8 == 0:
        assert solve(SPECS, shapes, multiple=8)[side] == size
        return
    with pytest.raises(ShapeError, match=f"latent's {side} is {size}.* multiple of 8") as caught:
        solve(SPECS, shapes, multiple=8)
    nearest = int(str(caught.value).rsplit(" ", 1)[1])
    assert nearest > 0
    assert nearest % 8 == 0
    assert abs(nearest - size) == min(abs(valid - size) for valid in range(8, 400, 8))


@pytest.mark.parametrize("dim", ["batch", "height", "width", "sequence"])
def test_an_empty_dimension_is_refused(dim: str) -> None:
    dims = {"batch": 2, "height": 16, "width": 16, "sequence": 7, dim: 0}
    shapes = {name: spec.resolve(dims) for name, spec in SPECS.items()}
    with pytest.raises(ShapeError, match="empty"):
        solve(SPECS, shapes, multiple=8)
