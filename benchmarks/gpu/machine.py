"""What a result depends on: the GPU, its driver, and the versions of everything between."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

from ...engines.registry import machine, probe_all

_PACKAGES = ("offcut", "onnx", "onnxscript", "polygraphy", "triton", "DeepCache")


def facts(device: str) -> dict[str, str]:
    """The machine, by name; what is not there says so."""
    import torch

    found = {"device": device, **machine()}
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "gpu memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
        }
    found |= {
        "driver": _driver(),
        "cuda": torch.version.cuda or "none: PyTorch was built without it",
        "cudnn": str(torch.backends.cudnn.version() or "none"),  # type: ignore[no-untyped-call]
    }
    for name, probe in probe_all().items():
        found[f"engine {name}"] = f"{probe.version or 'absent'} ({probe.reason})"
    for package in _PACKAGES:
        found[package] = _version(package)
    return found


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: there is no nvidia-smi"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return f"unknown: nvidia-smi ended with {done.returncode}"
    return ", ".join(dict.fromkeys(done.stdout.split()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
