"""The process in which an engine's checks run: reads a request, answers line by line, each a JSON object.

python -m offcut.benchmarks.gpu.worker < request.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime.quiet import quiet_libraries
from .catalog import catalog
from .check import perform
from .report import result_as_json
from .workbench import Options, Workbench


def main() -> None:
    request = json.load(sys.stdin)
    # Libraries print as they like; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(kind: str, value: Any) -> None:
        answers.write(json.dumps({kind: value}) + "\n")
        answers.flush()

    serve(Options.of_json(request["options"]), Path(request["folder"]), set(request["checks"]), say)


def serve(options: Options, folder: Path, wanted: set[str], say: Callable[[str, Any], None]) -> None:
    """Run these checks in order: ``begin`` with an id before each, ``result`` after it, ``progress`` in between."""
    import torch

    quiet_libraries()
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # the references in fp32 are exact
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Workbench(options, folder, lambda step: say("progress", step))
    for check in catalog(options):
        if check.id in wanted:
            say("begin", check.id)
            say("result", result_as_json(perform(check, bench)))


if __name__ == "__main__":
    main()
