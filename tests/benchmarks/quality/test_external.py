"""LPIPS, CLIP score and FID with small networks that have random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from offcut.benchmarks.quality import metrics
from offcut.benchmarks.quality.external import ExternalNetworks
from offcut.errors import UserError

pytest.importorskip("torchmetrics")

PROMPTS = ["a red circle", "a blue square", "a red square"]


def pictures(seed: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, 64, 64, 3), dtype=np.uint8)


class Pooled(nn.Module):
    """A network whose features [N, 12] are the means of an image's quarters."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, (2, 2)).flatten(1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a CLIP model with one layer, and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{letter}{end}" for letter in "abcdeilqrsu" for end in ("", "</w>")),
    ]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, **size}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 16, **size}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_mean_cosine_of_the_models_features(clip: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    images = pictures(0)
    score = ExternalNetworks(clip=clip).figures(images, PROMPTS, None, images)["clip score"]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=PROMPTS, images=[Image.fromarray(picture) for picture in images], return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        vision = model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        text = model.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        cosines = torch.cosine_similarity(model.visual_projection(vision), model.text_projection(text))
    assert score == pytest.approx(max(0.0, 100 * float(cosines.mean())), abs=0.2)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fid") / "network.pt"
    torch.jit.script(Pooled()).save(str(file))
    return file


def test_fid_is_the_frechet_distance_of_the_networks_features(network: Path) -> None:
    generated, real = pictures(1, 40), pictures(2, 40)
    opened = ExternalNetworks(fid=network)
    # The second distance does not include the images of the first.
    distances = [opened.figures(generated, PROMPTS, None, real)["fid"] for _ in range(2)]

    def features(images: np.ndarray) -> np.ndarray:
        return Pooled()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()

    assert distances == pytest.approx([metrics.frechet(features(generated), features(real))] * 2, rel=1e-4)


def test_lpips_by_a_local_backbone(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    file = tmp_path / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    before = torch.hub.get_dir()
    opened = ExternalNetworks(lpips=file)
    assert torch.hub.get_dir() == before
    first, second = pictures(3), pictures(4)
    assert opened.figures(first, PROMPTS, first, first) == {"lpips": pytest.approx(0, abs=1e-6)}
    assert opened.figures(first, PROMPTS, second, first)["lpips"] > 0.01
    assert opened.figures(first, PROMPTS, None, first) == {}


def test_a_network_that_cannot_be_opened_is_refused_in_one_sentence(tmp_path: Path, network: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("no network")
    flat = tmp_path / "flat.pt"
    torch.jit.script(nn.Flatten(0)).save(str(flat))
    for arguments in ({"fid": text}, {"fid": flat}, {"fid": tmp_path / "absent"}, {"clip": tmp_path}, {"clip": text}):
        with pytest.raises(UserError, match=r"FID|CLIP") as error:
            ExternalNetworks(**arguments)
        assert "\n" not in str(error.value)
