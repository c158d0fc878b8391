"""Command that trains and exports the shapes model: `python -m offcut.benchmarks.shapes.training.train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ....errors import UserError
from .. import model
from . import decoder_stage, denoiser_stage, export, vae_stage


def train(
    run: Path,
    target: Path,
    *,
    vae: vae_stage.VaeSettings,
    denoiser: denoiser_stage.DenoiserSettings,
    decoder: decoder_stage.DecoderSettings,
    device: str = "cpu",
    resume: bool = True,
    export_every: int = 0,
    sample_seeds: Sequence[int] = (0, 1),
    judged: int = 0,
) -> Path:
    """Run the three stages and export the pipeline; return `target`.

    Args:
        run: directory for checkpoints, cached latents and loss logs.
        target: directory of the pipeline, replaced at every export.
        export_every: number of steps of the last stage between exports; 0 exports only at the end.
        sample_seeds: seeds of the sample pictures, one for each row.
        judged: number of prompts of each kind that are judged for the model card at the last export.
    """
    trained = vae_stage.train_vae(run, vae, device, resume=resume)
    decoder_stage.train_decoder(run, decoder, device, resume=resume)
    denoiser_stage.train_denoiser(
        run,
        trained,
        denoiser,
        device,
        resume=resume,
        export_every=export_every,
        export=lambda: _announce(export.export(run, target, seeds=sample_seeds)),
    )
    return export.export(run, target, seeds=sample_seeds, judged=judged)


def _announce(path: Path) -> None:
    print(f"exported to {path}", flush=True)


def main(
    out: Annotated[Path, typer.Option(help="Directory of the exported pipeline.")] = model.DIRECTORY,
    run: Annotated[Path, typer.Option(help="Directory of checkpoints, cached latents and logs.")] = model.RUN,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 keeps PyTorch's default.")] = 2,
    vae_steps: Annotated[int, typer.Option(help="Steps of the autoencoder.")] = vae_stage.VaeSettings.steps,
    steps: Annotated[int, typer.Option(help="Steps of text encoder and UNet.")] = denoiser_stage.DenoiserSettings.steps,
    decoder_steps: Annotated[
        int, typer.Option(help="Further steps of only the decoder.")
    ] = decoder_stage.DecoderSettings.steps,
    batch: Annotated[
        int, typer.Option(help="Batch size of text encoder and UNet.")
    ] = denoiser_stage.DenoiserSettings.batch,
    rate: Annotated[
        float, typer.Option(help="Peak learning rate of text encoder and UNet.")
    ] = denoiser_stage.DenoiserSettings.rate,
    bf16: Annotated[
        bool, typer.Option(help="Compute the UNet in bf16: faster if the CPU or GPU supports bf16.")
    ] = denoiser_stage.DenoiserSettings.bf16,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoints; --no-resume starts again.")] = True,
    export_every: Annotated[int, typer.Option(help="Steps between exports; 0 exports only at the end.")] = 500,
    judged: Annotated[int, typer.Option(help="Prompts of each kind that are judged for the model card.")] = 48,
    export_only: Annotated[
        bool, typer.Option("--export-only", help="Export the newest checkpoints without training; run may be in use.")
    ] = False,
) -> None:
    """Train the shapes model (autoencoder, its decoder, text encoder with UNet) and export a diffusers pipeline."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        if export_only:
            _announce(export.export(run, out, judged=judged))
            return
        path = train(
            run,
            out,
            vae=vae_stage.VaeSettings(steps=vae_steps),
            denoiser=denoiser_stage.DenoiserSettings(steps=steps, batch=batch, rate=rate, bf16=bf16),
            decoder=decoder_stage.DecoderSettings(steps=decoder_steps),
            device=device,
            resume=resume,
            export_every=export_every,
            judged=judged,
        )
        _announce(path)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
