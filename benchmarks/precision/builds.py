"""The builds that ``offcut bench precision`` compares: CPU engines in each of their precisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engines.builder.build import build
from ...engines.bundle.bundle import Bundle
from ...engines.bundle.manifest import EngineEntry
from ...errors import UserError
from ...runtime.calibration import Calibration
from ..progress import indented


@dataclass(frozen=True)
class Build:
    """An engine with the precision of its graphs.

    Attributes:
        computed_in: the precision of an engine's hint, in which it computes; None for the precision of the graphs.
    """

    engine: str
    precision: str = "fp32"
    computed_in: str | None = None

    @property
    def name(self) -> str:
        """Name of the precision, unique within an engine, e.g. ``fp32 computed in bf16``."""
        return f"{self.precision} computed in {self.computed_in}" if self.computed_in else self.precision

    @property
    def computes_in(self) -> str:
        """Value for ``offcut.load``'s ``inference_precision``."""
        return self.computed_in or self.precision


EXACT = "fp32"

BUILDS = (
    Build("onnxruntime"),
    Build("onnxruntime", "int8"),
    Build("openvino"),
    Build("openvino", computed_in="bf16"),
    Build("openvino", "int8"),
)
"""All builds; of each engine, fp32 comes before the builds that are compared with it."""


def builds_of(engines: Sequence[str], precisions: Sequence[str]) -> list[Build]:
    """Return the builds with these engines and low precisions, and the fp32 build of each engine.

    Args:
        engines, precisions: names in `BUILDS`; empty for all.

    Raises:
        UserError: a name is not in `BUILDS`, or none of these engines computes in these precisions.
    """
    for names, known in (
        (engines, {b.engine: None for b in BUILDS}),
        (precisions, {b.computes_in: None for b in BUILDS if b.computes_in != EXACT}),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"{name} is not compared: choose {' or '.join(known)}")
    chosen = [
        b
        for b in BUILDS
        if (not engines or b.engine in engines) and (not precisions or b.computes_in in (EXACT, *precisions))
    ]
    if all(b.computes_in == EXACT for b in chosen):
        raise UserError(f"{' and '.join(engines)} cannot compute in {' or '.join(precisions)}: omit --engine")
    return chosen


def builds_in(bundle: Bundle, engines: Sequence[str] = ()) -> list[tuple[Build, EngineEntry]]:
    """Return the builds in a bundle with these engines, or with all engines if none is given.

    Raises:
        UserError: the bundle has no such build.
    """
    manifest = bundle.manifest
    builds = [
        (Build(entry.engine, manifest.variants[entry.variant].precision, entry.inference_precision), entry)
        for entry in manifest.engines.values()
        if not engines or entry.engine in engines
    ]
    if not builds:
        raise UserError(f"{bundle.path} has builds of {', '.join(bundle.engines)}, not of {' or '.join(engines)}")
    return builds


def make(model: Path, out: Path, builds: Sequence[Build], cut: str, progress: Callable[[str], None]) -> Bundle:
    """Add the builds to a bundle and open the bundle; int8 is calibrated on the model's own prompts."""
    for target in builds:
        progress(f"build {target.engine} {target.name}")
        build(
            model,
            out,
            cuts=[cut],
            engine=target.engine,
            precision=target.precision,
            inference_precision=target.computed_in,
            calibration=Calibration(),
            progress=indented(progress),
        )
    return Bundle.open(out)
