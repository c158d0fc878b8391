from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from offcut.errors import ModelError
from offcut.exporter.components import export_component, exportable


def test_sdxls_second_text_encoder(tmp_path: Path) -> None:
    """It gives a projection of the text; its second-last hidden state is what conditions the UNet."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=8,
        projection_dim=12,
        hidden_act="gelu",
        eos_token_id=39,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "text_encoder_2")
    assert exportable(tmp_path / "text_encoder_2") == "CLIPTextModelWithProjection"
    (made,) = export_component(tmp_path / "text_encoder_2", tmp_path / "out", precision="fp32", opset=23)
    assert made.name == "text_encoder_2"
    assert str(made.outputs["text_embeds"]) == "text_embeds: float32[batch, 12]"
    session = onnxruntime.InferenceSession(made.path)
    ids = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    answers = dict(zip(made.outputs, session.run(list(made.outputs), {"input_ids": ids.numpy()}), strict=True))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    torch.testing.assert_close(torch.from_numpy(answers["text_embeds"]), expected.text_embeds, rtol=0, atol=1e-5)
    for index, value in enumerate(expected.hidden_states):
        torch.testing.assert_close(torch.from_numpy(answers[f"hidden_states_{index}"]), value, rtol=0, atol=1e-5)


def test_a_component_of_another_kind_is_named(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    assert exportable(tiny_pipeline_dir / "scheduler") is None
    with pytest.raises(ModelError, match="tokenizer cannot be compiled: offcut exports CLIPTextModel"):
        export_component(tiny_pipeline_dir / "tokenizer", tmp_path, precision="fp32", opset=23)
