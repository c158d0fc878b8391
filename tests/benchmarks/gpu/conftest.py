"""A workbench on the CPU, which all checks that need no GPU share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offcut.benchmarks.gpu.workbench import GpuOptions, Workbench

ON_CPU = GpuOptions(
    device="cpu",
    engines=("onnxruntime", "openvino"),
    precisions=("fp32",),
    performance=True,
    architectures=("small",),
    steps=6,
    interval=3,
    rounds=2,
)


@pytest.fixture(scope="session")
def bench(once: Callable[[str, Callable[[Path], object]], Path]) -> Workbench:
    """Return the shared workbench, which builds the small model's bundle for the first check."""

    def build(folder: Path) -> None:
        workbench = Workbench(ON_CPU, folder)
        for engine in ON_CPU.engines:
            workbench.bundle(engine, "fp32")

    return Workbench(ON_CPU, once("gpu-check", build))
