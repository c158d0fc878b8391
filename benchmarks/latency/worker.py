"""A house: the process in which contestants that share weights run. Answers each line of JSON with one.

    {"do": "inputs", "case": {...}}
    {"do": "product", "case": {...}, "precision": "bf16"}
    {"do": "open", "case": {...}, "entrant": {...}, "calls": 2, "warm_up": 1}
    {"do": "loop", "name": "diffusers eager fp32", "calls": 2}
    {"do": "alone", "name": "diffusers eager fp32", "repeats": 5}
    {"do": "image", "name": "diffusers eager fp32"}

An answer is ``{"ok": {...}}`` or ``{"error": "why"}``. The process ends when its standard input does, in the midst of
whatever it is doing: it never outlives who started it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

from .case import Case, Entrant

if TYPE_CHECKING:
    from .runners import Runner, Shared


class House:
    """The contestants that are open in this process, by name."""

    def __init__(self) -> None:
        self._shared: Shared | None = None
        self._runners: dict[str, Runner] = {}
        self._inputs: dict[str, dict[str, Any]] = {}
        self._device_before = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one of the requests of the module's docstring."""
        does: dict[str, Callable[..., dict[str, Any]]] = {
            "inputs": self.inputs,
            "product": self.product,
            "open": self.open,
            "loop": self.loop,
            "alone": self.alone,
            "image": self.image,
        }
        return does[request.pop("do")](**request)

    def inputs(self, case: dict[str, Any]) -> dict[str, Any]:
        """Make what all contestants begin with, and count what their calls compute."""
        from ...engines.bundle.bundle import Bundle
        from .ceiling import work
        from .loop import prepare_inputs

        made = Case(**case)
        bundle = Bundle.open(made.bundle)
        prepared = prepare_inputs(made, bundle)
        tokens = prepared["inputs"]["image_embeddings" if made.frames else "prompt_embeds"][1]
        return prepared | {"work": work(made, bundle, tokens)}

    def product(self, case: dict[str, Any], precision: str) -> dict[str, Any]:
        """What the machine computes at best."""
        import torch

        from .ceiling import product

        made = Case(**case)
        torch.set_num_threads(made.threads)
        return {"flops": product(made.device, precision)}

    def open(self, case: dict[str, Any], entrant: dict[str, Any], calls: int, warm_up: int) -> dict[str, Any]:
        """Open a contestant and warm it up.

        Args:
            calls: of a loop that warms up: enough that both graphs run.
            warm_up: the number of such loops.
        """
        import torch

        from .loop import denoise, draw, read_inputs
        from .runners import KINDS, Shared

        who = Entrant(**entrant)
        if self._shared is None:
            self._shared = Shared(Case(**case))
            torch.set_num_threads(self._shared.case.threads)
            self._device_before = _device_used(self._shared.case.device)
        made_before = self._shared.seconds
        began = time.perf_counter()
        runner = KINDS[who.kind](who, self._shared)
        load = time.perf_counter() - began + made_before  # what was there already counts too
        self._runners[who.name] = runner
        self._inputs[who.name] = read_inputs(self._shared.case, runner.dtype)
        began = time.perf_counter()
        # What is compiled as it runs is compiled again for step numbers and paths that come later in a loop.
        loops: list[int | None] = [None, None] if "compile" in who.settings else []
        for stop_after in (*loops, *[calls] * warm_up):
            with runner.turn():
                denoise(runner.pipe, self._shared.case, self._inputs[who.name], calls=stop_after)
        if self._shared.case.end_to_end:
            with runner.turn():
                draw(runner.pipe, self._shared.case, calls=calls)
        return {"load": load, "warm_up": time.perf_counter() - began, "versions": versions(), **self._memory()}

    def loop(self, name: str, calls: int = 1) -> dict[str, Any]:
        """One measured loop: its seconds, and those of the UNet's calls in it.

        Args:
            calls: of the loop before it, which is not measured: it brings the weights back that the system may have
                dropped from memory while others had their turns, since libraries map them from their files.
        """
        from safetensors.torch import save_file

        from .clock import Clock
        from .loop import denoise

        runner, case = self._runners[name], self._case
        marks = runner.marks
        marks.full.clear()
        marks.shallow.clear()
        latents: list[Any] = []
        with runner.turn():
            denoise(runner.pipe, case, self._inputs[name], calls=calls)
        gc.collect()
        with runner.turn():
            marks.on = True
            try:
                seconds = Clock(case.device).time(
                    lambda: latents.append(denoise(runner.pipe, case, self._inputs[name]))
                )
            finally:
                marks.on = False
        file = Path(case.folder) / f"{_file_name(name)}.safetensors"
        save_file({"latents": _tensor(latents[0]).float().cpu().contiguous()}, file)
        inside = {
            kind: [marks.clock.between(*pair) for pair in pairs]
            for kind, pairs in (("full", marks.full), ("shallow", marks.shallow))
        }
        return {"loop": seconds, "latents": str(file), **inside, **self._memory()}

    def alone(self, name: str, repeats: int) -> dict[str, Any]:
        """The UNet's calls, and what a forecast adds to them, back to back: seconds of each repetition, by kind."""
        import torch

        from .clock import Clock

        runner, clock = self._runners[name], Clock(self._case.device)
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
                    seconds[kind] = [clock.time(call) for _ in range(repeats)]
        return seconds

    def image(self, name: str) -> dict[str, Any]:
        """One whole pipeline call."""
        from .clock import Clock
        from .loop import draw

        runner = self._runners[name]
        gc.collect()
        with runner.turn():
            seconds = Clock(self._case.device).time(lambda: draw(runner.pipe, self._case))
        return {"image": seconds, **self._memory()}

    @property
    def _case(self) -> Case:
        assert self._shared is not None
        return self._shared.case

    def _memory(self) -> dict[str, Any]:
        """The process's largest resident memory so far, and the device's in use beyond what was before."""
        device = self._case.device
        used = max(0, _device_used(device) - self._device_before) if device != "cpu" else None
        return {"host_peak": peak_memory(), "device": used}


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's would begin with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Of the packages in this process's environment that decide what a peer does."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "diffusers", "transformers", "onnxruntime", "optimum-onnx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device_used(device: str) -> int:
    if not device.startswith("cuda"):
        return 0
    import torch

    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in name)


def _tensor(value: Any) -> Any:
    import torch

    return torch.as_tensor(value)


def requests(stream: IO[str]) -> Iterator[dict[str, Any]]:
    """The lines of a stream as they come; the process ends with the stream, even while one is being answered."""
    queue: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in stream:
            queue.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(queue.get())


def main() -> None:
    # Libraries print as they like; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from ...runtime.quiet import quiet_libraries

    quiet_libraries()
    house = House()
    for request in requests(sys.stdin):
        try:
            answer: dict[str, Any] = {"ok": house.answer(request)}
        except Exception as error:  # of any library: the reason stands in the contestant's row
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
