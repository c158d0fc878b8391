"""Command that trains the shapes model's ControlNet: `python -m offcut.benchmarks.shapes.training.train_control`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ....errors import UserError
from .. import model
from . import control_card, control_stage


def main(
    out: Annotated[Path, typer.Option(help="Directory of the ControlNet and its card.")] = model.CONTROL,
    run: Annotated[Path, typer.Option(help="Directory of the checkpoint and the log.")] = model.RUN,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 keeps PyTorch's default.")] = 2,
    steps: Annotated[int, typer.Option(help="Training steps.")] = control_stage.ControlSettings.steps,
    batch: Annotated[int, typer.Option(help="Scenes in each step.")] = control_stage.ControlSettings.batch,
    judged: Annotated[int, typer.Option(help="Scenes that are generated and judged for the card.", min=0)] = 96,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint; --no-resume starts again.")] = True,
) -> None:
    """Train a ControlNet for silhouettes on rendered scenes, and export it with its card."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    settings = control_stage.ControlSettings(steps=steps, batch=batch)
    try:
        trained = control_stage.train_control(run, model.model_path(), settings, device, resume=resume)
        control_card.export_control(trained, run, model.model_path(), out, judged)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    print(f"exported to {out}")


if __name__ == "__main__":
    typer.run(main)
