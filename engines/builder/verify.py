"""Parity checks: each engine against its model, and each shallow graph against the full graph.

The model's outputs are eager PyTorch's, or those of the foreign ONNX that the bundle was built from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ParityError
from ...exporter.trace.reference import Reference, read_reference
from ..base import BoundPair, EngineOptions, EnginePair, Progress
from ..bundle.bundle import Bundle, check_fits, devices_of, open_entry
from ..bundle.manifest import ComponentEntry, EngineEntry
from ..bundle.networks import network_graphs
from ..precision import Bounds, bounds
from ..registry import engine

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ParityCheck:
    """One comparison of two outputs.

    Attributes:
        name: what was compared.
        error: largest difference; relative to the reference's largest value if ``relative``.
        bound: largest difference allowed.
        at_least: whether the error must exceed the bound: zeroing a cached feature must change the output.
    """

    name: str
    error: float
    bound: float
    relative: bool
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.error > self.bound if self.at_least else self.error <= self.bound


def verify(pair: EnginePair, reference: Reference, limits: Bounds, against: str = "PyTorch") -> list[ParityCheck]:
    """Run a pair on the reference's inputs and compare its outputs.

    The full graph, and each shallow graph given fresh features, is compared with the reference. Each shallow graph is
    also compared with the full graph, and each feature is zeroed to see that the shallow graph reads it.

    Args:
        against: name of the reference in the checks.
    """
    bound_pair = pair.prepare({name: tuple(tensor.shape) for name, tensor in reference.inputs.items()})
    try:
        return _checks(pair, bound_pair, reference, limits, against)
    finally:
        bound_pair.close()


def verify_entry(bundle: Bundle, entry: EngineEntry, pair: EnginePair) -> list[ParityCheck]:
    """Compare an opened engine with the bundle's references, at every size of a reference."""
    variant = bundle.manifest.variants[entry.variant]
    limits = bounds(entry.engine, variant.precision, entry.inference_precision, pair.device.type)
    checks = []
    for name in entry.references or (variant.reference,):
        reference = read_reference(bundle.path / name)
        size_checks = verify(pair, reference, limits, bundle.manifest.source.reference)
        if len(entry.references) > 1:
            size = "x".join(str(size) for size in reference.inputs["sample"].shape)
            size_checks = [replace(check, name=f"{check.name} at {size}") for check in size_checks]
        checks += size_checks
    return checks


def verify_network(
    entry: ComponentEntry,
    name: str,
    options: EngineOptions,
    root: Path,
    against: str,
    compiled: EngineEntry | None = None,
    compiled_root: Path | None = None,
) -> ParityCheck:
    """Compare an engine's outputs of a network around the UNet with its references.

    Args:
        name: the engine's name.
        root: the directory that the names of the network's files start from.
        against: name of the reference in the check.
        compiled: the engine's own build, where it compiles.
        compiled_root: the directory that its files' names start from, if it is another.
    """
    from safetensors.torch import load_file

    compiled_root = compiled_root or root
    if compiled is None:
        file, references = root / str(entry.graph), [root / entry.reference]
    else:
        file = compiled_root / compiled.full
        references = [compiled_root / reference for reference in compiled.references] or [root / entry.reference]
    limits = bounds(name, entry.precision, options.inference_precision, options.device)
    errors = [0.0]
    pair = engine(name).open(network_graphs(entry, file, compiled), options)
    try:
        for reference in map(load_file, references):
            bound = pair.prepare({input_: tuple(reference[input_].shape) for input_ in pair.inputs})
            for input_ in pair.inputs:
                bound.buffers[input_].copy_(reference[input_])
            bound.full()
            for output in pair.outputs:
                errors.append(_error(bound.buffers[output].float().cpu(), reference[output].float(), limits.relative))
            bound.close()
    finally:
        pair.close()
    return ParityCheck(f"{entry.name} against {against}", max(errors), limits.parity, limits.relative)


def verify_bundle(
    bundle: Bundle, progress: Progress = lambda step: None, device: str | None = None
) -> dict[str, list[ParityCheck]]:
    """Check every file of a bundle, and compare each of its engines with its reference.

    Args:
        progress: called with a sentence as each stage begins.
        device: device to verify on; None for the first that an engine of the bundle runs on here.

    Returns:
        The checks of each engine, by its key.

    Raises:
        BundleError: a file is damaged.
        EngineError: an engine cannot be opened here.
    """
    progress("check digests")
    bundle.verify_files()
    results = {}
    for key, entry in bundle.manifest.engines.items():
        progress(f"verify {key}")
        options = EngineOptions(_device(entry, device), inference_precision=entry.inference_precision)
        pair = open_entry(bundle, entry, options)
        try:
            results[key] = verify_entry(bundle, entry, pair)
        finally:
            pair.close()
    against = bundle.manifest.source.reference
    for component in bundle.manifest.components:
        for entry in component.engines:
            key = f"{component.name} of {entry.key}"
            progress(f"verify {key}")
            options = EngineOptions(_device(entry, device))
            check_fits(entry, options.device)
            results[key] = [verify_network(component, entry.engine, options, bundle.path, against, entry)]
    return results


def _device(entry: EngineEntry, device: str | None) -> str:
    return device or next(iter(devices_of(entry)), "cpu")


def require(checks: list[ParityCheck], subject: str) -> None:
    """Raise for the first check that failed.

    Raises:
        ParityError: with the difference, the bound and a remedy.
    """
    for check in checks:
        if not check.passed:
            sign = "more than" if check.at_least else "at most"
            raise ParityError(
                f"{subject}: {check.name} differs by {check.error:.3g}, but {sign} {check.bound:.3g} is needed; "
                "try another engine or precision, and please report it"
            )


def _checks(
    pair: EnginePair, bound: BoundPair, reference: Reference, limits: Bounds, against: str
) -> list[ParityCheck]:
    for name, tensor in reference.inputs.items():
        bound.buffers[name].copy_(tensor)
    bound.full()
    full = bound.buffers["noise_pred"].float().cpu().clone()
    expected = reference.noise_pred.float()

    def parity(name: str, output: torch.Tensor) -> ParityCheck:
        error = _error(output, expected, limits.relative)
        return ParityCheck(f"{name} against {against}", error, limits.parity, limits.relative)

    def across(name: str, output: torch.Tensor, limit: float, at_least: bool = False) -> ParityCheck:
        return ParityCheck(name, _error(output, full, relative=True), limit, True, at_least)

    checks = [parity("full", full)]
    for cut, features in pair.cuts.items():
        # The shallow graph must write every value itself.
        bound.buffers["noise_pred"].fill_(float("nan"))
        bound.shallow(cut)
        shallow = bound.buffers["noise_pred"].float().cpu().clone()
        checks.append(parity(f"shallow {cut}", shallow))
        checks.append(across(f"shallow {cut} against full", shallow, limits.across))
        for feature in features:
            fresh = bound.buffers[feature].clone()
            bound.buffers[feature].zero_()
            bound.shallow(cut)
            without = bound.buffers["noise_pred"].float().cpu()
            checks.append(across(f"shallow {cut} without {feature}", without, 0.0, at_least=True))
            bound.buffers[feature].copy_(fresh)
    return checks


def _error(output: torch.Tensor, expected: torch.Tensor, relative: bool) -> float:
    """Return the largest difference; infinite where a value is not finite, so that NaN never passes.

    Args:
        relative: divide by the largest expected value.
    """
    import torch

    if not torch.isfinite(output).all():
        return float("inf")
    error = (output - expected).abs().max()
    return float(error / expected.abs().max() if relative else error)
