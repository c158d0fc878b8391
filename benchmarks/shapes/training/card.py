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

A Stable-Diffusion-shaped model of coloured shapes, trained from nothing on procedural pictures. offcut ships it so
that the effect of feature caching on real, non-random weights can be seen and measured without a download.

![samples](samples.png)

*Prompts of the columns: those of `offcut.benchmarks.shapes.model.PROMPTS`; two seeds; DDIM, {sample_steps} steps,
guidance {guidance}.*

```python
from diffusers import StableDiffusionPipeline
from offcut.benchmarks.shapes.model import model_path

pipe = StableDiffusionPipeline.from_pretrained(model_path())
pipe("a large red circle on a white background", num_inference_steps={sample_steps}, guidance_scale={guidance})
```

## What it is

| part | class | size |
|---|---|---|
| text encoder | `CLIPTextModel`, 2 layers, 128 wide, 32 tokens | {text_encoder} |
| UNet | `UNet2DConditionModel`, 48, 64, 80, 80 wide, 2 layers a block, 12 skip connections | {unet} |
| autoencoder | `AutoencoderKL`, 64x64x3 to 16x16x4 | {vae} |

Weights are stored in fp16 ({total} together). The schedule is scaled-linear from 0.00085 to 0.02 with v-prediction;
its noisiest step has a signal-to-noise ratio of 2e-4, so sampling starts from what it was trained on.

## Data

Pictures and captions are made by `scenes.py`: {colours} colours x {shapes} shapes ({shape_names}),
stated or unstated size, {backgrounds} backgrounds ({background_names}); two fifths of the pictures have
two objects with a relation ({relation_names}). An object's colour is never the background's.

Never in a training picture: {held_out}.
These pairs can be asked for, to see whether colour and shape combine.

## Training

Autoencoder: {vae_steps} steps, last mean loss {vae_loss:.4f} (errors of pixels and of pixel differences,
objects weighted five times){decoder}.
Text encoder and UNet together: {steps} steps with AdamW in batches of {batches} pictures, 10 % of captions
dropped, exponential moving average of the weights exported. Their loss is the mean squared error of the velocity, which
counts {objects:g} times at objects. Two sets of small heads are trained beside them and dropped afterwards: on the text
encoder, which object stands where (`reading.py`); on the UNet's decoder, which shape and colour each cell of the
latent shows (`seeing.py`). The unweighted loss:

| step | loss |
|---|---|
{curve}

{history}Repeat it with `python -m offcut.benchmarks.shapes.training.train` (fixed seeds; CPU or CUDA).

## What it obeys
{scores}
## Limits

It knows the words above and nothing else. Pictures are 64x64 and other sizes were not trained. It was trained on two
shared CPU cores and would gain from more; the table above says what it obeys. It says how caching changes *this*
model's pictures; a figure measured here is no figure for Stable Diffusion.
"""


def _megabytes(directory: Path) -> str:
    size = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    return f"{size / 1e6:.2f} MB"


def curve(rows: list[dict[str, float]], points: int = 12) -> str:
    """Lines of a table of steps and losses: about `points` of the rows, and the last."""
    chosen = rows[:: max(1, len(rows) // points)]
    if rows and chosen[-1] is not rows[-1]:
        chosen.append(rows[-1])
    return "\n".join(f"| {int(row['step'])} | {row['loss']:.4f} |" for row in chosen)


def _decoder(last: Mapping[str, float]) -> str:
    """The clause about the decoder's own training, from the last row of its log."""
    return f"; then its decoder alone: {int(last['step'])} steps, last mean loss {last['loss']:.4f}"


def _history(run: Path) -> str:
    """What `run`/history.md tells of a run whose settings changed on the way; nothing if there is none."""
    path = run / "history.md"
    return path.read_text(encoding="utf-8").strip() + "\n\n" if path.exists() else ""


def _scores(scores: Mapping[str, Score]) -> str:
    if not scores:
        return "\nNot judged for this export.\n"
    rows = [
        f"| {kind} | {s.prompts} | " + " | ".join(f"{share:.0%}" for share in list(vars(s).values())[1:]) + " |"
        for kind, s in scores.items()
    ]
    head = "| prompts | pictures | background | count | colours | shapes | relation | all right |"
    lines = [head, "|---" * 8 + "|", *rows]
    text = "Shares of random prompts obeyed, by `training/rule_judge.py`, which reads rendered scenes without fault:"
    return "\n" + text + "\n\n" + "\n".join(lines) + "\n"


def model_card(run: Path, directory: Path, *, guidance: float, steps: int, scores: Mapping[str, Score]) -> str:
    """The README of the model in `directory`, with the loss curves logged in `run`.

    Args:
        guidance: guidance scale of the sample pictures.
        steps: DDIM steps of the sample pictures.
        scores: by kind of prompt; empty if none was judged.
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
