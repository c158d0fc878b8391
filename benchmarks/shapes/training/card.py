"""The text of the shipped model's README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .. import scenes
from . import checkpoint
from .denoiser_stage import DenoiserSettings
from .score import Score

_TEXT = """\
# Shapes: a small text-to-image model

A model with Stable Diffusion's layout that generates coloured shapes, trained from scratch on procedural pictures.
offcut ships it to show and measure the effect of feature caching on trained weights without a download.

![samples](samples.png)

*A column for each prompt of `offcut.benchmarks.shapes.model.PROMPTS`, a row for each of two seeds; DDIM,
{sample_steps} steps, guidance {guidance}.*

```python
from diffusers import StableDiffusionPipeline
from offcut.benchmarks.shapes.model import model_path

pipe = StableDiffusionPipeline.from_pretrained(model_path())
pipe("a large red circle on a white background", num_inference_steps={sample_steps}, guidance_scale={guidance})
```

## Components

| component | class | size |
|---|---|---|
| text encoder | `CLIPTextModel`, 2 layers, 128 wide, 32 tokens | {text_encoder} |
| UNet | `UNet2DConditionModel`, 48, 64, 80, 80 wide, 2 layers a block, 12 skip connections | {unet} |
| autoencoder | `AutoencoderKL`, 64x64x3 to 16x16x4 | {vae} |

Weights are stored in fp16 ({total} together). The noise schedule is scaled-linear from 0.00085 to 0.02 with
v-prediction. Its noisiest step has a signal-to-noise ratio of 2e-4, so the model was trained on nearly pure noise.

## Data

`scenes.py` renders pictures and captions: {colours} colours x {shapes} shapes ({shape_names}),
stated or unstated size, {backgrounds} backgrounds ({background_names}). Two fifths of the pictures have
two objects with a relation ({relation_names}). An object never has the background's colour.

No training picture contains these pairs: {held_out}.
Prompts with them show whether the model combines colours and shapes.

## Training

Autoencoder: {vae_steps} steps, last mean loss {vae_loss:.4f} (errors of pixels and of pixel differences,
objects weighted five times){decoder}.
Text encoder and UNet together: {steps} steps with AdamW in batches of {batches} pictures. 10 % of the captions were
dropped, and the exported weights are an exponential moving average. The loss is the mean squared error of the velocity,
weighted {objects:g} times at objects. Two sets of small heads are trained too and then discarded. Heads on the text
encoder predict the place of each object (`reading.py`). Heads on the UNet's decoder predict the shape and colour in
each cell of the latent (`seeing.py`). The unweighted loss:

| step | loss |
|---|---|
{curve}

{history}Repeat it with `python -m offcut.benchmarks.shapes.training.train` (fixed seeds; CPU or CUDA).

## Obeyed prompts
{scores}
## Limits

The model knows only the words above. It was trained only on pictures of 64x64, on two shared CPU cores; longer
training would improve it. Figures measured with it show how caching changes *this* model's pictures, and do not apply
to Stable Diffusion.
"""


def _megabytes(directory: Path) -> str:
    size = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    return f"{size / 1e6:.2f} MB"


def curve(rows: list[dict[str, float]], points: int = 12) -> str:
    """Return the lines of a table of steps and losses: about `points` of the rows, and the last."""
    chosen = rows[:: max(1, len(rows) // points)]
    if rows and chosen[-1] is not rows[-1]:
        chosen.append(rows[-1])
    return "\n".join(f"| {int(row['step'])} | {row['loss']:.4f} |" for row in chosen)


def _decoder(last: Mapping[str, float]) -> str:
    """Return the clause about the decoder's own training, from the last row of its log."""
    return f"; then its decoder alone: {int(last['step'])} steps, last mean loss {last['loss']:.4f}"


def _history(run: Path) -> str:
    """Return the text of `run`/history.md, which lists settings that changed during the run; empty without the file."""
    path = run / "history.md"
    return path.read_text(encoding="utf-8").strip() + "\n\n" if path.exists() else ""


def _scores(scores: Mapping[str, Score]) -> str:
    if not scores:
        return "\nNot judged for this export.\n"
    rows = [
        f"| {kind} | {s.prompts} | " + " | ".join(f"{share:.0%}" for share in list(vars(s).values())[1:]) + " |"
        for kind, s in scores.items()
    ]
    head = "| prompts | pictures | background | count | colours | shapes | relation | all of these |"
    lines = [head, "|---" * 8 + "|", *rows]
    text = "Shares of random prompts obeyed, by `training/rule_judge.py`, which reads rendered scenes without errors:"
    return "\n" + text + "\n\n" + "\n".join(lines) + "\n"


def model_card(run: Path, directory: Path, *, guidance: float, steps: int, scores: Mapping[str, Score]) -> str:
    """Return the README of the model in `directory`, with the loss curves logged in `run`.

    Args:
        guidance: guidance scale of the sample pictures.
        steps: DDIM steps of the sample pictures.
        scores: scores by kind of prompt; empty if none was judged.
    """
    stages = ("denoiser", "vae", "decoder")
    rows, vae_rows, decoder_rows = (checkpoint.read_log(run / f"{stage}.jsonl") for stage in stages)
    return _TEXT.format(
        sample_steps=steps,
        guidance=guidance,
        **{part: _megabytes(directory / part) for part in ("text_encoder", "unet", "vae")},
        total=_megabytes(directory),
        colours=len(scenes.COLOURS),
        shapes=len(scenes.SHAPES),
        shape_names=", ".join(scenes.SHAPES),
        backgrounds=len(scenes.BACKGROUNDS),
        background_names=", ".join(scenes.BACKGROUNDS),
        relation_names=", ".join(scenes.RELATIONS),
        held_out=", ".join(f"{colour} {shape}" for colour, shape in sorted(scenes.HELD_OUT)),
        vae_steps=int(vae_rows[-1]["step"]) if vae_rows else 0,
        vae_loss=vae_rows[-1]["loss"] if vae_rows else float("nan"),
        batches=", later ".join(dict.fromkeys(str(int(row["batch"])) for row in rows)),
        decoder=_decoder(decoder_rows[-1]) if decoder_rows else "",
        steps=int(rows[-1]["step"]) if rows else 0,
        objects=DenoiserSettings.objects,
        curve=curve(rows),
        scores=_scores(scores),
        history=_history(run),
    )
