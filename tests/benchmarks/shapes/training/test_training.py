"""Training: a few steps run, a resumed run equals an uninterrupted one, the export has the trained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from offcut.benchmarks.shapes.training import checkpoint, decoder_stage, denoiser_stage, export, train, vae_stage
from offcut.errors import UserError

VAE = vae_stage.VaeSettings(steps=4, batch=2, pictures=4, calibration=4, save_every=2)
DECODER = decoder_stage.DecoderSettings(steps=4, batch=2, pictures=4, save_every=2)
DENOISER = denoiser_stage.DenoiserSettings(steps=4, batch=2, scenes=24, save_every=2, log_every=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with an uninterrupted run and its exported model."""
    home = tmp_path_factory.mktemp("shapes")
    stages = {"vae": VAE, "denoiser": DENOISER, "decoder": DECODER}
    train.train(home / "run", home / "model", **stages, resume=False, sample_seeds=(0,), judged=1)
    return home


class CutOffError(Exception):
    """A simulated power failure."""


def cut_off_after(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the run fail right after its first checkpoint with this name."""
    save = checkpoint.save

    def failing(path: Path, state: Any) -> None:
        save(path, state)
        if path.name == name:
            raise CutOffError

    monkeypatch.setattr(checkpoint, "save", failing)


def all_stages(run: Path) -> None:
    vae = vae_stage.train_vae(run, VAE, "cpu", resume=True)
    denoiser_stage.train_denoiser(run, vae, DENOISER, "cpu", resume=True)
    decoder_stage.train_decoder(run, DECODER, "cpu", resume=True)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vae.pt", "denoiser.pt", "decoder.pt"):
        with monkeypatch.context() as patch:
            cut_off_after(patch, name)
            with pytest.raises(CutOffError):
                all_stages(tmp_path)
        assert checkpoint.load(tmp_path / name)["step"] == 2
    all_stages(tmp_path)
    for name in ("vae.pt", "latents.pt", "denoiser.pt", "decoder.pt"):
        assert equal(checkpoint.load(finished / "run" / name), checkpoint.load(tmp_path / name)), name


def test_the_export_holds_the_averaged_weights_in_half_precision(finished: Path) -> None:
    average = checkpoint.load(finished / "run" / "denoiser.pt")
    assert "| held-out pair | 1 |" in (finished / "model" / "README.md").read_text(encoding="utf-8")
    pipe = export.load_pipeline(finished / "model")
    for name, module in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        weights = average[f"{name}_average"]
        assert module.dtype == torch.float32
        for key, value in module.state_dict().items():
            assert torch.equal(value, weights[key].half().float()), key
    assert pipe.vae.config.scaling_factor == checkpoint.load(finished / "run" / "vae.pt")["scaling_factor"]


def test_the_decoder_stage_changes_only_the_decoder(finished: Path) -> None:
    first = checkpoint.load(finished / "run" / "vae.pt")["vae"]
    last = vae_stage.load_vae(finished / "run").state_dict()
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_scaled_latents_have_about_unit_variance(finished: Path) -> None:
    latents = checkpoint.load(finished / "run" / "latents.pt")["latents"]
    assert latents.shape == (DENOISER.scenes, 4, 16, 16)
    assert latents.std() == pytest.approx(1, abs=0.3)


def test_the_log_has_a_line_per_interval_and_drops_lines_after_the_start(finished: Path, tmp_path: Path) -> None:
    rows = checkpoint.read_log(finished / "run" / "denoiser.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["loss"] > 0 and row["seconds_per_step"] > 0 for row in rows)
    copy = tmp_path / "denoiser.jsonl"
    copy.write_text((finished / "run" / "denoiser.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    checkpoint.LossLog(copy, 2)
    assert [row["step"] for row in checkpoint.read_log(copy)] == [2]


def test_noise_levels_are_spread_over_the_whole_schedule() -> None:
    times = denoiser_stage.timesteps(10, torch.Generator().manual_seed(0))
    bounds = [1000 * (k / 10) ** 0.7 for k in range(11)]
    for time, low, high in zip(sorted(times.tolist()), bounds[:-1], bounds[1:], strict=True):
        assert low - 1 <= time <= high
    assert denoiser_stage.timesteps(1000, torch.Generator().manual_seed(0)).max() <= 999


def test_early_steps_prefer_one_large_object(finished: Path) -> None:
    data = denoiser_stage.training_set(finished / "run", vae_stage.load_vae(finished / "run"), DENOISER, "cpu")
    originals = vae_stage.training_scenes(DENOISER.scenes, DENOISER.seed)
    assert len(data.early) > 0
    for index in data.early.tolist():
        assert [item.size for item in originals[index].items] == ["large"]


def test_the_rate_warms_up_and_falls() -> None:
    rates = [checkpoint.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.03


def test_the_average_converges_to_the_weights() -> None:
    module = torch.nn.Linear(2, 2)
    average = checkpoint.Average(module, limit=0.5)
    with torch.no_grad():
        module.weight.fill_(1)
    for step in range(60):
        average.update(step)
    assert torch.allclose(average.state["weight"], module.weight)


def test_an_export_without_checkpoints_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train"):
        export.export(tmp_path, tmp_path / "model")
    app = typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, ["--export-only", "--run", str(tmp_path), "--out", str(tmp_path / "model")])
    assert result.exit_code == 1
    assert "does not exist" in result.output
    assert not (tmp_path / "model").exists()
