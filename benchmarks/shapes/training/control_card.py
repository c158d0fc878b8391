"""Writes the trained ControlNet in fp16 with its card, which says how well pictures follow their silhouettes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import scenes, silhouettes
from . import checkpoint, control_stage, export, rule_judge, vae_stage
from .card import curve

_BATCH = 16

_TEXT = """\
# A ControlNet for the shapes model

A `ControlNetModel` that takes silhouettes: white where an object is to be, black elsewhere. It says where objects are
and which outline they have, not their colours. offcut ships it so that caching under a trained ControlNet can be
measured without a download (`offcut bench controlnet`).

```python
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from offcut.benchmarks.shapes.model import control_path, model_path

net = ControlNetModel.from_pretrained(control_path())
pipe = StableDiffusionControlNetPipeline.from_pretrained(model_path(), controlnet=net)
pipe("a red circle on a white background", image=silhouette, num_inference_steps={steps}, guidance_scale={guidance})
```

`silhouette` is a picture of 64x64; `offcut.benchmarks.shapes.silhouettes.silhouette(scene)` makes one.

## Training

It began as a copy of the UNet's encoder (`ControlNetModel.from_unet`) and learnt for {trained} steps of {batch} scenes,
each drawn afresh, with AdamW; text encoder, UNet and autoencoder were frozen. {dropped:.0%} of the captions were
dropped, the velocity's error counts {objects:g} times at objects, and the weights' moving average is exported, in fp16
({size:.2f} MB).
Mean squared error of the velocity on {held_out} scenes kept apart, {without:.4f} without the ControlNet:

| step | error with it, weights not averaged |
|---|---|
{curve}

Repeat it with `python -m offcut.benchmarks.shapes.training.train_control --steps {trained}` (fixed seeds; CPU or CUDA).

## Does it control?

{obeyed}
It knows silhouettes of these shapes, one or two in a picture, and no others.
"""

_OBEYED = """\
{judged} scenes that were not trained on, captions without sizes, {steps} DDIM steps, guidance {guidance}. Overlap:
intersection over union of the drawn objects' pixels with the silhouette's. Right: captions obeyed in full, by
`training/rule_judge.py`.

| | overlap | right |
|---|---|---|
| with the ControlNet | {with_overlap:.3f} | {with_right:.0%} |
| without it | {plain_overlap:.3f} | {plain_right:.0%} |
| the scenes as the renderer draws them | {drawn_overlap:.3f} | {drawn_right:.0%} |
"""


@dataclass(frozen=True)
class Obeyed:
    """Means over pictures: overlap with the silhouettes, and share of the captions that are obeyed in full."""

    overlap: float
    right: float


def export_control(trainer: control_stage.ControlTrainer, run: Path, model: Path, target: Path, judged: int) -> Path:
    """Writes the averaged weights in fp16 to `target`, draws scenes with them, and writes the card.

    Args:
        run: where training kept its log.
        model: the pipeline's directory.
        judged: scenes that are drawn for the card, none of them from training; 0 leaves their table out.

    Returns:
        `target`.
    """
    trainer.averaged().half().save_pretrained(target)
    obeyed_table = _judge(model, target, trainer.settings.seed, judged) if judged else "Not judged for this export.\n"
    text = card(checkpoint.read_log(run / "control.jsonl"), trainer.settings, target, obeyed_table)
    (target / "README.md").write_text(text, encoding="utf-8")
    for path in target.iterdir():
        path.chmod(0o644)
    return target


def card(rows: list[dict[str, float]], settings: control_stage.ControlSettings, target: Path, obeyed_table: str) -> str:
    """The README of the ControlNet in `target`, whose training logged `rows`."""
    return _TEXT.format(
        steps=export.SAMPLE_STEPS,
        guidance=export.GUIDANCE,
        trained=int(rows[-1]["step"]),
        batch=settings.batch,
        dropped=settings.drop_caption,
        objects=settings.objects,
        size=(target / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6,
        held_out=settings.held_out,
        without=rows[-1]["without"],
        curve=curve([{"step": row["step"], "loss": row["held_out"]} for row in rows]),
        obeyed=obeyed_table,
    )


def _judge(model: Path, controlnet: Path, seed: int, judged: int) -> str:
    """The card's table of how well so many scenes that were not trained on are followed."""
    rng = np.random.default_rng((seed, 1, judged))
    asked = [scenes.sample_scene(rng) for _ in range(judged)]
    with_it, plain = (_draw(pipe, asked) for pipe in _pipelines(model, controlnet))
    found = {
        "with": obeyed(with_it, asked),
        "plain": obeyed(plain, asked),
        "drawn": obeyed(vae_stage.draw(asked).transpose(0, 2, 3, 1), asked),
    }
    return _OBEYED.format(
        judged=judged,
        steps=export.SAMPLE_STEPS,
        guidance=export.GUIDANCE,
        **{f"{kind}_{name}": value for kind, each in found.items() for name, value in vars(each).items()},
    )


def obeyed(pictures: Any, asked: list[scenes.Scene]) -> Obeyed:
    """How well pictures, uint8 (N, 64, 64, 3), follow the silhouettes and captions of their scenes."""
    wanted = np.stack([silhouettes.silhouette(scene) for scene in asked])
    captions = [silhouettes.open_caption(scene) for scene in asked]
    right = [rule_judge.judge_by_rules(picture, text).right for picture, text in zip(pictures, captions, strict=True)]
    return Obeyed(float(silhouettes.overlaps(pictures, wanted).mean()), float(np.mean(right)))


def _pipelines(model: Path, controlnet: Path) -> tuple[Any, Any]:
    """The pipeline with the ControlNet, and without."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    plain = export.load_pipeline(model)
    net = ControlNetModel.from_pretrained(controlnet)
    made = StableDiffusionControlNetPipeline(**plain.components, controlnet=net, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made, plain


def _draw(pipe: Any, asked: list[scenes.Scene]) -> Any:
    """A picture of each scene's caption, the silhouette given where the pipeline takes one: uint8 (N, 64, 64, 3)."""
    import torch

    made = []
    for first in range(0, len(asked), _BATCH):
        part = asked[first : first + _BATCH]
        masks = torch.from_numpy(np.stack([silhouettes.silhouette(scene) for scene in part]))
        images = pipe(
            [silhouettes.open_caption(scene) for scene in part],
            num_inference_steps=export.SAMPLE_STEPS,
            guidance_scale=export.GUIDANCE,
            generator=[torch.Generator().manual_seed(first + place) for place in range(len(part))],
            output_type="np",
            **({"image": masks.permute(0, 3, 1, 2).float() / 255} if "controlnet" in pipe.components else {}),
        ).images
        made.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(made)
