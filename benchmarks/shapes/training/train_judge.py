"""Command that trains the judge network: `python -m offcut.benchmarks.shapes.training.train_judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ....errors import UserError
from ..judge_net.network import POOLED
from ..judge_net.reader import DIRECTORY, JudgeNet
from ..model import model_path
from . import judge_card as card
from . import judge_stage as stage

RUN = Path(__file__).parents[1] / "judge_net" / "run"


def train_judge(run: Path, target: Path, settings: stage.JudgeSettings, *, judged: int, resume: bool = True) -> Path:
    """Train the network, store it in fp16, and write its card with the accuracy of the stored network.

    Args:
        run: directory for checkpoint, softened pictures and loss log.
        target: directory for the weights and their README; also the return value.
        judged: number of scenes, none of them from training, that measure the accuracy.
    """
    JudgeNet(stage.train_judge(run, settings, resume=resume)).save(target)
    net, vae = JudgeNet.load(target), model_path() / "vae"
    read = card.evaluations(net, vae, judged, settings.seed + 1)
    distances = card.measure(net, vae, judged, settings.seed + 2)
    text = card.judge_card(run, target, settings.pictures, settings.batch, read, distances, judged, POOLED)
    (target / "README.md").write_text(text, encoding="utf-8")
    return target


def main(
    out: Annotated[Path, typer.Option(help="Directory of the weights and their card.")] = DIRECTORY,
    run: Annotated[Path, typer.Option(help="Directory of the checkpoint and the log.")] = RUN,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 keeps PyTorch's default.")] = 2,
    steps: Annotated[int, typer.Option(help="Training steps.")] = stage.JudgeSettings.steps,
    judged: Annotated[int, typer.Option(help="Rendered scenes that measure the accuracy for the card.", min=2)] = 2000,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint; --no-resume starts again.")] = True,
) -> None:
    """Train the judge network on rendered scenes, and write it with a card that has its accuracy on new scenes."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        path = train_judge(run, out, stage.JudgeSettings(steps=steps), judged=judged, resume=resume)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    print(f"exported to {path}")


if __name__ == "__main__":
    typer.run(main)
