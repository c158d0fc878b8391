"""Shape profiles: the ranges of sizes that an engine is compiled for.

Users write image pixels, width before height (``512x768`` is a portrait). Profiles hold the latent's sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import EngineError, ShapeError
from ..exporter.specs import Shape, TensorSpec, solve, symbols

Dims = Mapping[str, int]
Range = tuple[int, int, int]
"""Smallest, best and largest size of one dimension."""

VAE_SCALE = 8
"""Image pixels per latent pixel, along one side, in every Stable Diffusion."""

# CLIP gives 77 tokens for every prompt; pipelines for long prompts join up to a few such windows. Fewer than 77 never
# occur, and the narrower the range, the better the kernels that suit all of it.
_SEQUENCE: Range = (77, 77, 4 * 77)
_PIXELS = (256, 1024)
_IMAGES = 4


@dataclass(frozen=True)
class Profile:
    """An inclusive range of sizes, and the size within it that the engine is tuned for.

    Attributes:
        min, opt, max: size of each dynamic dimension; ``height`` and ``width`` are the latent's.
    """

    min: Dims
    opt: Dims
    max: Dims

    @classmethod
    def of(cls, ranges: Mapping[str, Range]) -> Profile:
        """Make a profile from each dimension's smallest, best and largest size."""
        smallest, best, largest = ({name: sizes[place] for name, sizes in ranges.items()} for place in range(3))
        return cls(smallest, best, largest)

    def covers(self, dims: Dims) -> bool:
        return all(self.min[name] <= dims[name] <= self.max[name] for name in self.min)

    def nearest(self, dims: Dims) -> dict[str, int]:
        """Return the covered sizes that are closest to these."""
        return {name: min(max(dims[name], self.min[name]), self.max[name]) for name in self.min}

    def span(self) -> int:
        """Return the number of sizes that the profile covers; a static profile, the fastest kind, covers one."""
        sizes = 1
        for name in self.min:
            sizes *= self.max[name] - self.min[name] + 1
        return sizes

    def shapes(self, specs: Iterable[TensorSpec]) -> dict[str, tuple[Shape, Shape, Shape]]:
        """Return the smallest, best and largest shape of each input, cached features included."""
        specs = list(specs)
        return {spec.name: (spec.resolve(self.min), spec.resolve(self.opt), spec.resolve(self.max)) for spec in specs}


def select(profiles: Sequence[Profile], dims: Dims) -> int:
    """Return the index of the profile for these sizes: the narrowest that covers them.

    Among equally narrow profiles the one tuned for the nearest sizes is taken.

    Raises:
        ShapeError: no profile covers them; the message names the nearest covered sizes.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.covers(dims)]
    if fitting:
        return min(fitting, key=lambda index: (profiles[index].span(), _distance(profiles[index].opt, dims), index))
    nearest = min((profile.nearest(dims) for profile in profiles), key=lambda sizes: _distance(sizes, dims))
    requested, valid = (", ".join(f"{name} {sizes[name]}" for name in nearest) for sizes in (dims, nearest))
    raise ShapeError(
        f"no profile of this engine covers {requested}; the nearest covered sizes are {valid} "
        "(build with other shapes for more)"
    )


def in_pixels(
    inputs: Mapping[str, TensorSpec],
    *,
    multiple: int,
    fixed: Iterable[str] = (),
    static: Sequence[str] = (),
    dynamic: str | None = None,
    max_batch: int | None = None,
    guidance: bool = True,
    native: int = 512,
    scale: int = VAE_SCALE,
    frames: int | None = None,
) -> tuple[Profile, ...]:
    """Return profiles for image sizes in pixels.

    Each static size gets a profile. A dynamic profile is added if it is requested or if there is no static size.

    Args:
        inputs: inputs of the full graph.
        multiple: height and width of the latent must be multiples of this number.
        fixed: dimensions that the export fixes although these specs do not.
        static: sizes of images, each ``WIDTHxHEIGHT`` in pixels. Such a profile takes one image per call, or up to
            ``max_batch`` if that is given.
        dynamic: range of an image's sides, ``SMALLEST..LARGEST`` in pixels; by default 256..1024.
        max_batch: images per call; by default 4 for the dynamic profile, and 1 for videos. With guidance the UNet's
            batch is twice this number.
        guidance: whether classifier-free guidance doubles the UNet's batch. Dynamic profiles cover a batch of 1 anyway.
        native: side in pixels of the images that the model was trained on; the dynamic profile is tuned for it.
        scale: image pixels per latent pixel.
        frames: number of frames that the UNet was trained on, if it makes videos.

    Raises:
        ShapeError: a size is malformed, or not a multiple of what the UNet needs.
        EngineError: a dimension was fixed in the export, or has no known range.
    """
    free = [name for name in symbols(inputs.values()) if name not in set(fixed)]
    if (static or dynamic) and not {"height", "width"} <= set(free):
        raise EngineError("this export has a fixed height and width: leave --static and --dynamic out, or export again")
    if max_batch is not None and max_batch < 1:
        raise ShapeError(f"--max-batch is {max_batch}: give a number of images, at least 1")
    per = 2 if guidance else 1
    frame_range = {} if frames is None else {"frames": (frames,) * 3}
    profiles = []
    for size in static:
        batch = (per, per, per) if max_batch is None else (1, per, per * max_batch)
        width, height = _static(size, multiple, scale)
        profiles.append(_profile(free, batch=batch, height=(height,) * 3, width=(width,) * 3, **frame_range))
    if dynamic or not static:
        side = _dynamic(dynamic, multiple, native, scale)
        batch = (1, per, per * (max_batch or (_IMAGES if frames is None else 1)))
        profiles.append(_profile(free, batch=batch, height=side, width=side, **frame_range))
    return tuple(profiles)


def in_shapes(
    inputs: Mapping[str, TensorSpec],
    *,
    multiple: int,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
) -> Profile:
    """Return one profile from trtexec's spelling, e.g. ``sample:1x4x64x64,timestep:1,encoder_hidden_states:1x77x768``.

    Args:
        inputs: inputs of the full graph; each of the three texts must name all of them, in the latent's sizes.
        multiple: height and width of the latent must be multiples of this number.

    Raises:
        ShapeError: one of the three is missing, malformed, or does not fit the graph.
    """
    options = {"--min-shapes": min_shapes, "--opt-shapes": opt_shapes, "--max-shapes": max_shapes}
    if missing := [option for option, text in options.items() if not text]:
        raise ShapeError(f"{' and '.join(missing)} must be given too: a profile needs min, opt and max shapes")
    smallest, best, largest = (_dims(inputs, multiple, option, text or "") for option, text in options.items())
    profile = Profile(smallest, best, largest)
    check([profile], inputs, multiple)
    return profile


def trained_side(sample_size: int | Sequence[int] | None, scale: int = VAE_SCALE) -> int:
    """Return the side in pixels of the images that a UNet was trained on, from ``sample_size`` in its config."""
    if not sample_size:
        return 512
    return (sample_size if isinstance(sample_size, int) else max(sample_size)) * scale


def check(profiles: Iterable[Profile], inputs: Mapping[str, TensorSpec], multiple: int) -> None:
    """Check that profiles fit a graph.

    Raises:
        ShapeError: a profile names other dimensions than the graph's dynamic ones, has a minimum above its maximum, or
            has a height or width that the UNet cannot take.
    """
    free = symbols(inputs.values())
    for profile in profiles:
        for sizes in (profile.min, profile.opt, profile.max):
            if set(sizes) != set(free):
                raise ShapeError(
                    f"a profile gives {', '.join(sizes) or 'no dimension'}, but this graph's dynamic dimensions are "
                    f"{', '.join(free) or 'none'}: give just those"
                )
            for side in {"height", "width"} & set(free):
                if sizes[side] % multiple:
                    raise ShapeError(
                        f"a profile has the latent {side} {sizes[side]}, but this UNet needs a multiple of "
                        f"{multiple}: the nearest is {_round(sizes[side], multiple)}"
                    )
        for name in free:
            if not 1 <= profile.min[name] <= profile.opt[name] <= profile.max[name]:
                raise ShapeError(
                    f"a profile's {name} has min {profile.min[name]}, opt {profile.opt[name]} and max "
                    f"{profile.max[name]}: give 1 <= min <= opt <= max"
                )


def _profile(free: Iterable[str], **known: Range) -> Profile:
    ranges = {"sequence": _SEQUENCE, **known}
    if unknown := [name for name in free if name not in ranges]:
        raise EngineError(f"no range is known for {', '.join(unknown)}: give --min-shapes, --opt-shapes, --max-shapes")
    return Profile.of({name: ranges[name] for name in free})


def _static(size: str, multiple: int, scale: int) -> tuple[int, int]:
    """Return the latent's width and height."""
    match = re.fullmatch(r"(\d+)x(\d+)", size.strip())
    if match is None:
        raise ShapeError(f"--static {size} is not a size: write WIDTHxHEIGHT in pixels, e.g. 512x768")
    width, height = (_latent(f"--static {size}", int(side), multiple, scale) for side in match.groups())
    return width, height


def _dynamic(sides: str | None, multiple: int, native: int, scale: int) -> Range:
    """Return the latent's smallest, best and largest side."""
    if sides is None:
        smallest, best, largest = (_round(side // scale, multiple) for side in (_PIXELS[0], native, _PIXELS[1]))
        return min(smallest, best), best, max(largest, best)
    match = re.fullmatch(r"(\d+)\.\.(\d+)", sides.strip())
    if match is None:
        raise ShapeError(f"--dynamic {sides} is not a range: write SMALLEST..LARGEST in pixels, e.g. 256..1024")
    smallest, largest = (_latent(f"--dynamic {sides}", int(side), multiple, scale) for side in match.groups())
    if smallest > largest:
        raise ShapeError(f"--dynamic {sides} runs backwards: write the smaller side first")
    return smallest, min(max(_round(native // scale, multiple), smallest), largest), largest


def _latent(option: str, pixels: int, multiple: int, scale: int) -> int:
    step = multiple * scale
    if pixels % step or not pixels:
        raise ShapeError(
            f"{option}: {pixels} pixels are not a multiple of {step}, which this UNet needs; "
            f"the nearest is {_round(pixels, step)}"
        )
    return pixels // scale


def _dims(inputs: Mapping[str, TensorSpec], multiple: int, option: str, text: str) -> Dims:
    shapes: dict[str, Shape] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([^:]+):(\d+(?:x\d+)*)", part.strip())
        if match is None:
            raise ShapeError(f"{option}: {part.strip()!r} is not a shape: write NAME:AxBxC, e.g. sample:1x4x64x64")
        shapes[match[1]] = tuple(int(size) for size in match[2].split("x"))
    if set(shapes) != set(inputs):
        raise ShapeError(f"{option} gives {', '.join(shapes)}, but this graph's inputs are {', '.join(inputs)}")
    try:
        return solve(inputs, shapes, multiple)
    except ShapeError as error:
        raise ShapeError(f"{option}: {error}") from error


def _round(size: int, multiple: int) -> int:
    """Return the nearest multiple that is not 0."""
    return max(multiple, (size + multiple // 2) // multiple * multiple)


def _distance(sizes: Dims, dims: Dims) -> float:
    """Return the distance between two sets of sizes, each dimension as a ratio."""
    return sum(max(sizes[name], dims[name]) / min(sizes[name], dims[name]) - 1 for name in sizes)
