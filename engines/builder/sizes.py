"""The sizes that a user asks an engine for, in pixels or in trtexec's spelling, before the graph's inputs are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ShapeError
from ...exporter.specs import TensorSpec
from ..profiles import Profile, in_pixels, in_shapes


@dataclass(frozen=True)
class Sizes:
    """What ``profiles.in_pixels`` or ``profiles.in_shapes`` makes profiles from; see there for each.

    Attributes:
        static: ``WIDTHxHEIGHT`` in pixels, several.
        dynamic: ``SMALLEST..LARGEST`` side in pixels.
        max_batch: images a call.
        min_shapes, opt_shapes, max_shapes: of the graph's inputs, as trtexec takes them; instead of the others.
    """

    static: tuple[str, ...] = ()
    dynamic: str | None = None
    max_batch: int | None = None
    min_shapes: str | None = None
    opt_shapes: str | None = None
    max_shapes: str | None = None

    def __bool__(self) -> bool:
        """Whether anything was asked."""
        return self != Sizes()

    def profiles(
        self, inputs: Mapping[str, TensorSpec], *, multiple: int, native: int, frames: int | None = None
    ) -> tuple[Profile, ...]:
        """The profiles for a graph; none if nothing was asked.

        Args:
            inputs: of the full graph.
            multiple: of the latent's height and width.
            native: the side that the model was trained on, in pixels.
            frames: the length that it was trained on, where it makes videos.

        Raises:
            ShapeError: a size is written wrongly, cannot be, or both spellings are mixed.
        """
        easy = bool(self.static or self.dynamic or self.max_batch)
        shapes = (self.min_shapes, self.opt_shapes, self.max_shapes)
        if not any(shapes):
            if not easy:
                return ()
            return in_pixels(
                inputs,
                multiple=multiple,
                static=self.static,
                dynamic=self.dynamic,
                max_batch=self.max_batch,
                native=native,
                frames=frames,
            )
        if easy:
            raise ShapeError(
                "--min-shapes, --opt-shapes and --max-shapes give a profile by themselves: "
                "leave --static, --dynamic and --max-batch out"
            )
        smallest, best, largest = shapes
        profile = in_shapes(inputs, multiple=multiple, min_shapes=smallest, opt_shapes=best, max_shapes=largest)
        return (profile,)
