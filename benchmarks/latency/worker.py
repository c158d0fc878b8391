"""The worker process of contestants that share weights; ``WorkerProcess`` sends the requests.

Requests: ``inputs`` (case), ``product`` (case, precision), ``open`` (case, entrant, calls, warm_up), ``loop`` (name,
calls), ``alone`` (name, repeats).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..worker_process import Answer, Channel
from .case import Case, Entrant

if TYPE_CHECKING:
    from .runners import PipelineRunner, SharedParts


class LatencyWorker:
    """The contestants that are open in this process, by name."""

    def __init__(self) -> None:
        self._shared: SharedParts | None = None
        self._runners: dict[str, PipelineRunner] = {}
        self._device_before = 0

    def inputs(self, case: dict[str, Any]) -> Answer:
        """Write the input tensors of all loops, and count the operations of the UNet's calls."""
        from ...engines.bundle.bundle import Bundle
        from .ceiling import work
        from .loop import prepare_inputs

        run = Case(**case)
        bundle = Bundle.open(run.bundle)
        shapes = prepare_inputs(run, bundle)
        tokens = shapes["image_embeddings" if run.frames else "prompt_embeds"][1]
        return {"inputs": shapes, "work": work(run, bundle, tokens)}

    def product(self, case: dict[str, Any], precision: str) -> Answer:
        """Measure a large matrix product, whose FLOP/s are about the machine's limit."""
        import torch

        from .ceiling import product

        torch.set_num_threads(case["threads"])
        return {"flops": product(case["device"], precision)}

    def open(self, case: dict[str, Any], entrant: dict[str, Any], calls: int, warm_up: int) -> Answer:
        """Open a contestant and warm it up.

        Args:
            calls: number of calls in each warm-up loop, so that both graphs run.
            warm_up: number of warm-up loops.
        """
        import torch

        from .runners import KINDS, SharedParts

        contestant = Entrant(**entrant)
        if self._shared is None:
            self._shared = SharedParts(Case(**case))
            torch.set_num_threads(self._case.threads)
            self._device_before = _device_bytes(self._case.device)
        shared_seconds = self._shared.seconds  # time of objects that earlier contestants of this process created
        began = time.perf_counter()
        runner = self._runners[contestant.name] = KINDS[contestant.kind](contestant, self._shared)
        load = time.perf_counter() - began + shared_seconds
        began = time.perf_counter()
        # torch.compile compiles again at step numbers and paths that only whole loops reach.
        whole_loops: list[int | None] = [None, None] if "compile" in contestant.settings else []
        for stop_after in (*whole_loops, *[calls] * warm_up):
            with runner.turn():
                runner.loop(stop_after)
        return {"load": load, "warm_up": time.perf_counter() - began, "versions": versions(), **self._memory()}

    def loop(self, name: str, calls: int = 1) -> Answer:
        """Measure one loop and the UNet's calls in it.

        Args:
            calls: number of calls in a preceding loop that is not measured. It brings mapped weights back to memory,
                which the system may have dropped during other contestants' turns.
        """
        from safetensors.torch import save_file

        from ..turns import timed_loop

        runner = self._runners[name]
        with runner.turn():
            runner.loop(calls)
        times = timed_loop(runner)
        file = Path(self._case.folder) / f"{_file_name(name)}.safetensors"
        save_file({"latents": times.latents.float().cpu().contiguous()}, file)
        return {
            "loop": times.seconds,
            "full": times.full,
            "shallow": times.shallow,
            "latents": str(file),
            **self._memory(),
        }

    def alone(self, name: str, repeats: int) -> Answer:
        """Measure the UNet's calls back to back, and what a forecast adds to them; return the seconds by kind."""
        import torch

        runner = self._runners[name]
        seconds: dict[str, list[float]] = {}
        with runner.turn(), torch.no_grad():
            calls = {
                "full": runner.call_alone(True),
                "shallow": runner.call_alone(False),
                "forecast": runner.forecast(),
            }
            for kind, call in calls.items():
                if call is not None:
                    call()
                    seconds[kind] = [runner.marks.clock.time(call) for _ in range(repeats)]
        return seconds

    @property
    def _case(self) -> Case:
        assert self._shared is not None
        return self._shared.case

    def _memory(self) -> Answer:
        """Return the peak resident memory of the process, and the device memory that its contestants have taken."""
        device = self._case.device
        used = max(0, _device_bytes(device) - self._device_before) if device != "cpu" else None
        return {"host_peak": peak_memory(), "device": used}


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the peak of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions of the packages in this environment that influence a peer."""
    from ..record import installed_versions

    return installed_versions(("torch", "diffusers", "transformers", "onnxruntime", "optimum-onnx"))


def _device_bytes(device: str) -> int:
    if not device.startswith("cuda"):
        return 0
    import torch

    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in name)


def main() -> None:
    channel = Channel()
    from ...runtime.quiet import quiet_libraries

    quiet_libraries()
    worker = LatencyWorker()
    methods = (worker.inputs, worker.product, worker.open, worker.loop, worker.alone)
    channel.answer({method.__name__: method for method in methods})


if __name__ == "__main__":
    main()
