"""Parity: the engine against its model, and the shallow graph against the full one.

The model's answers are eager PyTorch's, or those of the ONNX file that the bundle was built from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import ParityError
from ...exporter.trace.reference import Reference, read_reference
from ..base import BoundPair, EngineOptions, EnginePair
from ..bundle.bundle import Bundle, check_fits, devices_of, open_entry
from ..bundle.manifest import ComponentEntry, EngineEntry
from ..bundle.networks import component_error
from ..precision import Bounds, bounds

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        error: the largest difference found; relative to the reference's largest value where ``relative``.
        bound: the largest allowed.
        at_least: the bound is a lower one: the difference must be larger (a feature that is read must matter).
    """

    name: str
    error: float
    bound: float
    relative: bool
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.error > self.bound if self.at_least else self.error <= self.bound


def verify(pair: EnginePair, reference: Reference, limits: Bounds, against: str = "PyTorch") -> list[Check]:
    """Run a pair on the reference's inputs and compare.

    For the full graph and for each cut given fresh features: the difference from the reference. For each cut also:
    the difference from the full graph, and that the features are read at all.

    Args:
        against: whose answer the reference is.
    """
    bound_pair = pair.prepare({name: tuple(tensor.shape) for name, tensor in reference.inputs.items()})
    try:
        return _checks(pair, bound_pair, reference, limits, against)
    finally:
        bound_pair.close()


def verify_entry(bundle: Bundle, entry: EngineEntry, pair: EnginePair) -> list[Check]:
    """Hold an opened engine of a bundle against the bundle's answers, at every size that they were kept for."""
    variant = bundle.manifest.variants[entry.variant]
    limits = bounds(entry.engine, variant.precision, entry.inference_precision, pair.device.type)
    checks = []
    for name in entry.references or (variant.reference,):
        reference = read_reference(bundle.path / name)
        found = verify(pair, reference, limits, bundle.manifest.source.reference)
        if len(entry.references) > 1:
            size = "x".join(str(size) for size in reference.inputs["sample"].shape)
            found = [replace(check, name=f"{check.name} at {size}") for check in found]
        checks += found
    return checks


def verify_bundle(
    bundle: Bundle, progress: Callable[[str], None] = lambda step: None, device: str | None = None
) -> dict[str, list[Check]]:
    """Check every file of a bundle and hold each of its engines against its reference.

    Args:
        progress: called with a sentence as each stage begins.
        device: to verify on; None for the first that an engine of the bundle runs on here.

    Raises:
        BundleError: a file is damaged.
        EngineError: an engine cannot be opened here.
    """
    progress("check digests")
    bundle.verify_files()
    results = {}
    for key, entry in bundle.manifest.engines.items():
        progress(f"verify {key}")
        where = device or next(iter(devices_of(entry)), "cpu")
        pair = open_entry(bundle, entry, EngineOptions(where, inference_precision=entry.inference_precision))
        try:
            results[key] = verify_entry(bundle, entry, pair)
        finally:
            pair.close()
    for component in bundle.manifest.components:
        for entry in component.engines:
            key = f"{component.name} of {entry.key}"
            progress(f"verify {key}")
            results[key] = [_component_check(bundle, component, entry, device)]
    return results


def _component_check(bundle: Bundle, component: ComponentEntry, entry: EngineEntry, device: str | None) -> Check:
    where = device or next(iter(devices_of(entry)), "cpu")
    check_fits(entry, where)
    error, limits = component_error(bundle.path, component, entry.engine, EngineOptions(where), entry)
    against = bundle.manifest.source.reference
    return Check(f"{component.name} against {against}", error, limits.parity, limits.relative)


def require(checks: list[Check], what: str) -> None:
    """Raise for the first check that failed.

    Raises:
        ParityError: with the figure, the bound, and what to do.
    """
    for check in checks:
        if not check.passed:
            sign = "more than" if check.at_least else "at most"
            raise ParityError(
                f"{what}: {check.name} differs by {check.error:.3g}, but {sign} {check.bound:.3g} is needed; "
                "try another engine or precision, and please report it"
            )


def _checks(pair: EnginePair, bound: BoundPair, reference: Reference, limits: Bounds, against: str) -> list[Check]:
    for name, tensor in reference.inputs.items():
        bound.buffers[name].copy_(tensor)
    bound.full()
    full = bound.buffers["noise_pred"].float().cpu().clone()
    expected = reference.noise_pred.float()

    def parity(name: str, got: torch.Tensor) -> Check:
        error = _relative(got, expected) if limits.relative else float((got - expected).abs().max())
        return Check(f"{name} against {against}", error, limits.parity, limits.relative)

    checks = [parity("full", full)]
    for cut, features in pair.cuts.items():
        # The shallow graph must write every value itself.
        bound.buffers["noise_pred"].fill_(float("nan"))
        bound.shallow(cut)
        shallow = bound.buffers["noise_pred"].float().cpu().clone()
        checks.append(parity(f"shallow {cut}", shallow))
        checks.append(Check(f"shallow {cut} against full", _relative(shallow, full), limits.across, True))
        for feature in features:
            kept = bound.buffers[feature].clone()
            bound.buffers[feature].zero_()
            bound.shallow(cut)
            changed = bound.buffers["noise_pred"].float().cpu()
            checks.append(Check(f"shallow {cut} without {feature}", _relative(changed, full), 0.0, True, at_least=True))
            bound.buffers[feature].copy_(kept)
    return checks


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value; infinite where a value is not finite, so that NaN never passes."""
    import torch

    if not torch.isfinite(got).all():
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max())
