"""Export of the trained ControlNet in fp16 with its model card, which shows how well pictures follow silhouettes."""

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

A `ControlNetModel` that takes silhouettes: white objects on black. A silhouette sets the places and outlines of
objects, not their colours. offcut ships it to measure caching with a trained ControlNet without a download
(`offcut bench controlnet`).

```python
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from offcut.benchmarks.shapes.model import control_path, model_path

net = ControlNetModel.from_pretrained(control_path())
pipe = StableDiffusionControlNetPipeline.from_pretrained(model_path(), controlnet=net)
pipe("a red circle on a white background", image=silhouette, num_inference_steps={steps}, guidance_scale={guidance})
```

`silhouette` is a picture of 64x64 pixels, as `offcut.benchmarks.shapes.silhouettes.silhouette(scene)` returns it.

## Training

The ControlNet began as a copy of the UNet's encoder (`ControlNetModel.from_unet`) and was trained for {trained} steps
of {batch} new random scenes with AdamW. Text encoder, UNet and autoencoder were frozen. {dropped:.0%} of the captions
were dropped. The velocity's error is weighted {objects:g} times at objects. The exported weights are a moving average,
in fp16 ({size:.2f} MB).
Mean squared error of the velocity on {held_out} held-out scenes; without the ControlNet it is {without:.4f}:

| step | error, weights not averaged |
|---|---|
{curve}

Repeat it with `python -m offcut.benchmarks.shapes.training.train_control --steps {trained}` (fixed seeds; CPU or CUDA).

## Does it control?

{obeyed}
It was trained only on silhouettes of one or two of the model's shapes.
"""

_OBEYED = """\
{judged} scenes that were not trained on, captions without sizes, {steps} DDIM steps, guidance {guidance}. Overlap:
intersection over union of the generated objects' pixels with the silhouette's. Right: share of captions obeyed in
full, by `training/rule_judge.py`.

| | overlap | right |
|---|---|---|
| with the ControlNet | {with_overlap:.3f} | {with_right:.0%} |
| without it | {plain_overlap:.3f} | {plain_right:.0%} |
| rendered scenes | {rendered_overlap:.3f} | {rendered_right:.0%} |
"""


@dataclass(frozen=True)
class Obeyed:
    """Means over pictures: overlap with the silhouettes, and share of captions obeyed in full."""

    overlap: float
    right: float


def export_control(trainer: control_stage.ControlTrainer, run: Path, model: Path, target: Path, judged: int) -> Path:
    """Write the averaged weights in fp16 to `target`, generate pictures with them, and write the card.

    Args:
        run: directory with the log of the training.
        model: directory of the pipeline.
        judged: number of scenes, none of them from training, that are generated for the card; 0 omits their table.

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
    """Return the README of the ControlNet in `target`, whose training logged `rows`."""
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
    """Return the card's table on this number of scenes that were not trained on."""
    rng = np.random.default_rng((seed, 1, judged))
    originals = [scenes.sample_scene(rng) for _ in range(judged)]
    controlled, plain = (_generate(pipe, originals) for pipe in _pipelines(model, controlnet))
    results = {
        "with": obeyed(controlled, originals),
        "plain": obeyed(plain, originals),
        "rendered": obeyed(vae_stage.render_all(originals).transpose(0, 2, 3, 1), originals),
    }
    return _OBEYED.format(
        judged=judged,
        steps=export.SAMPLE_STEPS,
        guidance=export.GUIDANCE,
        **{f"{kind}_{name}": value for kind, means in results.items() for name, value in vars(means).items()},
    )


def obeyed(pictures: Any, originals: list[scenes.Scene]) -> Obeyed:
    """Return how well pictures, uint8 (N, 64, 64, 3), follow the silhouettes and captions of their scenes."""
    masks = np.stack([silhouettes.silhouette(scene) for scene in originals])
    captions = [silhouettes.open_caption(scene) for scene in originals]
    right = [rule_judge.judge_by_rules(picture, text).right for picture, text in zip(pictures, captions, strict=True)]
    return Obeyed(float(silhouettes.overlaps(pictures, masks).mean()), float(np.mean(right)))


def _pipelines(model: Path, controlnet: Path) -> tuple[Any, Any]:
    """Return the pipeline with the ControlNet, and the one without."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    plain = export.load_pipeline(model)
    net = ControlNetModel.from_pretrained(controlnet)
    controlled = StableDiffusionControlNetPipeline(**plain.components, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    return controlled, plain


def _generate(pipe: Any, originals: list[scenes.Scene]) -> Any:
    """Return a picture for each scene's caption, and its silhouette if the pipeline has a ControlNet: as `obeyed`."""
    import torch

    pictures = []
    for first in range(0, len(originals), _BATCH):
        part = originals[first : first + _BATCH]
        masks = torch.from_numpy(np.stack([silhouettes.silhouette(scene) for scene in part]))
        images = pipe(
            [silhouettes.open_caption(scene) for scene in part],
            num_inference_steps=export.SAMPLE_STEPS,
            guidance_scale=export.GUIDANCE,
            generator=[torch.Generator().manual_seed(first + place) for place in range(len(part))],
            output_type="np",
            **({"image": masks.permute(0, 3, 1, 2).float() / 255} if "controlnet" in pipe.components else {}),
        ).images
        pictures.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(pictures)
