"""``offcut bench``: its commands, one entry each in the table below."""

from __future__ import annotations

from collections.abc import Callable

import typer

from ..options import StrictCommand
from . import compare, controlnet, latency, mlperf, plan, precision, quality, report, serve, swap

app = typer.Typer(
    name="bench",
    help="Measure speed against peers, image quality, serving and capacity; write reports and compare them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_COMMANDS: dict[Callable[..., None], str] = {
    report.report: "offcut bench report bench-latency/ bench-quality/ -o report/",
    report.schema: "offcut bench schema > result.schema.json",
    compare.compare: "offcut bench compare before/ after/ --threshold 5%",
    latency.latency: "offcut bench latency sd15.offcut --steps 20 --interval 5 --iterations 5\n\n"
    "offcut bench latency sd15.offcut --model stable-diffusion-v1-5 --peer deepcache --peer diffusers --height 256 "
    "--width 256 -o bench-sd15",
    quality.quality: "offcut bench quality\n\noffcut bench quality --plan full -o bench-quality\n\n"
    "offcut bench quality --interval 3 --interval 10 --sampler ddim --schedule quad --images 200",
    swap.swap: "offcut bench swap sd15.offcut --model stable-diffusion-v1-5 --size 512 -o bench-swap",
    controlnet.controlnet: "offcut bench controlnet -o bench-controlnet",
    precision.precision: "offcut bench precision -o bench-precision\n\n"
    "offcut bench precision sd15.offcut --part calls --size 512",
    mlperf.mlperf: "offcut bench mlperf --scenario SingleStream --interval 5",
    plan.plan: "offcut bench plan sd15.offcut --arrival-rate 2 --p99 60 --steps 20 --interval 3 "
    "--export-times t.json\n\n"
    "offcut bench plan --times t.json --arrival-rate 50 --p99 8 --steps 20 --steps 30 --json",
    serve.serve: "offcut bench serve shapes.offcut\n\n"
    "offcut bench serve sd15.offcut --part load --steps 8 --clients 1 --clients 8 --closed 120 --open 300 --rounds 2",
}
for _command, _example in _COMMANDS.items():
    app.command(cls=StrictCommand, epilog=f"Example:  {_example}")(_command)
