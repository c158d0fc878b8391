"""Export of the trained networks as a diffusers pipeline in fp16, with sample pictures and a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ....exporter.load import INDEX_FILE, PROMPTS_FILE
from .. import model, prompts
from . import architecture as networks
from . import card, checkpoint, score, tokenizer, vae_stage

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

GUIDANCE = 3.0
"""Classifier-free guidance scale of the sample pictures."""

SAMPLE_STEPS = 50
"""DDIM steps of the sample pictures."""

_TRAINED = ("one object", "two objects")
_PROMPTS_OF_A_KIND = 24
_SEED = 500  # seed of the tuning prompts; the benchmarks' prompts have other seeds


def export(run: Path, target: Path, *, seeds: Sequence[int] = (0, 1), judged: int = 0) -> Path:
    """Export the newest checkpoints in `run` to `target`, which a rename replaces.

    The exported text encoder and UNet have the averaged weights.

    Args:
        run: directory with the checkpoints and logs of the training.
        target: directory of the pipeline.
        seeds: seeds of the sample pictures, one for each row.
        judged: number of prompts of each kind that are judged for the model card; 0 omits the table.

    Returns:
        `target`.

    Raises:
        UserError: a checkpoint is missing.
    """
    state = checkpoint.load(run / "denoiser.pt")
    vae = vae_stage.load_vae(run)
    text_encoder, unet = networks.new_text_encoder(), networks.new_unet()
    text_encoder.load_state_dict(state["text_encoder_average"])
    unet.load_state_dict(state["unet_average"])

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as parent:
        new = Path(parent) / "new"
        vae.half().save_pretrained(new / "vae")
        unet.half().save_pretrained(new / "unet")
        _save_text_encoder(text_encoder.half(), new / "text_encoder")
        tokenizer.write_tokenizer(new / "tokenizer")
        networks.new_scheduler().save_pretrained(new / "scheduler")
        _write_index(new / INDEX_FILE)
        write_prompts(new / PROMPTS_FILE)

        pipe = load_pipeline(new)
        pictures = [picture for seed in seeds for picture in sample(pipe, model.PROMPTS, seed=seed)]
        grid(pictures, columns=len(model.PROMPTS)).save(new / "samples.png", optimize=True)
        scores = {kind: _score(pipe, kind, judged) for kind in prompts.KINDS} if judged else {}
        text = card.model_card(run, new, guidance=GUIDANCE, steps=SAMPLE_STEPS, scores=scores)
        (new / "README.md").write_text(text, encoding="utf-8")
        for path in new.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            target.rename(Path(parent) / "old")
        new.rename(target)
    return target


def _save_text_encoder(text_encoder: object, directory: Path) -> None:
    """Save the text encoder in a form that transformers 4 and 5 both read.

    transformers 5 saves names without the prefix `text_model.`. It also loads weights in the configuration's dtype,
    which is fp32 here because diffusers loads the other components in fp32.
    """
    from safetensors.torch import load_file, save_file

    text_encoder.save_pretrained(directory)  # type: ignore[attr-defined]
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    prefix = "text_model."
    tensors = {name if name.startswith(prefix) else prefix + name: value for name, value in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = config["torch_dtype"] = "float32"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_prompts(path: Path) -> None:
    """Write prompts for tuning a schedule: the kinds that the model was trained on, in turn."""
    kinds = [prompts.prompts(kind, _PROMPTS_OF_A_KIND, seed) for seed, kind in enumerate(_TRAINED, _SEED)]
    texts = [text for row in zip(*kinds, strict=True) for text in row]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def _write_index(path: Path) -> None:
    from diffusers import __version__

    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_pipeline(directory: Path) -> StableDiffusionPipeline:
    """Return the exported pipeline, in fp32 on the CPU, without progress bars."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: StableDiffusionPipeline, prompts: Sequence[str], *, seed: int) -> list[Image]:
    """Return a picture for each prompt, 64x64 RGB; the noise of prompt i depends only on `seed` and i."""
    import torch

    generators = [torch.Generator().manual_seed(seed * 1000 + index) for index in range(len(prompts))]
    output = pipe(list(prompts), num_inference_steps=SAMPLE_STEPS, guidance_scale=GUIDANCE, generator=generators)
    pictures: list[Image] = output.images
    return pictures


def _score(pipe: StableDiffusionPipeline, kind: str, count: int) -> score.Score:
    return score.score(
        lambda texts: [np.asarray(picture) for picture in sample(pipe, texts, seed=7)], prompts.prompts(kind, count)
    )


def grid(pictures: Sequence[Image], *, columns: int, gap: int = 2) -> Image:
    """Return a picture with the pictures in rows, separated by `gap` pixels of light grey."""
    from PIL import Image

    tile = np.full((64 + gap, 64 + gap, 3), 225, dtype=np.uint8)
    rows = []
    for first in range(0, len(pictures), columns):
        row = []
        for picture in pictures[first : first + columns]:
            framed = tile.copy()
            framed[:64, :64] = np.asarray(picture)
            row.append(framed)
        row += [tile] * (columns - len(row))
        rows.append(np.concatenate(row, axis=1))
    return Image.fromarray(np.concatenate(rows)[:-gap, :-gap])
