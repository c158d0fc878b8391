"""The command line.

Each command is an entry of ``_COMMANDS``: it parses its options, calls one function and prints the result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import UserError
from . import bench, bundles, graphs, images, serve, tuning
from .options import StrictCommand
from .shell import out, print_error

app = typer.Typer(
    name="offcut",
    help="DeepCache for compiled engines: build a full and a shallow UNet graph, and run them alternately.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        out.print(f"offcut {version('offcut')}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_COMMANDS: dict[Callable[..., None], str] = {
    graphs.export: "offcut export stable-diffusion-v1-5/stable-diffusion-v1-5 -o sd15-onnx --precision fp16",
    graphs.split: "offcut split sd15-onnx/unet.onnx --cut deepcache:0 -o sd15-split",
    graphs.cuts: "offcut cuts sd15-onnx/unet.onnx --height 64 --width 64",
    bundles.build: "offcut build stable-diffusion-v1-5/stable-diffusion-v1-5 -o sd15.offcut --cut deepcache:0\n\n"
    "offcut build sd15-dir -o sd15-rtx.offcut --precision fp16 --engine tensorrt-rtx --compute-capability 89 "
    "--static 512x512 --dynamic 256..1024 --max-batch 4 --deploy",
    bundles.inspect: "offcut inspect sd15.offcut --json",
    bundles.verify: "offcut verify sd15.offcut",
    bundles.prune: "offcut prune sd15.offcut --dry-run",
    bundles.doctor: "offcut doctor --json",
    tuning.tune: "offcut tune sd15.offcut --budget 2.5x --sampler DPMSolverMultistepScheduler --steps 20 --pareto",
    images.run: 'offcut run sd15.offcut "a lighthouse in a storm" -o out.png --interval 5 --compare',
    images.demo: "offcut demo -o demo.png",
    serve.serve: "offcut serve sd15.offcut --interval 5 --port 8000\n\noffcut serve sd15.offcut --ray --replicas 2",
}
for _command, _example in _COMMANDS.items():
    app.command(cls=StrictCommand, epilog=f"Example:  {_example}")(_command)
app.add_typer(bench.app)


def main() -> None:
    """Run the command line. A ``UserError`` prints one sentence and exits with 1; other errors keep their traceback."""
    try:
        app()
    except UserError as error:
        print_error(error)
        sys.exit(1)
