"""The limit of the measured calls: operations in a call, and operations a second of the machine."""

from __future__ import annotations

from ...engines.bundle.bundle import Bundle
from ...exporter.measure import count_flops
from .case import Case
from .loop import vae_scale

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""PyTorch's dtype names of the precisions in which a matrix product can be timed."""

_SIDE = {"cuda": 8192, "cpu": 2048}  # rows of both matrices: enough to keep the device busy
_REPEATS = 12


def work(case: Case, bundle: Bundle, tokens: int) -> dict[str, int]:
    """Return the floating-point operations of a full and a shallow call; empty for a bundle without ONNX graphs.

    Args:
        tokens: length of the conditioning.
    """
    graphs = next((variant.graphs for variant in bundle.manifest.variants.values() if variant.graphs), None)
    if graphs is None:
        return {}
    scale = vae_scale(bundle)
    dims = {
        "batch": case.images * (2 if case.guidance > 1 else 1),
        "height": case.height // scale,
        "width": case.width // scale,
        "sequence": tokens,
        "frames": case.frames or 1,
    }
    full, shallow = count_flops(bundle.path / graphs.full, dims, case.cut)
    return {"full": full, "shallow": shallow}


def product(device: str, precision: str) -> float:
    """Return the FLOP/s of PyTorch's product of two large square matrices, the best of 12 products."""
    import torch

    from ..turns import Clock

    side, clock = _SIDE[torch.device(device).type], Clock(device)
    left, right = (torch.randn((side, side), device=device).to(getattr(torch, DTYPES[precision])) for _ in range(2))
    out = torch.empty_like(left)
    for _ in range(3):
        torch.matmul(left, right, out=out)
    return 2 * side**3 / min(clock.time(lambda: torch.matmul(left, right, out=out)) for _ in range(_REPEATS))
